"""On a GPU that is only logical: how often the host waits in a step of training, in an embed and in an evaluation.

check_logical_gpu.py FOLDER LAYOUT...   LAYOUT is that of check_layouts.py, with `,bf16` for the kernels of a GPU in
                                        bf16, and `,item` at the end for a step in which the loss is read where nobody
                                        needs it
check_logical_gpu.py rules              (one process) what the logical GPU refuses and counts

Each rank prints a line of JSON per layout, with the lines of code that waited.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from check_layouts import family_of, parse_layout, small_config
from letters import Letters
from logical_gpu import LogicalGpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import mlp
from PIL import Image
from reference import CAUSAL, one_by_one, pack_pair_batch, random_pairs, random_sequence

from megatron_llave.batch import Side, StepBatches
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.step_buffer import StepBuffer, pack_step
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import LoadedModel, embed_parts
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, build_tasks
from megatron_llave.evaluation.evaluate import evaluate_tasks
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.mining.refresh import Refresh
from megatron_llave.models import build_model
from megatron_llave.models.blocks import kernels, layer_specs
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor
from megatron_llave.models.qwen_vl.processor import QwenVlProcessor
from megatron_llave.models.qwen_vl.prompt import PLAIN
from megatron_llave.models.qwen_vl.resize import PixelBudget
from megatron_llave.train import run_steps
from megatron_llave.training import gradient_cache
from megatron_llave.training.broadcast import broadcast_steps, is_reader
from megatron_llave.training.fault_tolerance import Watchdog
from megatron_llave.training.logger import RunLog
from megatron_llave.training.optimizer import build_trainable
from megatron_llave.training.run_state import RunState

MICRO_BATCHES, PAIRS = 2, 2
"""Micro batches of a rank, and pairs of a micro batch, at every layout."""
STEPS = 2
"""The first one is counted: the last one saves."""
FUSED = ("bias_swiglu_impl", "bias_gelu_impl")
"""megatron-core's fused activations of the decoder and of the vision encoder."""


def count(gpu: LogicalGpu, cfg: RunConfig, folder: str, reads_a_value: bool = False) -> dict[str, Counter[str]]:
    """What waits in a step, an embed and an evaluation; the run writes into the folder."""
    cfg.train.output, cfg.train.steps = folder, STEPS
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), cfg.train.seed)
    reading = patch.object(gradient_cache, "_loss_over", partial(read_the_loss, gradient_cache._loss_over))
    with reading if reads_a_value else nullcontext():
        waits = {"step": count_step(gpu, cfg, chunks, groups)}
    for chunk in chunks:
        chunk.eval()
    size, patch_size = cfg.model.vision.image_size, cfg.model.vision.patch_size
    if size:
        encoder = LlavaOnevisionProcessor(Letters(), "plain", 4096, (), size, patch_size)
    else:
        encoder = QwenVlProcessor(Letters(), PLAIN, 4096, PixelBudget(patch_size, 64, 256))
    model = LoadedModel(cfg, chunks, encoder, groups)
    inputs = {word: Side(word, []) for word in ("one", "two", "three")} | {
        "picture": Side("", [Image.new("L", (9, 9))])
    }
    keys, before = list(inputs), Counter(gpu.waits)
    rows = model.embed(inputs.values())
    waits["embed"] = gpu.waits - before
    assert rows.is_cuda and rows.isfinite().all()
    before = Counter(gpu.waits)
    tasks = build_tasks(inputs, [EvaluationSet("set", "retrieval", "ind", keys, keys[::-1], [3, 2, 1, 0])])
    evaluated = evaluate_tasks(CachedEmbedder(partial(embed_parts, model), None, {}, groups.dp), tasks, "strict")
    assert evaluated.results[0].precision_at_1 == 100
    waits["evaluation"] = gpu.waits - before
    return waits


def count_step(
    gpu: LogicalGpu, cfg: RunConfig, chunks: list[torch.nn.Module], groups: ProcessGroupCollection
) -> Counter[str]:
    """What waits from one call for data to the next one in the training loop."""
    state = TrainingState(chunks, build_trainable(cfg, chunks, groups), None, groups)
    data = read(cfg) if is_reader(groups) else None
    before: list[Counter[str]] = []
    steps = noted(broadcast_steps(data, groups, process_groups.device()), gpu, before)
    run = RunState(cfg.train.output, dist.get_rank() == 0)
    watchdog = Watchdog(cfg.parallel.timeout_seconds, run.fail)
    log = RunLog(Path(cfg.train.output), 1, STEPS, process_groups.is_reporting_rank(groups), [])
    writer = CheckpointWriter(cfg, groups)
    assert run_steps(cfg, state, steps, 0, log, watchdog, run, writer, Refresh(cfg, 0, writer)) == ""
    watchdog.close()
    return before[1] - before[0]


def read(cfg: RunConfig) -> Iterator[StepBuffer]:
    """Steps of micro batches of different lengths, in page-locked memory as torch's DataLoader yields them."""
    pairs, hard = random_pairs(cfg.model, MICRO_BATCHES * PAIRS), [random_sequence(cfg.model, 100, True)]
    parts = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
    multiple = row_multiple(cfg.model, cfg.parallel)
    batches = [pack_pair_batch(part, cfg.model, multiple, hard, cfg.parallel.context) for part in parts]
    while True:
        yield pack_step(StepBatches(batches, {})).pin_memory()


def noted(steps: Iterator[StepBatches], gpu: LogicalGpu, before: list[Counter[str]]) -> Iterator[StepBatches]:
    """The steps; what has waited before each of them is added to `before`."""
    while True:
        before.append(Counter(gpu.waits))
        yield next(steps)


def read_the_loss(loss_over: callable, *args: object) -> LossShare:
    loss, statistics = loss_over(*args)
    loss.item()
    return loss, statistics


@contextmanager
def kernels_of_a_gpu(gpu: LogicalGpu) -> Iterator[Counter[str]]:
    """Let the local kernels of a GPU be found, and count their calls: torch's attention for packed rows, and
    megatron-core's fused functions, which are not compiled here."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: (calls.update([name]), function(*args, **kwargs))[1]

    find_spec, attention = kernels.find_spec, counted("attention", gpu.kernel(one_by_one))
    with ExitStack() as stack:
        for target, name, value in (
            (kernels, "find_spec", lambda name: "found" if name == "triton" else find_spec(name)),
            (layer_specs, "variable_length_attention", lambda: (attention, CAUSAL)),
            *((mlp, name, counted(name, getattr(mlp, name))) for name in FUSED),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.dict("os.environ", {"CC": "cc"}))
        yield calls


def check_rules() -> None:
    """Everything that the logical GPU must refuse or count, and what it must let pass, one by one."""
    with LogicalGpu() as gpu:
        host, device = torch.arange(4.0), torch.arange(4.0, device="cuda")
        assert device.device.type == "cuda" and device.is_cuda and host.device.type == "cpu" and not gpu.waits
        assert (device[1:] * 2).view(-1).is_cuda and device.new_zeros(2).is_cuda and torch.zeros_like(device).is_cuda
        kernel = gpu.kernel(lambda x: x * torch.arange(4.0) + float(x.sum()))
        assert kernel(device).is_cuda
        mixes = (lambda: device + host, lambda: torch.cat([device, host]), lambda: device[host.long()])
        for mix in (*mixes, lambda: kernel(host)):
            with pytest.raises(RuntimeError, match="tensors of the device and of the host"):
                mix()
        with pytest.raises(TypeError, match="can't convert"):
            device.numpy()
        leaf = device.clone().requires_grad_()
        (leaf * torch.tensor(2.0)).sum().backward()
        assert leaf.grad.is_cuda
        page_locked = host.pin_memory()
        free = [
            lambda: page_locked.to("cuda", non_blocking=True),
            lambda: device.copy_(page_locked, non_blocking=True),
            lambda: torch.repeat_interleave(device, device.long(), output_size=6),
            lambda: device.index_put_((device > 1,), torch.tensor(0.0)),
            lambda: device.__setitem__(0, 1.0),
            lambda: device.__setitem__(slice(2), torch.tensor(1.0)),
            lambda: device.fill_(torch.tensor(1.0)),
            lambda: device.to("cpu", non_blocking=True),
        ]
        for call in free:
            call()
        assert not gpu.waits
        waiting = [
            *(device.sum().item, device.tolist, device.cpu, device.nonzero, torch.cuda.synchronize),
            *(lambda: float(device[0]), lambda: bool(device[0] > 0), lambda: host.to("cuda")),
            *(lambda: page_locked.to("cuda"), lambda: host.to("cuda", non_blocking=True)),
            *(lambda: torch.tensor([1.0], device="cuda"), lambda: device.new_tensor([1.0])),
            *(lambda: device[device > 1], lambda: device.masked_select(device > 1), lambda: device.copy_(host)),
            *(lambda: host.copy_(device), lambda: torch.repeat_interleave(device, device.long())),
            *(
                lambda: torch.tensor([device[0]]),
                lambda: device.unique(),
                lambda: torch.equal(device, device),
                lambda: torch.allclose(device, device),
                lambda: device[0].copy_(torch.tensor(1.0)),
                lambda: torch.tensor(1.0).copy_(device[0]),
                lambda: device.__setitem__(0, torch.tensor(1.0)),
                torch.cuda.Event().synchronize,
            ),
        ]
        for number, call in enumerate(waiting, 1):
            call()
            assert gpu.waits.total() == number, f"call {number} waits {gpu.waits.total() - number + 1} times"


def main() -> None:
    folder, *layouts = sys.argv[1:]
    if folder == "rules":
        check_rules()
        return
    with LogicalGpu() as gpu:
        process_groups.initialize_distributed(120)
        for text in layouts:
            cfg, words = small_config(parse_layout(text)[0], [], family_of(text)), text.split(",")
            if "bf16" not in words:
                waits = count(gpu, cfg, f"{folder}/{text}", "item" in words)
            else:
                section = [2, 3, 3] if cfg.model.language.mrope_section else []
                language = replace(cfg.model.language, hidden_size=64, mrope_section=section)
                cfg.model = replace(cfg.model, precision="bf16", language=language)
                with kernels_of_a_gpu(gpu) as calls:
                    waits = count(gpu, cfg, f"{folder}/{text}", "item" in words)
                    assert row_multiple(cfg.model, cfg.parallel) % 128 == 0
                # Rank 0 is on the first stage of a pipeline, which has the vision encoder.
                assert {"attention", *FUSED[: 2 if dist.get_rank() == 0 else 1]} <= calls.keys(), calls
            # In one piece, since all ranks write into the same file, and other lines may not have ended yet.
            sys.stdout.write(f"\n{json.dumps({'layout': text, **waits})}\n")
            sys.stdout.flush()
            process_groups.destroy_model_parallel()
        process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

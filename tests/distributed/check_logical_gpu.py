"""On a GPU that is only logical: how often the host waits in a step of training, in an embed and in an evaluation.

check_logical_gpu.py FOLDER LAYOUT...   LAYOUT is that of check_layouts.py, with `,item` at the end for a step in which
                                        the loss is read where nobody needs it
check_logical_gpu.py rules              (one process) what the logical GPU refuses and counts

Each rank prints a line of JSON per layout, with the lines of code that waited.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from check_layouts import parse_layout, small_config
from logical_gpu import LogicalGpu
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from reference import pack_pair_batch, random_pairs, random_sequence

from megatron_llave.batch import Side, StepBatches
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.step_buffer import StepBuffer, pack_step
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import LoadedModel, embed_parts
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, build_tasks
from megatron_llave.evaluation.evaluate import evaluate_tasks
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.models import build_model
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor
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


class Letters:
    """One id per character."""

    vocab_size = 128
    eos_id = 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


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
    encoder = LlavaOnevisionProcessor(Letters(), "plain", 4096, (), size, patch_size)
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
    assert run_steps(cfg, state, steps, 0, log, watchdog, run) == ""
    watchdog.close()
    return before[1] - before[0]


def read(cfg: RunConfig) -> Iterator[StepBuffer]:
    """Steps of micro batches of different lengths, in page-locked memory as torch's DataLoader yields them."""
    pairs, hard = random_pairs(cfg.model, MICRO_BATCHES * PAIRS), [random_sequence(cfg.model, 100, True)]
    parts = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
    batches = [pack_pair_batch(part, cfg.model, 4, hard, cfg.parallel.context) for part in parts]
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


def check_rules() -> None:
    """Everything that the logical GPU must refuse or count, and what it must let pass, one by one."""
    with LogicalGpu() as gpu:
        host, device = torch.arange(4.0), torch.arange(4.0, device="cuda")
        assert device.device.type == "cuda" and device.is_cuda and host.device.type == "cpu" and not gpu.waits
        assert (device[1:] * 2).view(-1).is_cuda and device.new_zeros(2).is_cuda and torch.zeros_like(device).is_cuda
        for mix in (lambda: device + host, lambda: torch.cat([device, host]), lambda: device[host.long()]):
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
            cfg = small_config(parse_layout(text.removesuffix(",item"))[0], [])
            waits = count(gpu, cfg, f"{folder}/{text}", text.endswith(",item"))
            # In one piece, since all ranks write into the same file, and other lines may not have ended yet.
            sys.stdout.write(f"\n{json.dumps({'layout': text, **waits})}\n")
            sys.stdout.flush()
            process_groups.destroy_model_parallel()
        process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

"""Compare planned and measured bytes of a step, by part, on every rank.

    python benchmarks/memory_plan.py [--preset tiny] [--pairs 2] [--micro-batches 2] [section.key=value ...]
    torchrun --nproc-per-node 2 benchmarks/memory_plan.py parallel.tensor=2 parallel.sequence=true

The benchmark takes two real training steps on the CPU with random weights and tokens. In the second one it counts the
storages of parameters, gradient buffers, optimizer states, whatever autograd keeps for the backward pass, features, and
the batch. `temporary` is the remainder of the peak of all live storages. The result is a Markdown table or, with
--json, one line of JSON.

Then it saves a checkpoint to a temporary folder. Its tensors say that they are on a GPU, so that they are copied to
the host as from one. `copied` is the peak of the storages that the save makes. `grown` is how much the memory of the
process and its writers grows (Pss_Anon in /proc, where what they share counts once); their Python objects are some MB,
so it says something for models of a few hundred MB: --preset 0.5b model.language.num_layers=4.
"""

import argparse
import ctypes
import gc
import json
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import finalize

import numpy as np
import psutil
import tokenizers
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from megatron_llave.batch import PackedSequences, PairBatch, Side
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.load import config_from_dict, override_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import Processor, pack_sequences
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import exit_with_one_line, require
from megatron_llave.models import build_model, build_processor
from megatron_llave.models.blocks.embedder import Embedder
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.planning.host_memory import save_bytes
from megatron_llave.planning.memory import stage_memory
from megatron_llave.planning.pair_lengths import Kind, SideShape, images_shape
from megatron_llave.planning.plan import step_shape
from megatron_llave.train import train_step
from megatron_llave.training import gradient_cache
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.optimizer import Trainable, build_trainable

IMAGE_SIZE = (640, 480)
TEXT = 30, 12
"""Number of text tokens in a query, beside its image, and in a target."""
VOCABULARY = 256


def make_processor(cfg: RunConfig) -> Processor:
    """The processor of the run's family, without a prompt around the text, and with a tokenizer of numbers."""
    numbers = {str(i): i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|im_end|>"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        tokenizer.save(str(file))
        return build_processor(replace(cfg.data, tokenizer=str(file), prompt="plain"), cfg.model)


def side_shapes(cfg: RunConfig) -> tuple[SideShape, SideShape]:
    """Lengths of the query and the target, the same in every pair."""
    images = images_shape([list(IMAGE_SIZE)], cfg.data, cfg.model)
    return replace(images, tokens=TEXT[0] + images.visual_tokens), SideShape(TEXT[1])


def make_batch(cfg: RunConfig, rank: int) -> PairBatch:
    """The part of context rank `rank` of a micro batch of such pairs."""
    pairs, processor, rng = cfg.train.micro_batch_size, make_processor(cfg), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*IMAGE_SIZE[::-1], 3), np.uint8))
    texts = [" ".join(map(str, rng.integers(0, VOCABULARY, number - 1))) for number in TEXT]  # and the end
    query, target = (processor.encode(Side(text, images)) for text, images in zip(texts, ([image], [])))
    shape, multiple = processor.tile_shape, row_multiple(cfg.model, cfg.parallel)
    packed = pack_sequences([query] * pairs + [target] * pairs, multiple, shape, cfg.parallel.context)
    part = packed.part(rank).map(Tensor.clone)
    ids = torch.arange(pairs)
    return PairBatch(part, ids, ids, ids[:0], "random", [str(i) for i in range(pairs)])


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each storage among the tensors, by its address."""
    kept = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes()}


class Saved:
    """What the autograd graphs of the model's forward passes keep, and for how long."""

    def __init__(self, batches: list[PairBatch], others: dict[int, int]) -> None:
        self._batches, self._others = batches, others
        self._holders: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self._features: set[int] = set()
        self.most = {"activations": 0, "vision features": 0}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the forward passes in this block. What a backward pass recomputes does not count."""
        forward = Embedder.forward

        def watched(model: Embedder, sequences: PackedSequences) -> Tensor:
            with saved_tensors_hooks(self._hold, lambda holder: holder.tensor):
                output = forward(model, sequences)
            self._count()
            return output

        with mock.patch.object(Embedder, "forward", watched):
            yield

    def _hold(self, tensor: Tensor) -> "Holder":
        [(place, size)] = storages([tensor]).items() or [(0, 0)]
        if place and place not in self._others:
            self._holders[place] += 1
            self._bytes[place] = size
        holder = Holder(tensor)
        finalize(holder, self._release, place)
        return holder

    def _release(self, place: int) -> None:
        self._holders[place] -= 1

    def _count(self) -> None:
        features = storages(batch.sequences.features for batch in self._batches)
        self._features = {place for place in self._features if self._holders[place] > 0} | features.keys()
        live = {place: self._bytes[place] for place, number in self._holders.items() if number > 0}
        of_features = {place: size for place, size in live.items() if place in self._features} | features
        now = {"vision features": sum(of_features.values())}
        now["activations"] = sum(size for place, size in live.items() if place not in self._features)
        self.most = {part: max(size, now[part]) for part, size in self.most.items()}


class Holder:
    """An object that lives as long as the graph keeps the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Peak(TorchDispatchMode):
    """The peak bytes of the tensors that are created while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary()
        self._live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count the tensors that an operation returns and that did not exist before."""
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage(), True)
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known[storage] = True
                self._live += storage.nbytes()
                finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self._live)
        return output

    def _free(self, size: int) -> None:
        self._live -= size


def optimizer_tensors(trainable: Trainable) -> list[Tensor]:
    """The moments, and the float32 weights that the optimizer keeps for itself."""
    inner = getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
    tensors = []
    for optimizer in inner:
        tensors += [x for state in optimizer.optimizer.state.values() for x in state.values()]
        tensors += [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    return tensors


def measure(cfg: RunConfig, groups: ProcessGroupCollection) -> tuple[dict[str, int], dict[str, int]]:
    """Measured bytes by part on this rank, and those of a save."""
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=0, lora=cfg.lora)
    trainable = build_trainable(cfg, chunks, groups)
    share = cfg.train.global_batch_size // groups.dp.size() // cfg.train.micro_batch_size
    first, batches = ([make_batch(cfg, groups.cp.rank()) for _ in range(share)] for _ in range(2))
    train_step(trainable, first, cfg.loss, 0, groups)  # this creates the moments
    weights = storages(p.data for chunk in chunks for p in chunk.parameters())
    gradients = storages(p.main_grad for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    data = storages(x for b in batches for x in (*vars(b).values(), *vars(b.sequences).values()))
    moments = {k: v for k, v in storages(optimizer_tensors(trainable)).items() if k not in weights}
    measured = {"weights": weights, "gradients": gradients, "optimizer": moments, "data": data}
    measured = {part: sum(sizes.values()) for part, sizes in measured.items()}
    saved = Saved(batches, weights | data)
    with saved.watch(), watch_loss() as loss, Peak() as everything:
        train_step(trainable, batches, cfg.loss, 0, groups)
    measured |= saved.most | {"loss": sum(loss)}
    kept = ("activations", "vision features", "loss")
    measured["temporary"] = everything.most - sum(measured[part] for part in kept)
    return measured, measure_save(TrainingState(chunks, trainable, None, groups, lora=cfg.lora), cfg)


@contextmanager
def watch_loss() -> Iterator[list[int]]:
    """The peak bytes in the loss between two passes, including the embeddings; empty if there is no such loss."""
    sizes: list[int] = []
    gradients = gradient_cache._loss_gradients

    def watched(embeddings: list[Tensor], *args: Any) -> Any:
        with Peak() as peak:
            result = gradients(embeddings, *args)
        sizes.append(peak.most + sum(x.nbytes for x in embeddings))
        return result

    with mock.patch.object(gradient_cache, "_loss_gradients", watched):
        yield sizes


class OnDevice(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a copy on the CPU, whatever is asked for."""
        return self.as_subclass(Tensor).clone()


def measure_save(state: TrainingState, cfg: RunConfig) -> dict[str, int]:
    """Peak bytes of a save on this rank: `copied` in tensors, and `grown` of the process and its writers."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    writer = CheckpointWriter(override_config(cfg, [f"train.output={folder[0]}"]), state.groups)
    to_save = state.to_save(1)
    for part in nested_values(to_save):
        if isinstance(part, ShardedTensor | ShardedTensorFactory):
            part.data = part.data.detach().as_subclass(OnDevice)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the step has freed would otherwise be used again, and not be seen
    with watch_processes() as grown, Peak() as copied:
        saved = writer.save(1, to_save, None) and writer.poll(wait=True)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    require(saved, "the checkpoint could not be saved")
    return {"copied": copied.most, "grown": max(grown)}


@contextmanager
def watch_processes() -> Iterator[list[int]]:
    """Growth of the anonymous memory of this process and its descendants in bytes, again and again."""
    this, grown, is_over = psutil.Process(), [0], threading.Event()

    def now() -> int:
        total, others = 0, this.children(recursive=True)
        for process in others:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        # This one last: memory that it frees or copies meanwhile is not counted twice.
        for process in [*others, this]:
            with suppress(OSError):  # it has ended
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += int(re.search(r"^Pss_Anon: *(\d+) kB", rollup, re.MULTILINE)[1]) << 10
        for process in others:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        return total

    def watch() -> None:
        while not is_over.wait(0.01):
            grown.append(now() - before)

    before, thread = now(), threading.Thread(target=watch)
    thread.start()
    yield grown
    is_over.set()
    thread.join()


def planned(cfg: RunConfig, groups: ProcessGroupCollection) -> tuple[dict[str, int], int]:
    """Planned bytes by part on this rank, and those of a save."""
    step, stage = step_shape(cfg, groups.dp.size(), [Kind(1, [side_shapes(cfg)])]), groups.pp.rank()
    return stage_memory(cfg, stage, step, on_gpu=False), save_bytes(cfg, stage, step)


def run(args: argparse.Namespace) -> None:
    """Measure on all ranks; the first rank prints."""
    ranks = process_groups.initialize_distributed(600)
    layout = ["train.micro_batch_size=" + str(args.pairs), "train.steps=1"]
    cfg = override_config(config_from_dict({"model": {"preset": args.preset}}), [*layout, *args.overrides])
    data_parallel = validate_layout(cfg.model, cfg.parallel, ranks)
    total = data_parallel * args.pairs * args.micro_batches
    cfg = override_config(cfg, [f"train.global_batch_size={total}"])
    validate_batch(cfg, data_parallel)
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    (parts, save), (measured, saved) = planned(cfg, groups), measure(cfg, groups)
    row = {"planned": parts, "measured": measured, "save": {"planned": save, **saved}}
    rows: list[Any] = [None] * ranks
    dist.all_gather_object(rows, row)
    if dist.get_rank() == 0:
        if args.json:
            print(json.dumps(rows))
        else:
            print_table(rows)
    process_groups.destroy_distributed()


def print_table(rows: list[dict[str, dict[str, int]]]) -> None:
    """Print a row per rank and part, in MB."""
    print("| rank | part | planned MB | measured MB | ratio |\n|---:|---|---:|---:|---:|")
    for rank, row in enumerate(rows):
        for part, size in row["planned"].items():
            measured = row["measured"][part]
            ratio = f"{size / measured:.3f}" if measured else "-"
            print(f"| {rank} | {part} | {size / 1e6:.3f} | {measured / 1e6:.3f} | {ratio} |")
        sums = [sum(row[kind].values()) for kind in ("planned", "measured")]
        print(f"| {rank} | all | {sums[0] / 1e6:.3f} | {sums[1] / 1e6:.3f} | {sums[0] / sums[1]:.3f} |")
        for kind in ("copied", "grown"):
            size, measured = row["save"]["planned"], row["save"][kind]
            print(f"| {rank} | save: {kind} | {size / 1e6:.3f} | {measured / 1e6:.3f} | {size / measured:.3f} |")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--pairs", type=int, default=2, help="pairs per micro batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro batches per data-parallel rank")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        run(args)


if __name__ == "__main__":
    main()

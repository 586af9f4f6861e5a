"""What every rank measures: steps with and without the gather, and collectives on their own.

study.py starts it under torchrun as `ranks.py REQUEST.json`. Every batch is used several times, and each time three
steps are made of it: one with the gather under a Meter, whose barriers take time of their own, one without the gather
(the loss compares this rank's pairs alone), and one with it. Then come collectives of other sizes, outside of any step,
to which the links of the model are fitted: so other load of the machine affects both. The backend is gloo on the CPU,
with one thread per rank.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from benchmarks.communication.model import FLOAT, Collective, loss_collectives, received_bytes
from megatron_llave.batch import PairBatch
from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.state import load_weights
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.step_buffer import StepBuffer, unpack_step
from megatron_llave.data.storage import open_storage
from megatron_llave.distributed import collectives, cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.files import read_json, write_json
from megatron_llave.loss import Compare, build_loss, contrastive
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.models import build_model, build_processor
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.optimizer import Trainable, build_trainable

REPEATS = 3
"""Times that each batch is taken; the fastest counts, for what else the machine does can only delay it."""
CALIBRATION_BYTES = (192, 3072, 24576, 196608)
"""Of a rank's part, per collective that is timed on its own; no power of 2, which a step's parts are likely to be."""
TOUCHED = 3_000_000
"""Numbers that a rank changes before each of these: a collective that follows another one at once has all that it needs
in the caches, and takes half as long as one that follows the layers of a model."""
KINDS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter", "all_reduce": "all_reduce"}
"""Of torch.distributed -> of the model."""
COLUMNS = ("alone", "gathered", "metered", "waiting", "effective_alone", "effective", "hardest_share")
"""Seconds of a step without the gather, with it, with it and barriers, the wait in these; then what the loss saw."""


def timed(call: Callable[[], object], group: dist.ProcessGroup) -> tuple[float, float]:
    """Seconds of waiting for the other ranks of the group, before and after a call, and seconds of the call itself.

    Without the barrier behind it, ranks that share cores and are done first would go on to their backward, and keep
    the others' collective from ending.
    """
    started = time.perf_counter()
    dist.barrier(group)
    together = time.perf_counter()
    call()
    done = time.perf_counter()
    dist.barrier(group)
    return time.perf_counter() - done + together - started, done - together


class Meter:
    """Times the collectives of the loss, in their order."""

    def __init__(self) -> None:
        self.calls: list[Collective] = []
        self.waiting: list[float] = []
        """Seconds, per call."""
        self.moving: list[float] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Stand between torch.distributed and the loss's collectives, through which nothing of megatron-core goes."""
        stand_ins = {name: partial(self._measure, name) for name in KINDS}
        stand_in = SimpleNamespace(**stand_ins, ReduceOp=dist.ReduceOp)
        with mock.patch.object(collectives, "dist", stand_in), mock.patch.object(contrastive, "dist", stand_in):
            yield

    def _measure(self, name: str, *args: object, group: dist.ProcessGroup) -> None:
        # The gathered rows, those that are summed and scattered, or those that are reduced.
        whole = max(x.nbytes for x in args if isinstance(x, Tensor))
        waiting, moving = timed(partial(getattr(dist, name), *args, group=group), group)
        self.calls.append(Collective(KINDS[name], whole))
        self.waiting.append(waiting)
        self.moving.append(moving)


def calibrate(group: dist.ProcessGroup) -> list[tuple[Collective, float]]:
    """Every kind of collective in every size of CALIBRATION_BYTES, with seconds, each with cold caches.

    Nothing for a single rank.
    """
    if group.size() == 1:
        return []
    found, numbers = [], torch.zeros(TOUCHED)
    for size in CALIBRATION_BYTES:
        part = torch.zeros(size // FLOAT)
        whole = torch.zeros(group.size() * size // FLOAT)
        calls = {
            "all_gather": partial(dist.all_gather_into_tensor, whole, part, group=group),
            "all_reduce": partial(dist.all_reduce, whole, group=group),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole, group=group),
        }
        for kind, call in calls.items():
            numbers.add_(1)
            found.append((Collective(kind, whole.nbytes), timed(call, group)[1]))
    return found


def run_step(
    trainable: Trainable, batch: PairBatch, compare: Compare, watch: AbstractContextManager = nullcontext()
) -> tuple[float, LossShare]:
    """Seconds of a training step on one micro batch, and what its loss saw; `watch` is on until the update."""
    dist.barrier()
    started = time.perf_counter()
    trainable.zero_gradients()
    with watch:
        [share] = forward_backward(trainable.chunks, [batch], compare, "global_batch")
    trainable.update()
    step_metrics([share], [batch], dist.group.WORLD)
    return time.perf_counter() - started, share


def measure(cfg: RunConfig, steps: int, weights: str | None) -> dict[str, Any]:
    """All steps on this rank.

    Args:
        cfg: of the run; its global batch over the ranks is one micro batch of each.
        steps: batches that are measured, after one that is not; about so many, equally many of each subset.
        weights: a run or checkpoint whose weights the model gets; None: random ones.

    Returns:
        The same on every rank. Seconds: the mean over ranks, of its repetitions the smallest, over batches the median.
        What the loss saw: means.
    """
    ranks = process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    stream = build_train_stream(cfg, build_processor(cfg.data, cfg.model), groups.dp.rank(), ranks, pad_to_multiple=1)
    # All before the first step: pictures that are decoded meanwhile would take the cores from it.
    batches = take_evenly(stream, list(cfg.data.subsets) or list(open_storage(cfg.data).read_index().subsets), steps)
    trainable = _build(cfg, weights, groups)
    pairs = cfg.train.global_batch_size // ranks
    expected = loss_collectives(pairs, cfg.model.language.hidden_size, ranks)
    rows, moving, alone = [], [], []
    for batch in batches:
        for _ in range(REPEATS):
            row, meter = _measure_batch(cfg, trainable, batch, groups.dp)
            assert meter.calls == expected, f"the loss called {meter.calls}, but the model has {expected}"
            samples = calibrate(groups.dp)
            rows.append(row)
            moving.append(meter.moving)
            alone.append([seconds for _, seconds in samples])
    rows, moving, alone = (_mean_over_ranks(table[REPEATS:]) for table in (rows, moving, alone))  # after the warm-up
    times, seen = _typical(rows[:, :4]), rows[:, 4:].mean(axis=0)
    result = dict(zip(COLUMNS, [*times.tolist(), *seen.tolist()]))
    kinds = [one for one, _ in samples]
    return result | {
        "received": received_bytes(meter.calls, ranks),
        "subsets": [batch.subset for batch in batches[1:]],
        "collectives": _described(expected, _typical(moving)),
        "calibration": _described(kinds, _typical(alone)),
    }


def take_evenly(stream: Iterator[StepBuffer], subsets: Sequence[str], steps: int) -> list[PairBatch]:
    """Batches of a stream: one to warm up, then equally many of each subset, at least one and about `steps` in all.

    Subsets differ in how many of their negatives count, and which come first depends on the size of the batch: numbers
    of processes would be compared on other kinds of pairs.
    """
    most = max(1, round(steps / len(subsets)))
    taken: list[PairBatch] = []
    counts = dict.fromkeys(subsets, 0)
    first = None
    while min(counts.values()) < most:
        batch = unpack_step(next(stream)).batches[0]
        if first is None:
            first = batch
        elif counts[batch.subset] < most:
            counts[batch.subset] += 1
            taken.append(batch)
    return [first, *taken]


def _build(cfg: RunConfig, weights: str | None, groups: ProcessGroupCollection) -> Trainable:
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), cfg.train.seed)
    if weights is not None:
        load_weights(folders.find(weights), chunks, groups)
    return build_trainable(cfg, chunks, groups)


def _measure_batch(
    cfg: RunConfig, trainable: Trainable, batch: PairBatch, group: dist.ProcessGroup
) -> tuple[list[float], Meter]:
    """This rank's COLUMNS for one batch, and its collectives."""
    loss = loss_of_subset(cfg, batch.subset)
    meter = Meter()
    metered, _ = run_step(trainable, batch, build_loss(loss, group), meter.watch())
    alone, (_, seen_alone) = run_step(trainable, batch, build_loss(loss, None))
    gathered, (_, seen) = run_step(trainable, batch, build_loss(loss, group))
    similarities = seen_alone.effective_negatives, seen.effective_negatives, seen.hardest_share
    return [alone, gathered, metered, sum(meter.waiting), *(float(x.mean()) for x in similarities)], meter


def _mean_over_ranks(table: list[list[float]]) -> np.ndarray:
    """[rows, columns], the same on every rank."""
    whole = torch.tensor(table, dtype=torch.float64) / dist.get_world_size()
    dist.all_reduce(whole)
    return whole.numpy()


def _typical(seconds: np.ndarray) -> np.ndarray:
    """[columns] of [batches * REPEATS, columns]: the median over batches of the fastest repetition."""
    batches = len(seconds) // REPEATS
    return np.median(seconds.reshape(batches, REPEATS, seconds.shape[1]).min(axis=1), axis=0)


def _described(collectives: list[Collective], seconds: np.ndarray) -> list[tuple[str, int, float]]:
    """For JSON."""
    return [(one.kind, one.whole, float(time)) for one, time in zip(collectives, seconds)]


def main() -> None:
    """Do what the request asks for; the first rank writes the result where it says."""
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        request = read_json(sys.argv[1])
        result = measure(load_config(request["config"]), request["steps"], request["checkpoint"])
        if dist.get_rank() == 0:
            write_json(request["result"], result | {"settings": request["settings"]})
        process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

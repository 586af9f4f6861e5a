"""Runs on every rank and measures steps with and without the gather, and collectives outside of a step.

study.py starts this file under torchrun as `ranks.py REQUEST.json`. Every batch is repeated several times. Each
repetition takes three steps: one with the gather under a Meter, whose barriers add time, one without the gather (the
loss compares the pairs of this rank alone), and one with the gather. Then it times collectives of other sizes, to which
the links of the model are fitted. Because steps and collectives alternate, other load on the machine affects both. The
backend is gloo on the CPU, with one thread per rank.
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
from megatron_llave.config.loss import LossConfig
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
from megatron_llave.training.fault_tolerance import read_norms
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.optimizer import Trainable, build_trainable

REPEATS = 3
"""Number of repetitions of each batch. The fastest counts, because other load on the machine can only add time."""
CALIBRATION_BYTES = (192, 3072, 24576, 196608)
"""Sizes in bytes of a rank's part in the collectives that are timed outside of a step.

None is a power of 2, because the sizes within a step are likely to be powers of 2.
"""
TOUCHED = 3_000_000
"""Number of float32 values that a rank changes before each of these collectives, to clear the CPU caches.

Directly after another collective, with warm caches, a collective takes half as long as after the layers of a model.
"""
KINDS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter", "all_reduce": "all_reduce"}
"""Function of torch.distributed -> kind of collective in the model."""
COLUMNS = ("alone", "gathered", "metered", "waiting", "effective_alone", "effective", "hardest_share")
"""Columns of a measurement.

The first four are seconds: a step without the gather, with it, with it and barriers, and the wait in these barriers.
The others are statistics of the loss.
"""


def timed(call: Callable[[], object], group: dist.ProcessGroup) -> tuple[float, float]:
    """Seconds of waiting for the other ranks of the group before and after a call, and seconds of the call itself.

    The barrier after the call is needed if ranks share cores: ranks that finish first would start their backward pass
    and delay the collective of the others.
    """
    started = time.perf_counter()
    dist.barrier(group)
    together = time.perf_counter()
    call()
    done = time.perf_counter()
    dist.barrier(group)
    return time.perf_counter() - done + together - started, done - together


class Meter:
    """Records kind, size and time of each collective of the loss, in the order of the calls."""

    def __init__(self) -> None:
        self.calls: list[Collective] = []
        self.waiting: list[float] = []
        """Seconds of waiting in the barriers around each call."""
        self.moving: list[float] = []
        """Seconds of each call itself."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Replace torch.distributed in the modules of the loss while the block runs; megatron-core is not affected."""
        wrappers = {name: partial(self._measure, name) for name in KINDS}
        mocked = SimpleNamespace(**wrappers, ReduceOp=dist.ReduceOp)
        with mock.patch.object(collectives, "dist", mocked), mock.patch.object(contrastive, "dist", mocked):
            yield

    def _measure(self, name: str, *args: object, group: dist.ProcessGroup) -> None:
        # The largest tensor is the output of an all-gather, and the input of a reduce-scatter or an all-reduce.
        whole = max(x.nbytes for x in args if isinstance(x, Tensor))
        waiting, moving = timed(partial(getattr(dist, name), *args, group=group), group)
        self.calls.append(Collective(KINDS[name], whole))
        self.waiting.append(waiting)
        self.moving.append(moving)


def calibrate(group: dist.ProcessGroup) -> list[tuple[Collective, float]]:
    """Time every kind of collective in every size of CALIBRATION_BYTES, with cold caches.

    Returns:
        The collectives and their times in seconds; none for a single rank.
    """
    if group.size() == 1:
        return []
    samples, numbers = [], torch.zeros(TOUCHED)
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
            samples.append((Collective(kind, whole.nbytes), timed(call, group)[1]))
    return samples


def run_step(
    trainable: Trainable, batch: PairBatch, compare: Compare, watch: AbstractContextManager = nullcontext()
) -> tuple[float, LossShare]:
    """Seconds of a training step on one micro batch, and its share of the loss; `watch` covers forward and backward."""
    dist.barrier()
    started = time.perf_counter()
    trainable.zero_gradients()
    with watch:
        [share] = forward_backward(trainable.chunks, [batch], compare, LossConfig())
    trainable.update(read_norms(trainable.squared_norms(), [share])[0][0])
    step_metrics([share], [batch], dist.group.WORLD)
    return time.perf_counter() - started, share


def measure(cfg: RunConfig, steps: int, weights: str | None) -> dict[str, Any]:
    """Measure all steps on this rank.

    Args:
        cfg: configuration of the run; each rank gets its share of the global batch as one micro batch.
        steps: approximate number of batches measured after one warm-up batch; each subset has equally many.
        weights: output directory of a run, or checkpoint, whose weights are loaded; None uses random weights.

    Returns:
        The result, which is the same on every rank. Times in seconds are averaged over ranks; then the smallest of the
        repetitions is taken, and the median over batches. Statistics of the loss are means.
    """
    ranks = process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    stream = build_train_stream(cfg, build_processor(cfg.data, cfg.model), groups.dp.rank(), ranks, pad_to_multiple=1)
    # Read all batches before the first step, because decoding images would compete with the steps for the cores.
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
    # The first REPEATS rows belong to the warm-up batch.
    rows, moving, alone = (_mean_over_ranks(table[REPEATS:]) for table in (rows, moving, alone))
    times, seen = _typical(rows[:, :4]), rows[:, 4:].mean(axis=0)
    result = dict(zip(COLUMNS, [*times.tolist(), *seen.tolist()]))
    calibrated = [collective for collective, _ in samples]
    return result | {
        "received": received_bytes(meter.calls, ranks),
        "subsets": [batch.subset for batch in batches[1:]],
        "collectives": _described(expected, _typical(moving)),
        "calibration": _described(calibrated, _typical(alone)),
    }


def take_evenly(stream: Iterator[StepBuffer], subsets: Sequence[str], steps: int) -> list[PairBatch]:
    """Take one batch of a stream to warm up, then equally many of each subset: at least one, and about `steps` in all.

    Subsets differ in their number of effective negatives, and the order of subsets in the stream depends on the batch
    size. Without equal numbers, different numbers of processes would be compared on different kinds of pairs.
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
    """Measure one batch: the COLUMNS of this rank, and the meter with the collectives."""
    loss = loss_of_subset(cfg, batch.subset)
    meter = Meter()
    metered, _ = run_step(trainable, batch, build_loss(loss, group), meter.watch())
    alone, (_, seen_alone) = run_step(trainable, batch, build_loss(loss, None))
    gathered, (_, seen) = run_step(trainable, batch, build_loss(loss, group))
    similarities = seen_alone.effective_negatives, seen.effective_negatives, seen.hardest_share
    return [alone, gathered, metered, sum(meter.waiting), *(float(x.mean()) for x in similarities)], meter


def _mean_over_ranks(table: list[list[float]]) -> np.ndarray:
    """Average a table over the ranks; returns [rows, columns], the same on every rank."""
    whole = torch.tensor(table, dtype=torch.float64) / dist.get_world_size()
    dist.all_reduce(whole)
    return whole.numpy()


def _typical(seconds: np.ndarray) -> np.ndarray:
    """The median over batches of the fastest repetition: [batches * REPEATS, columns] -> [columns]."""
    batches = len(seconds) // REPEATS
    return np.median(seconds.reshape(batches, REPEATS, seconds.shape[1]).min(axis=1), axis=0)


def _described(collectives: list[Collective], seconds: np.ndarray) -> list[tuple[str, int, float]]:
    """Kind, size in bytes and seconds of each collective, for JSON."""
    return [(call.kind, call.whole, float(time)) for call, time in zip(collectives, seconds)]


def main() -> None:
    """Measure what the request file asks for; the first rank writes the result to the file named there."""
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

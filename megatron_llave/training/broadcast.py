"""Broadcasts the micro batches within a replica, and exchanges their numbers of pairs between replicas.

All tensor-, pipeline- and context-parallel ranks of a replica need the same micro batches. The first of them reads,
decodes and packs them; the others receive the same bytes by broadcast.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.batch import PairBatch, RowsOfRanks, StepBatches, to_device
from megatron_llave.data.step_buffer import StepBuffer, unpack_step
from megatron_llave.distributed.collectives import numbers_of_ranks


def is_reader(groups: ProcessGroupCollection) -> bool:
    """Whether this rank reads the data for its replica."""
    return groups.mp.rank() == 0 and groups.cp.rank() == 0


def broadcast_steps(
    steps: Iterator[StepBuffer] | None, groups: ProcessGroupCollection, device: torch.device
) -> Iterator[StepBatches]:
    """Yield the steps of the reading rank on every rank of its replica.

    A step goes to the first tensor- and pipeline-parallel rank of each context rank, and from there to the others. Each
    rank keeps the part of its context rank alone.

    Args:
        steps: the steps on the reading rank; None on the others.
        groups: the parallel layout.
        device: device of this rank, to which the batches are moved.
    """
    while True:
        yield _next_step(steps, groups, device)


def _next_step(steps: Iterator[StepBuffer] | None, groups: ProcessGroupCollection, device: torch.device) -> StepBatches:
    step = None if steps is None else next(steps).to(device)
    for group in [groups.cp, groups.mp] if groups.mp.rank() == 0 else [groups.mp]:
        step = step if group.size() == 1 else _broadcast(step, group, device)
    unpacked = unpack_step(step)
    if groups.cp.size() == 1:
        return unpacked
    # Copied, so that the pixels of the other parts are freed.
    return replace(unpacked, batches=[batch.part(groups.cp.rank()).map(Tensor.clone) for batch in unpacked.batches])


def _broadcast(step: StepBuffer | None, group: dist.ProcessGroup, device: torch.device) -> StepBuffer:
    source = dist.get_global_rank(group, 0)
    sizes = to_device(torch.tensor([0, 0] if step is None else [step.header.nbytes, step.payload.nbytes]), device)
    dist.broadcast(sizes, source, group=group)
    if step is None:
        shared = StepBuffer(*(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes.tolist()))
    else:
        shared = replace(step, header=to_device(step.header, device))
    for buffer in (shared.header, shared.payload):
        dist.broadcast(buffer, source, group=group)
    return step or shared  # the reader has the header on the CPU, where it is read


def exchange_row_counts(batches: list[PairBatch], group: dist.ProcessGroup) -> None:
    """Tell each micro batch how many pairs, targets and hard negatives those of other ranks have.

    The host waits for this once, at the beginning of the step and not in its middle. All ranks have waited for the end
    of the step before, by which they agree on whether the run goes on (fault_tolerance.StopRequests). So this takes the
    time of one small collective and of what the device does before it, which is to receive the data of the step.
    """
    numbers = [n for batch in batches for n in (batch.num_pairs, batch.num_targets, batch.num_hard_negatives)]
    of_ranks = numbers_of_ranks(group, numbers)
    for batch, *rows in zip(batches, of_ranks[::3], of_ranks[1::3], of_ranks[2::3]):
        batch.of_ranks = RowsOfRanks(*rows)

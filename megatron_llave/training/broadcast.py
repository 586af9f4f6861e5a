"""Broadcasts the micro batches within a replica.

All tensor-, pipeline- and context-parallel ranks of a replica need the same micro batches. The first of them reads,
decodes and packs them; the others receive the same bytes by broadcast.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.batch import StepBatches
from megatron_llave.data.step_buffer import StepBuffer, unpack_step


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
    sizes = torch.tensor([0, 0] if step is None else [step.header.nbytes, step.payload.nbytes], device=device)
    dist.broadcast(sizes, source, group=group)
    if step is None:
        step = StepBuffer(*(torch.empty(size, dtype=torch.uint8, device=device) for size in sizes.tolist()))
    else:
        step = StepBuffer(step.header.to(device), step.payload)
    for buffer in (step.header, step.payload):
        dist.broadcast(buffer, source, group=group)
    return step

"""Broadcasts the micro batches within a replica.

All tensor- and pipeline-parallel ranks of a replica need the same micro batches. The first of them reads, decodes and
packs them; the others receive the same bytes by broadcast.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_llave.batch import StepBatches
from megatron_llave.data.step_buffer import StepBuffer, unpack_step


def is_reader(group: dist.ProcessGroup) -> bool:
    """Whether this rank reads the data for the model-parallel ranks in `group`."""
    return group.rank() == 0


def broadcast_steps(
    steps: Iterator[StepBuffer] | None, group: dist.ProcessGroup, device: torch.device
) -> Iterator[StepBatches]:
    """Yield the steps of the reading rank on every rank of `group`.

    Args:
        steps: the steps on the reading rank; None on the others.
        group: the model-parallel ranks of one replica.
        device: device of this rank, to which the batches are moved.
    """
    while True:
        step = None if steps is None else next(steps).to(device)
        yield unpack_step(step if group.size() == 1 else _broadcast(step, group, device))


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

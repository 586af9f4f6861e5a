"""Broadcasts the micro batches within a replica, and exchanges their numbers of pairs between replicas.

All tensor-, pipeline- and context-parallel ranks of a replica need the same micro batches. The first of them reads,
decodes and packs them; the others receive them. With a token budget the pipeline stages after the first get no pixels.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.batch import PairBatch, RowsOfRanks, StepBatches, to_device
from megatron_llave.data.step_buffer import StepBuffer, pack_step, unpack_step
from megatron_llave.distributed.collectives import from_all_ranks, numbers_of_ranks
from megatron_llave.training.micro_batches import MicroBatches


def is_reader(groups: ProcessGroupCollection) -> bool:
    """Whether this rank reads the data for its replica."""
    return groups.mp.rank() == 0 and groups.cp.rank() == 0


def broadcast_steps(
    steps: Iterator[StepBuffer] | None,
    groups: ProcessGroupCollection,
    device: torch.device,
    are_single: bool = False,
) -> Iterator[StepBatches]:
    """Yield the steps of the reading rank on every rank of its replica.

    A step goes to the first tensor- and pipeline-parallel rank of each context rank, and from there to the others. Each
    rank keeps the part of its context rank alone.

    Args:
        steps: the steps on the reading rank; None on the others.
        groups: the parallel layout.
        device: device of this rank, to which the batches are moved.
        are_single: whether each buffer has a single micro batch, with train.tokens_per_micro_batch. Then `batches` are
            MicroBatches, and each pipeline stage receives the next one when its pass over the step comes to it.
    """
    if not are_single:
        while True:
            step = None if steps is None else next(steps).to(device)
            yield _shared(step, [groups.cp, groups.mp] if groups.mp.rank() == 0 else [groups.mp], groups.cp, device)
    singles = _single_batches(steps, groups, device)
    for first in singles:
        waiting, first.batches = first.batches, []
        subset = waiting[0].subset

        def receive(waiting: list[PairBatch] = waiting) -> PairBatch:
            return waiting.pop() if waiting else next(singles).batches.pop()

        yield replace(first, batches=MicroBatches(first.count, first.longest, subset, receive))


def _single_batches(
    steps: Iterator[StepBuffer] | None, groups: ProcessGroupCollection, device: torch.device
) -> Iterator[StepBatches]:
    """Yield the micro batches of the reading rank on every rank of its replica; later pipeline stages have no pixels.

    The ranks of a stage receive a micro batch together, the stages do not: while one waits for hidden states, the
    stages before it go on. So the reading rank sends without waiting, over a gloo group of its own.
    """
    stages = _groups_of_stages(groups)
    sent: deque[tuple[list[dist.Work], StepBuffer]] = deque()
    is_first = groups.tp.rank() == 0 and groups.cp.rank() == 0
    while True:
        step = None
        if steps is not None:
            step = next(steps)
            if stages is not None:
                sent.append(_send(_without_pixels(step), stages))
            # The stages are fewer micro batches apart than there are stages.
            if len(sent) > 2 * groups.pp.size():
                for work in sent.popleft()[0]:
                    work.wait()
            step = step.to(device)
        elif is_first:
            step = _receive(stages).to(device)
        yield _shared(step, [groups.cp, groups.tp] if groups.tp.rank() == 0 else [groups.tp], groups.cp, device)


def _groups_of_stages(groups: ProcessGroupCollection) -> dist.ProcessGroup | None:
    """Return a new gloo group of the ranks that differ from this one in the pipeline stage alone; None: one stage.

    All processes call this.
    """
    if groups.pp.size() == 1:
        return None
    of_ranks = from_all_ranks([tuple(dist.get_process_group_ranks(groups.pp))])
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in dict.fromkeys(of_ranks)], backend="gloo")[0]


def _without_pixels(step: StepBuffer) -> StepBuffer:
    unpacked = unpack_step(step)
    rows = [replace(batch.sequences, tiles=batch.sequences.tiles[:0]) for batch in unpacked.batches]
    batches = [replace(batch, sequences=row) for batch, row in zip(unpacked.batches, rows)]
    return pack_step(replace(unpacked, batches=batches))


def _send(step: StepBuffer, group: dist.ProcessGroup) -> tuple[list[dist.Work], StepBuffer]:
    """Begin to send a buffer to all other ranks of a group of CPU tensors; returns what is to be kept until it ends."""
    parts = [torch.tensor([step.header.nbytes, step.payload.nbytes]), step.header, step.payload]
    others = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    return [dist.isend(part, rank, group=group) for rank in others for part in parts], step


def _receive(group: dist.ProcessGroup) -> StepBuffer:
    """Receive what the first rank of a group sends."""
    source, sizes = dist.get_global_rank(group, 0), torch.empty(2, dtype=torch.int64)
    dist.recv(sizes, source, group=group)
    step = StepBuffer(*(torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()))
    for part in (step.header, step.payload):
        dist.recv(part, source, group=group)
    return step


def _shared(
    step: StepBuffer | None, along: list[dist.ProcessGroup], context: dist.ProcessGroup, device: torch.device
) -> StepBatches:
    """Broadcast a buffer along these groups, one after the other, and keep the part of this context rank."""
    for group in along:
        step = step if group.size() == 1 else _broadcast(step, group, device)
    unpacked = unpack_step(step)
    if context.size() == 1:
        return unpacked
    # Copied, so that the pixels of the other parts are freed.
    return replace(unpacked, batches=[batch.part(context.rank()).map(Tensor.clone) for batch in unpacked.batches])


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
    time of one small collective and of what the device does before it, which is to receive the data of the step. Micro
    batches that come one after the other are not known yet: the loss exchanges their sums.
    """
    if not batches:
        return
    numbers = [n for batch in batches for n in (batch.num_pairs, batch.num_targets, batch.num_hard_negatives)]
    of_ranks = numbers_of_ranks(group, numbers)
    for batch, *rows in zip(batches, of_ranks[::3], of_ranks[1::3], of_ranks[2::3]):
        batch.of_ranks = RowsOfRanks(*rows)

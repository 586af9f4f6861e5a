"""Agreement of all ranks on a value, and collectives over rows whose numbers may differ between ranks."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import to_device
from megatron_llave.distributed.process_groups import device

Result = TypeVar("Result")


def from_first_rank(make: Callable[[], Result]) -> Result:
    """Call `make` on the first rank and return its result on all ranks.

    For what may differ between ranks, such as a folder on a network file system. An error is raised on the first rank
    alone. The result is pickled.
    """
    results = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(results, src=0, device=device())
    return results[0]


def from_all_ranks(items: list[Result]) -> list[Result]:
    """Concatenate the lists of all ranks, rank by rank; the items are pickled."""
    gathered = [items] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def largest_of_ranks(*values: int) -> list[int]:
    """The largest value that any rank has given, for each of the values; all ranks call it and get the same result."""
    if dist.get_world_size() == 1:
        return list(map(int, values))
    largest = to_device(torch.tensor(values, dtype=torch.int64), device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def row_counts(group: dist.ProcessGroup | None, *rows: Tensor) -> list[list[int]]:
    """Number of rows of each rank of the group, in rank order, one list per tensor; one collective for all tensors."""
    return numbers_of_ranks(group, [len(x) for x in rows])


def numbers_of_ranks(group: dist.ProcessGroup | None, numbers: list[int]) -> list[list[int]]:
    """Each number on every rank of the group, in rank order; one list per number, one collective for all of them."""
    if group is None or group.size() == 1:
        return [[number] for number in numbers]
    local = to_device(torch.tensor([numbers], dtype=torch.int64), device())
    gathered = local.new_empty(group.size(), len(numbers))
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered.T.tolist()


def all_gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, without a gradient.

    Args:
        rows: [counts[rank], ...] of this rank.
        counts: number of rows of each rank, from `row_counts`.
        group: ranks to gather over. With None, a single rank, or no row on any of them `rows` is returned.

    Returns:
        [sum(counts), ...] in rank order.
    """
    if group is None or group.size() == 1 or not any(counts):
        return rows
    longest = max(counts)
    padding = rows.new_zeros((longest - rows.shape[0], *rows.shape[1:]))
    gathered = rows.new_empty((group.size() * longest, *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, torch.cat([rows.detach(), padding]), group=group)
    if min(counts) == longest:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts)])


def reduce_scatter_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sum `rows` [sum(counts), ...] over the ranks and keep this rank's part; the adjoint of all_gather_rows."""
    if group is None or group.size() == 1 or not any(counts):
        return rows
    longest = max(counts)
    if min(counts) != longest:
        parts = [torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])]) for part in rows.split(counts)]
        rows = torch.cat(parts)
    kept = rows.new_empty((longest, *rows.shape[1:]))
    dist.reduce_scatter_tensor(kept, rows.contiguous(), group=group)
    return kept[: counts[group.rank()]]

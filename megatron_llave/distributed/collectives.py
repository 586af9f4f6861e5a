"""Collectives over rows of tensors; the numbers of rows may differ between ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def row_counts(group: dist.ProcessGroup | None, *rows: Tensor) -> list[list[int]]:
    """For each tensor, the number of rows that each rank of the group holds, in rank order; one collective for all."""
    if group is None or group.size() == 1:
        return [[len(x)] for x in rows]
    own = torch.tensor([[len(x) for x in rows]], device=rows[0].device)
    counts = own.new_empty(group.size(), len(rows))
    dist.all_gather_into_tensor(counts, own, group=group)
    return counts.T.tolist()


def all_gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, without a gradient.

    Args:
        rows: [counts[rank], ...] this rank's rows; the numbers may differ between ranks.
        counts: rows per rank, from `row_counts`.
        group: ranks to gather over; None, a single rank, or no row on any of them returns `rows`.

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
    """Sum [sum(counts), ...] over the ranks and keep this rank's rows; the adjoint of all_gather_rows."""
    if group is None or group.size() == 1 or not any(counts):
        return rows
    longest, own = max(counts), counts[group.rank()]
    if min(counts) != longest:
        parts = [torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])]) for part in rows.split(counts)]
        rows = torch.cat(parts)
    kept = rows.new_empty((longest, *rows.shape[1:]))
    dist.reduce_scatter_tensor(kept, rows.contiguous(), group=group)
    return kept[:own]

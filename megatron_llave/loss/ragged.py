"""Values of which each row has another number, such as the targets of a query."""

import torch
from torch import Tensor


def pad_rows(values: Tensor, rows: Tensor, num_rows: int, fill: float) -> Tensor:
    """Put the values of each row beside each other.

    Args:
        values: [n], with a gradient or without.
        rows: [n] int64 row of each value, not falling.
        num_rows: number of rows; some may have no value.
        fill: what fills the rows up.

    Returns:
        [num_rows, k] where k is the largest number of values that a row has, and at least 1.
    """
    counts = torch.bincount(rows, minlength=num_rows)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = max(1, int(counts.max())) if num_rows else 1
    return values.new_full((num_rows, width), fill).index_put((rows, place), values)


def mean_of_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] mean of the values [n] of each row, which are as for `pad_rows`; NaN for a row without values."""
    return pad_rows(values, rows, num_rows, 0.0).sum(1) / torch.bincount(rows, minlength=num_rows)

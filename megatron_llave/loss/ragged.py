"""Values of which each row has another number, such as the targets of a query."""

import torch
from torch import Tensor


def row_starts(rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows + 1] int64: the values of row i are starts[i] to starts[i + 1] - 1; `rows` are as for `pad_rows`."""
    return torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))


def pad_rows(values: Tensor, rows: Tensor, num_rows: int, fill: float, most: int | None = None) -> Tensor:
    """Put the values of each row beside each other.

    Args:
        values: [n], with a gradient or without.
        rows: [n] int64 row of each value, not falling.
        num_rows: number of rows; some may have no value.
        fill: what fills the rows up.
        most: the largest number of values that a row has; None: it is found here, and the host waits for the device.

    Returns:
        [num_rows, k] where k is `most`, and at least 1.
    """
    starts = row_starts(rows, num_rows)
    if most is None:
        most = int(starts.diff().max()) if num_rows else 0
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    return values.new_full((num_rows, max(1, most)), fill).index_put((rows, place), values)


def mean_of_rows(values: Tensor, rows: Tensor, num_rows: int, most: int | None = None) -> Tensor:
    """[num_rows] mean of the values [n] of each row; the arguments are those of `pad_rows`. NaN without values."""
    return pad_rows(values, rows, num_rows, 0.0, most).sum(1) / row_starts(rows, num_rows).diff()

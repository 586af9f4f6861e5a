"""Statistics of cosine similarities that training and evaluation share."""

import torch
from torch import Tensor

HISTOGRAM_BINS = 50
"""Of the histograms of similarities that are drawn and written, and of those that an overlap is read off."""


def cosine_counts(cosines: Tensor) -> list[int]:
    """How many of [n] cosines lie in each of HISTOGRAM_BINS equal bins from -1 to 1; what is not finite in none."""
    finite = cosines[cosines.isfinite()].double().clamp(-1, 1)  # a cosine may be a rounding beyond 1
    return torch.histc(finite, HISTOGRAM_BINS, -1, 1).int().tolist()


def overlap_coefficient(a: Tensor, b: Tensor, bins: int = HISTOGRAM_BINS) -> float:
    """Area shared by the histograms of two samples, each of area 1: 0 for separate samples, 1 for equal histograms.

    Both use `bins` equal bins from the smallest to the largest value of the two; values that are not finite (a hardest
    negative where there is none) are left out, and without any value in a sample the overlap is 0. Between the
    similarities of positives and hardest negatives it is the paper's sign of a model that cannot tell them apart.
    """
    a, b = (x.detach().double().cpu() for x in (a, b))
    a, b = a[a.isfinite()], b[b.isfinite()]
    if len(a) == 0 or len(b) == 0:
        return 0.0
    low, high = (float(f(torch.cat([a, b]))) for f in (torch.amin, torch.amax))
    if low == high:
        return 1.0
    shares = [torch.histc(x, bins, low, high) / len(x) for x in (a, b)]
    return float(torch.minimum(*shares).sum())

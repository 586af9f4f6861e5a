"""Statistics of cosine similarities that training and evaluation share."""

import math

import torch
from torch import Tensor

HISTOGRAM_BINS = 50
"""Number of bins of the histograms of similarities, both of those that are written and of `overlap_coefficient`."""


def cosine_counts(cosines: Tensor) -> list[int]:
    """Count [n] cosines in HISTOGRAM_BINS equal bins from -1 to 1; values that are not finite are left out."""
    finite = cosines[cosines.isfinite()].double().clamp(-1, 1)  # rounding may bring a cosine beyond 1
    return torch.histc(finite, HISTOGRAM_BINS, -1, 1).int().tolist()


def overlap_coefficient(a: Tensor, b: Tensor, bins: int = HISTOGRAM_BINS) -> float:
    """Area shared by the histograms of two samples, each of area 1: 0 for separate samples, 1 for equal histograms.

    Both histograms have `bins` equal bins from the smallest to the largest value of the two samples. Values that are
    not finite (the hardest negative of a query without negatives) are left out, and the overlap with an empty sample is
    0. A large overlap of the similarities of positives and hardest negatives is the paper's sign of a model that cannot
    tell them apart. A small one is no sign of success, because the positives may be the lower ones: see `order_auc`.
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


def order_auc(positive: Tensor, hardest: Tensor) -> float:
    """Probability that the cosine of a random query's positive is above that of a random query's hardest negative.

    This is the area under the ROC curve of the two samples [n]: 1 where every positive is above every hardest negative,
    0.5 where the samples do not differ in rank, 0 where every positive is below. Equal cosines count one half. Values
    that are not finite are left out, and the result for an empty sample is NaN.
    """
    positive, hardest = (x.detach()[x.isfinite()].double().cpu() for x in (positive, hardest))
    if len(positive) == 0 or len(hardest) == 0:
        return math.nan
    ordered = hardest.sort().values
    below, not_above = (torch.searchsorted(ordered, positive, right=is_right) for is_right in (False, True))
    return float((below + not_above).double().mean()) / (2 * len(ordered))


def mean_margin(positive: Tensor, hardest: Tensor) -> float:
    """Mean of each query's positive minus its own hardest negative, [n] cosines each; NaN if no query has both.

    It is below 0 where the hardest negatives are the more similar ones on average.
    """
    margins = (positive - hardest).detach().double()
    margins = margins[margins.isfinite()]
    return float(margins.mean()) if len(margins) else math.nan

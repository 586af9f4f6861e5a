"""Paired statistics of two variants, seed by seed. Pure functions of numbers.

A seed sets the random weights and the order of the data, so that two runs with one seed share both. The difference of
such a pair varies less than the runs do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9999
CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
MOST_EXACT = 14
"""Largest number of pairs for which all 2 ** n choices of signs are tried."""
FEWEST_FOR_TEST = 6
"""Smallest number of pairs for which the test can be significant: its least p-value is 2 / 2 ** 6 = 0.031."""


@dataclass(frozen=True)
class Comparison:
    """The differences between a variant and the reference over the seeds that both have."""

    differences: tuple[float, ...]
    """Variant minus reference, in the order of the seeds."""
    mean: float
    low: float
    """Lower end of the 95 % bootstrap interval of the mean."""
    high: float
    """Upper end of that interval."""
    p_value: float
    """Two-sided p-value of the test that flips the signs of the differences; exact up to MOST_EXACT pairs."""

    @property
    def verdict(self) -> str:
        """The conclusion in words."""
        excludes_zero = self.low > 0 or self.high < 0
        direction, count = "higher" if self.mean > 0 else "lower", len(self.differences)
        if excludes_zero and count < FEWEST_FOR_TEST:
            return f"{direction}, but {count} seeds are too few for a test"
        return direction if excludes_zero and self.p_value < SIGNIFICANCE else "no difference shown"


def compare(variant: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """Compare a variant with the reference, seed by seed.

    Args:
        variant: seed -> value.
        reference: seed -> value.

    Returns:
        The comparison over the seeds that have finite values in both; None with fewer than two such seeds.
    """
    seeds = sorted(seed for seed in variant.keys() & reference.keys() if math.isfinite(variant[seed] - reference[seed]))
    if len(seeds) < 2:
        return None
    differences = np.array([variant[seed] - reference[seed] for seed in seeds])
    low, high = bootstrap_interval(differences)
    return Comparison(tuple(differences.tolist()), float(differences.mean()), low, high, sign_flip_test(differences))


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of [n] values, n at least 2. It is somewhat narrow for n below 10."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def sign_flip_test(differences: np.ndarray) -> float:
    """Two-sided p-value of [n] paired differences under the hypothesis that the sign of each is random."""
    if not differences.any():
        return 1.0
    resamples = np.inf if len(differences) <= MOST_EXACT else RESAMPLES
    result = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, alternative="two-sided", rng=0
    )
    return float(result.pvalue)

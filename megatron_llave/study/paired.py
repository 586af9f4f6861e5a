"""Paired statistics: two arms that differ in one thing, seed by seed. Pure functions of numbers.

An arm's seed sets its random weights and the order of its data, so that two runs of one seed share both: the difference
of a pair varies less than the runs do.
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
"""Pairs up to which every choice of signs is tried (2 ** 14)."""
FEWEST_FOR_TEST = 6
"""Pairs from which on the test of signs can be significant at all: 2 / 2 ** 6 = 0.031."""


@dataclass(frozen=True)
class Comparison:
    """The differences between an arm and the reference over the seeds that both have."""

    differences: tuple[float, ...]
    """Arm minus reference, in the order of the seeds."""
    mean: float
    low: float
    """Of the bootstrap interval for the mean, 95 %."""
    high: float
    p_value: float
    """Two-sided, of the test that flips the signs of the differences; exact up to MOST_EXACT pairs."""

    @property
    def verdict(self) -> str:
        """What may be said of it in words."""
        excludes_zero = self.low > 0 or self.high < 0
        direction, count = "higher" if self.mean > 0 else "lower", len(self.differences)
        if excludes_zero and count < FEWEST_FOR_TEST:
            return f"{direction}, but {count} seeds are too few for a test"
        return direction if excludes_zero and self.p_value < SIGNIFICANCE else "no difference shown"


def compare(arm: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """Compare by seed.

    Args:
        arm: seed -> value.
        reference: likewise.

    Returns:
        Over the seeds in both whose values are finite; None where fewer than two are left.
    """
    seeds = sorted(seed for seed in arm.keys() & reference.keys() if math.isfinite(arm[seed] - reference[seed]))
    if len(seeds) < 2:
        return None
    differences = np.array([arm[seed] - reference[seed] for seed in seeds])
    low, high = bootstrap_interval(differences)
    return Comparison(tuple(differences.tolist()), float(differences.mean()), low, high, sign_flip_test(differences))


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of [n] values, n at least 2. It is somewhat narrow for n below 10."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def sign_flip_test(differences: np.ndarray) -> float:
    """Two-sided p-value of [n] paired differences, were the sign of each a coin's."""
    if not differences.any():
        return 1.0
    resamples = np.inf if len(differences) <= MOST_EXACT else RESAMPLES
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, alternative="two-sided", rng=0
    )
    return float(found.pvalue)

"""Paired statistics against hand-worked values and the textbook's enumeration."""

from itertools import product

import numpy as np
import pytest

from megatron_llave.study.paired import bootstrap_interval, compare, sign_flip_test


def test_seeds_are_paired_and_those_without_a_partner_left_out() -> None:
    found = compare({0: 3.0, 1: 5.0, 2: float("nan"), 7: 1.0}, {1: 4.0, 0: 1.0, 2: 0.0, 9: 5.0})
    assert found.differences == (2.0, 1.0) and found.mean == 1.5
    assert compare({0: 1.0}, {0: 2.0}) is None
    assert compare({0: 1.0, 1: 2.0}, {2: 1.0, 3: 2.0}) is None


def test_sign_flips_are_enumerated() -> None:
    differences = np.array([1.0, 2.0, -0.5, 3.0, 0.25, 1.5])
    means = [np.mean(differences * signs) for signs in product((1, -1), repeat=6)]
    expected = np.mean(np.abs(means) >= differences.mean() - 1e-12)
    assert sign_flip_test(differences) == pytest.approx(expected)
    assert sign_flip_test(np.ones(8)) == pytest.approx(2 / 2**8)
    assert sign_flip_test(np.zeros(4)) == 1.0


def test_interval_is_the_bootstrap_quantiles_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(1.0, 2.0, 12)
    means = np.random.default_rng(2).choice(values, (20000, 12)).mean(1)
    assert bootstrap_interval(values) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.05)
    assert bootstrap_interval(values) == bootstrap_interval(values)  # the same every time
    assert bootstrap_interval(np.full(3, 2.0)) == (2.0, 2.0)
    assert bootstrap_interval(np.array([1.0, 2.0, 4.0])) == (1.0, 4.0)  # of three the interval is their range


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 2.0, 1.5, 0.5, 3.0, 1.2, 0.9, 2.2], "higher"),
        ([-1.0, -2.0, -1.5, -0.5, -3.0, -1.2], "lower"),
        ([1.0, 2.0, 1.5], "higher, but 3 seeds are too few for a test"),
        ([1.0, -2.0, 1.5], "no difference shown"),
        ([5.0, -4.0, 3.0, -2.0, 1.0, -1.0, 0.5, -0.2], "no difference shown"),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "no difference shown"),
    ],
)
def test_verdicts(differences: list[float], verdict: str) -> None:
    variant = dict(enumerate(differences))
    assert compare(variant, dict.fromkeys(variant, 0.0)).verdict == verdict


def test_noise_alone_is_seldom_called_a_difference() -> None:
    """Of 200 comparisons of equal variants about 5 in 100 may be, and with three seeds none."""
    rng = np.random.default_rng(0)

    def share(seeds: int) -> float:
        found = [compare(dict(enumerate(rng.normal(size=seeds))), dict.fromkeys(range(seeds), 0.0)) for _ in range(200)]
        return np.mean([one.verdict in ("higher", "lower") for one in found])

    assert share(8) <= 0.1
    assert share(3) == 0.0

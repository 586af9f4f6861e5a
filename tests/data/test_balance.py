"""Dealing pairs to micro batches: every pair once, and never far from the best that can be done."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llave.data.balance import balance_micro_batches, fill_micro_batches


def longest(lengths, parts):
    return max(sum(lengths[i] for i in part) for part in parts)


def in_order(lengths, count):
    """Equal numbers of pairs, as they come."""
    size = len(lengths) // count
    return [range(i * size, (i + 1) * size) for i in range(count)]


def best(lengths, count):
    """Length of the longest micro batch when every way to deal is tried."""
    ways = itertools.product(range(count), repeat=len(lengths))
    return min(longest(lengths, [[i for i, m in enumerate(way) if m == n] for n in range(count)]) for way in ways)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 12))
def test_every_pair_is_dealt_once_and_keeps_its_order(lengths, count):
    parts = balance_micro_batches(lengths, count)
    assert len(parts) == count
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    assert sum(not part for part in parts) == max(0, count - len(lengths))
    assert balance_micro_batches(lengths, count) == parts


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 8).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, 6))), st.data())
def test_never_longer_than_in_order(sizes, data):
    count, per_batch = sizes
    lengths = data.draw(st.lists(st.integers(1, 5000), min_size=count * per_batch, max_size=count * per_batch))
    assert longest(lengths, balance_micro_batches(lengths, count)) <= longest(lengths, in_order(lengths, count))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_within_the_bound_of_longest_first(lengths, count):
    bound = 4 / 3 - 1 / (3 * count)
    assert longest(lengths, balance_micro_batches(lengths, count)) <= bound * best(lengths, count) + 1e-9


@pytest.mark.parametrize(
    ("lengths", "count", "expected"),
    [
        ([1, 2, 3, 10], 2, [[3], [0, 1, 2]]),
        ([5, 9, 5, 1], 1, [[0, 1, 2, 3]]),
        ([7, 7, 7, 7], 2, [[0, 2], [1, 3]]),
        ([4, 8], 3, [[1], [0], []]),
        # Longest first alone would make 52 and 70 of these.
        ([30, 30, 1, 20, 20, 21], 2, [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_known_deals(lengths, count, expected):
    assert balance_micro_batches(lengths, count) == expected


@given(st.lists(st.floats(0, 100) | st.integers(1, 100), max_size=60))
@settings(max_examples=100, deadline=None)
def test_micro_batches_by_a_budget_are_full_before_another_begins(costs):
    filled = fill_micro_batches(costs, 100)
    assert sorted(position for positions in filled for position in positions) == list(range(len(costs)))
    assert all(positions == sorted(positions) for positions in filled)
    sums = [sum(costs[i] for i in positions) for positions in filled]
    assert max(sums) <= 100 + 1e-9
    for number, positions in enumerate(filled):  # nothing fits into an earlier one
        assert all(before + costs[i] > 100 - 1e-9 for before in sums[:number] for i in positions)


def test_a_budget_that_can_be_filled_exactly_and_a_step_without_pairs():
    assert fill_micro_batches([30, 50, 20, 70, 30], 100) == [[0, 3], [1, 2, 4]]
    assert fill_micro_batches([], 100) == [[]]

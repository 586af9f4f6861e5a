"""Distributes a rank's pairs over its micro batches: over a given number of them, or by a budget of tokens.

The longest micro batch determines the memory that a step needs, and in a pipeline the others wait for it. This is done
only when the loss does not depend on the micro batch that a pair is in (`loss.negatives: global_batch` or `own`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def balance_micro_batches(lengths: Sequence[int], num_micro_batches: int) -> list[list[int]]:
    """Return for each micro batch the positions of its pairs in `lengths`, in rising order.

    Pairs are taken from the longest to the shortest, and each goes to the micro batch with the fewest tokens so far.
    The longest of M micro batches is then at most 4/3 - 1/(3 M) times as long as the best possible one (Graham 1969).
    When equal numbers of pairs in their original order give a shorter longest micro batch, those are returned.

    Args:
        lengths: length of each pair in tokens, all positive.
        num_micro_batches: number of micro batches; none is empty if there are at least as many pairs.
    """
    totals = [0] * num_micro_batches
    micro_batches: list[list[int]] = [[] for _ in totals]
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fewest = totals.index(min(totals))
        micro_batches[fewest].append(position)
        totals[fewest] += lengths[position]
    greedy = [sorted(positions) for positions in micro_batches]
    even = [positions.tolist() for positions in np.array_split(np.arange(len(lengths)), num_micro_batches)]
    return min(greedy, even, key=lambda split: max(sum(lengths[i] for i in positions) for positions in split))


@dataclass(frozen=True)
class TokenBudget:
    """How much a micro batch may hold."""

    tokens: int
    """train.tokens_per_micro_batch."""
    tile_tokens: float
    """Number of tokens that need as much memory as a tile does in the vision encoder, beside its visual tokens."""

    def cost(self, length: int, tiles: int) -> float:
        """Return what a pair of `length` tokens, visual ones included, and `tiles` tiles takes of it, in tokens."""
        return length + self.tile_tokens * tiles


def fill_micro_batches(costs: Sequence[float], budget: float) -> list[list[int]]:
    """Return for each micro batch the positions of its pairs in `costs`, in rising order; there is at least one.

    Pairs are taken from the largest to the smallest, and each goes to the first micro batch that has room for it (first
    fit decreasing). So all but the last ones are nearly full, and there are at most 11/9 n + 6/9 of them where n would
    do (Dosa 2007).

    Args:
        costs: of each pair, none above the budget.
        budget: the largest sum of a micro batch.
    """
    rooms, micro_batches = [budget], [[]]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
        cost = costs[position]
        first = next((i for i, room in enumerate(rooms) if cost <= room), len(rooms))
        if first == len(rooms):
            rooms.append(budget)
            micro_batches.append([])
        rooms[first] -= cost
        micro_batches[first].append(position)
    return [sorted(positions) for positions in micro_batches]

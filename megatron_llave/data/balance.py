"""Distributes a rank's pairs over its micro batches, so that no micro batch is much longer than the others.

The longest micro batch determines the memory that a step needs, and in a pipeline the others wait for it. This is done
only when the loss does not depend on the micro batch that a pair is in: `loss.negatives: global_batch`.
"""

from collections.abc import Sequence

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

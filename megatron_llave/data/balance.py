"""Which pairs of a rank's step go into which of its micro batches, so that none is much longer than the others.

The longest micro batch sets the memory a step needs, and the others wait for it in a pipeline. Only where the loss does
not depend on the micro batch a pair falls into: `loss.negatives: global_batch`.
"""

from collections.abc import Sequence

import numpy as np


def balance_micro_batches(lengths: Sequence[int], num_micro_batches: int) -> list[list[int]]:
    """Positions in `lengths` (positive, tokens) of each micro batch, rising; none is empty if there are enough.

    Longest first, each to the micro batch with the fewest tokens so far: the longest micro batch is at most
    4/3 - 1/(3 M) times as long as need be (Graham 1969). Where equal numbers in the order given come out shorter,
    they are taken.
    """
    totals = [0] * num_micro_batches
    parts: list[list[int]] = [[] for _ in totals]
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fewest = totals.index(min(totals))
        parts[fewest].append(position)
        totals[fewest] += lengths[position]
    greedy = [sorted(part) for part in parts]
    even = [part.tolist() for part in np.array_split(np.arange(len(lengths)), num_micro_batches)]
    return min(greedy, even, key=lambda dealt: max(sum(lengths[i] for i in part) for part in dealt))

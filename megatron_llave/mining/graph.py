"""The graph of pairs that are hard for each other, from the ranks of targets for queries (B3, arXiv 2505.11293)."""

from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array, csr_array

from megatron_llave.config.mining import Grouping
from megatron_llave.mining.inputs import SubsetInputs
from megatron_llave.mining.neighbours import Neighbours


def rank_graph(inputs: SubsetInputs, found: Iterable[Neighbours], grouping: Grouping) -> csr_array:
    """Connect each pair with one pair of each target at the ranks skip + 1 to skip + take of its query.

    A target of several pairs stands for one of them, which its number and that of the asking pair choose, so that the
    connections of a frequent target are spread over its pairs.

    Args:
        inputs: the subset.
        found: the first skip + take targets of every query.
        grouping: skip and take.

    Returns:
        [N, N] int32 symmetric graph of all pairs of the subset's shards, without connections of a pair with itself. A
        connection weighs as much as the number of times that one pair has found the other: 1, or 2 where each has found
        the other. Pairs that cannot be used have no connection.
    """
    num_pairs = sum(shard.pairs for shard in inputs.shards)
    pair, query, target = inputs.members.T
    by_target = np.argsort(target, kind="stable")
    first = np.searchsorted(target[by_target], np.arange(len(inputs.target_ids) + 1))
    asking = np.unique(inputs.members[:, 1::-1], axis=0)  # [pairs that can be used, 2] query and pair, by query
    first_asking = np.searchsorted(asking[:, 0], np.arange(len(inputs.query_ids) + 1))
    rows, columns = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for block in found:
        of_block = asking[first_asking[block.rows.start] : first_asking[block.rows.stop]]
        wanted = block.targets[of_block[:, 0] - block.rows.start, grouping.skip : grouping.skip + grouping.take]
        row, place = (wanted >= 0).nonzero()
        found_targets, from_pairs = wanted[row, place], of_block[row, 1]
        counts = first[found_targets + 1] - first[found_targets]
        chosen = by_target[first[found_targets] + (from_pairs + found_targets) % counts]
        rows.append(from_pairs.astype(np.int32))
        columns.append(pair[chosen].astype(np.int32))
    row, column = np.concatenate(rows), np.concatenate(columns)
    apart = row != column
    row, column = row[apart], column[apart]
    directed = coo_array((np.ones(len(row), np.int32), (row, column)), shape=(num_pairs, num_pairs)).tocsr()
    return (directed + directed.T).tocsr()

"""The nearest targets of every query of a subset, exactly or approximately, with the targets spread over all ranks.

What is found is the same on all ranks, and equal similarities are ordered by the number of the target
(evaluation/ranking.py). What the exact search finds is also the same at any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import to_device
from megatron_llave.config.mining import Search
from megatron_llave.data.stored_vectors import StoredVectors, query_name, target_name
from megatron_llave.distributed.process_groups import device
from megatron_llave.evaluation.ranking import paired_similarities, rank_found, search
from megatron_llave.mining.approximate import ListIndex
from megatron_llave.mining.inputs import SubsetInputs
from megatron_llave.mining.rules import Positives

QUERIES_PER_BLOCK = 4096
"""Number of queries whose candidates are in memory at a time."""
QUERIES_OF_RECALL = 1000
"""The most queries that the approximate search is compared with the exact one on."""
MOST_RESIDENT = 2**32
"""Bytes up to which a rank's part of the targets stays on the device; a larger part is read for each 1024 queries."""


class StoredRows:
    """Rows of stored embeddings that are read when they are asked for, as [n, d] float32 of unit length."""

    def __init__(self, vectors: StoredVectors, names: list[str]) -> None:
        """Find the rows of these names.

        Raises:
            DataError: a name has no embedding.
        """
        self.vectors, self.names, self.places = vectors, names, vectors.find(names)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.places)

    def __getitem__(self, index: slice | np.ndarray) -> Tensor:
        """The rows of a slice, or with these numbers [n] int64, on this rank's device."""
        names = self.names[index] if isinstance(index, slice) else [self.names[number] for number in index]
        return to_device(self.vectors.rows_at(self.places[index], names), device())


@dataclass(frozen=True)
class Neighbours:
    """The nearest targets of a block of n queries."""

    rows: slice
    """The queries."""
    targets: np.ndarray
    """[n, k] int64 numbers of targets, best first; -1 behind the last. Hidden ones are not among them."""
    similarity: np.ndarray
    """[n, k] float32; -inf behind the last."""
    positives: Positives


class NearestTargets:
    """The `depth` nearest targets of each query, without those that it must not be given (inputs.hidden).

    Making one and iterating over it are collectives over all ranks. It yields the queries block by block, in their
    order.
    """

    def __init__(self, inputs: SubsetInputs, vectors: StoredVectors, depth: int, how: Search = Search()) -> None:
        """Find the embeddings; of an approximate search, make the index and measure the recall.

        Raises:
            DataError: `vectors` lack a query or target.
            ConfigError: FAISS is asked for and cannot be imported.
        """
        world, c = dist.group.WORLD, len(inputs.target_ids)
        self._inputs, self._depth = inputs, min(depth, c)
        self._queries = StoredRows(vectors, [query_name(inputs.name, name) for name in inputs.query_ids])
        self._targets = StoredRows(vectors, [target_name(inputs.name, name) for name in inputs.target_ids])
        self._first, last = (c * rank // world.size() for rank in (world.rank(), world.rank() + 1))
        self._mine: StoredRows | Tensor = StoredRows(vectors, self._targets.names[self._first : last])
        self._index = None
        self.recall: float | None = None
        """Mean share of a query's nearest targets that the search finds, on a sample of queries; None: all, exactly."""
        if how.kind == "faiss":
            self._index = ListIndex(self._targets, self._first, last, how.probes)
            self.recall = self._measure_recall()
        elif len(self._mine) * vectors.width * 4 <= MOST_RESIDENT:
            self._mine = self._mine[:]

    def __iter__(self) -> Iterator[Neighbours]:
        """Search for all queries."""
        for start in range(0, len(self._queries), QUERIES_PER_BLOCK):
            rows = slice(start, min(start + QUERIES_PER_BLOCK, len(self._queries)))
            block = self._queries[rows]
            find = self._exactly if self._index is None else self._in_lists
            found, similarity = find(block, self._inputs.hidden(rows))
            positives = _positives(self._inputs, rows, block, self._targets)
            yield Neighbours(rows, found.cpu().numpy(), similarity.cpu().numpy(), positives)

    def _exactly(self, block: Tensor, hidden: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        left_out = tuple(to_device(torch.from_numpy(numbers), device()) for numbers in hidden)
        return search(block, self._mine, self._depth, self._first, dist.group.WORLD, left_out=left_out)

    def _in_lists(self, block: Tensor, hidden: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        found = (to_device(x, device()) for x in self._index.find(block, self._depth, hidden))
        return rank_found(*found, self._depth, dist.group.WORLD)

    def _measure_recall(self) -> float:
        """Compare with the exact search on queries that are evenly spread over all of them."""
        rows = slice(0, len(self._queries), -(-len(self._queries) // QUERIES_OF_RECALL))
        block, hidden = self._queries[rows], self._inputs.hidden(rows)
        found, nearest = (find(block, hidden)[0].cpu().numpy() for find in (self._in_lists, self._exactly))
        shares = [np.isin(right[right >= 0], of[of >= 0]).mean() for of, right in zip(found, nearest) if right[0] >= 0]
        return float(np.mean(shares)) if shares else 1.0


def _positives(inputs: SubsetInputs, rows: slice, queries: Tensor, targets: StoredRows) -> Positives:
    numbers = inputs.positives[rows]
    counts = np.array([len(of_query) for of_query in numbers])
    target = np.concatenate(numbers)
    row = np.repeat(np.arange(len(numbers)), counts)
    parts = []
    for start in range(0, len(target), QUERIES_PER_BLOCK):
        some = slice(start, start + QUERIES_PER_BLOCK)
        of_query = queries[to_device(torch.from_numpy(row[some]), queries.device)]
        parts.append(paired_similarities(of_query, targets[target[some]]).cpu().numpy())
    similarity = np.concatenate(parts).astype(np.float64)
    starts = np.cumsum(counts) - counts
    least, mean, most = (reduce.reduceat(similarity, starts) for reduce in (np.minimum, np.add, np.maximum))
    return Positives(least, mean / counts, most)

"""The nearest targets of every query of a subset, exactly, with the targets spread over all ranks.

What is found is the same on all ranks and at any number of them, and equal similarities are ordered by the number of
the target (evaluation/ranking.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import to_device
from megatron_llave.data.stored_vectors import StoredVectors, query_name, target_name
from megatron_llave.distributed.process_groups import device
from megatron_llave.evaluation.ranking import paired_similarities, search
from megatron_llave.mining.inputs import SubsetInputs
from megatron_llave.mining.rules import Positives

QUERIES_PER_BLOCK = 4096
"""Number of queries whose candidates are in memory at a time."""
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


def find_neighbours(inputs: SubsetInputs, vectors: StoredVectors, depth: int) -> Iterator[Neighbours]:
    """Search for the `depth` nearest targets of each query, without those that it must not be given (inputs.hidden).

    A collective over all ranks. Yields the queries block by block, in their order.

    Raises:
        DataError: `vectors` lack a query or target.
    """
    world, (q, c) = dist.group.WORLD, (len(inputs.query_ids), len(inputs.target_ids))
    queries = StoredRows(vectors, [query_name(inputs.name, name) for name in inputs.query_ids])
    targets = StoredRows(vectors, [target_name(inputs.name, name) for name in inputs.target_ids])
    first, last = (c * rank // world.size() for rank in (world.rank(), world.rank() + 1))
    mine: StoredRows | Tensor = StoredRows(vectors, targets.names[first:last])
    if len(mine) * vectors.width * 4 <= MOST_RESIDENT:
        mine = mine[:]
    for start in range(0, q, QUERIES_PER_BLOCK):
        rows = slice(start, min(start + QUERIES_PER_BLOCK, q))
        block = queries[rows]
        hidden = tuple(to_device(torch.from_numpy(x), device()) for x in inputs.hidden(rows))
        found, similarity = search(block, mine, min(depth, c), first, world, left_out=hidden)
        positives = _positives(inputs, rows, block, targets)
        yield Neighbours(rows, found.cpu().numpy(), similarity.cpu().numpy(), positives)


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

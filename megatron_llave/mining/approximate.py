"""An approximate search among the targets of a subset, in inverted lists of FAISS (https://faiss.ai).

Targets are divided into lists by the nearest of centroids, which k-means finds in a sample of them. A query is compared
with the targets of those lists alone whose centroids are nearest to it. All ranks have the same centroids, and each has
its own targets in the lists. So a query meets the same targets at any number of ranks.
"""

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.errors import import_optional
from megatron_llave.evaluation.ranking import Rows, paired_similarities

LISTS = 4
"""Number of lists, as a multiple of the square root of the number of targets."""
SAMPLE = 40
"""Targets for each list that k-means looks at; FAISS warns of fewer than 39."""
ITERATIONS = 10
MARGIN = 16
"""Targets beyond the wanted ones that are found, because FAISS compares in float32 and does not order equal ones."""
ROWS_AT_A_TIME = 16384
ELEMENTS_AT_A_TIME = 2**19
"""Of the rows that are compared with the queries by which they were found."""


def require_faiss() -> ModuleType:
    """Return the module faiss.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    return import_optional("faiss", "--search faiss needs", "pip install faiss-cpu (the extra mine)")


class ListIndex:
    """The targets of this rank in lists; FAISS keeps them in the host's memory, d float32 and 16 bytes for each."""

    def __init__(self, targets: Rows, first: int, last: int, probes: int) -> None:
        """Train the centroids and fill the lists; a collective over all ranks.

        Args:
            targets: all c targets [c, d] float32 of unit length.
            first: number of the first target of this rank.
            last: number behind its last one.
            probes: number of lists that are searched for a query.

        Raises:
            ConfigError: FAISS is not installed, or cannot be imported.
        """
        faiss = require_faiss()
        centroids = from_first_rank(lambda: _centroids(faiss, targets))
        width = centroids.shape[1]
        quantizer = faiss.IndexFlatIP(width)
        quantizer.add(centroids)
        self._index = faiss.IndexIVFFlat(quantizer, width, len(centroids), faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = min(probes, len(centroids))
        for start in range(first, last, ROWS_AT_A_TIME):
            self._index.add(targets[start : min(start + ROWS_AT_A_TIME, last)].cpu().numpy())
        self._index.make_direct_map(True)
        self._first, self._count = first, last - first

    def find(self, queries: Tensor, k: int, hidden: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Find targets of this rank that are near to queries, k of them where the lists have as many.

        Args:
            queries: [q, d] float32 of unit length.
            k: how many are wanted.
            hidden: [m] numbers of queries and [m] numbers of targets that these must not be given, int64. A query with
                more than k of them may find fewer than k targets.

        Returns:
            [q, n] int64 numbers of targets in any order, -1 where there are fewer; and [q, n] float32 similarities with
            the bits of the exact search.
        """
        is_mine = (hidden[1] >= self._first) & (hidden[1] < self._first + self._count)
        row, place = hidden[0][is_mine], hidden[1][is_mine] - self._first
        most = int(np.bincount(row, minlength=1).max())
        wanted = min(k + MARGIN + min(most, k), self._count)
        if wanted == 0:
            return torch.zeros(len(queries), 0, dtype=torch.int64), torch.zeros(len(queries), 0)
        queries = queries.cpu()
        found = self._index.search(queries.numpy(), wanted)[1]  # [q, wanted]
        of_query = np.arange(len(queries))[:, None] * self._count
        found[np.isin(of_query + found, row * self._count + place) & (found >= 0)] = -1
        similarity = torch.empty(found.shape)
        step = max(1, ELEMENTS_AT_A_TIME // (wanted * queries.shape[1]))
        for start in range(0, len(queries), step):
            some = slice(start, start + step)
            rows = torch.from_numpy(self._index.reconstruct_batch(found[some].clip(0).ravel()))
            rows = rows.view(-1, wanted, queries.shape[1])  # [step, wanted, d]
            similarity[some] = paired_similarities(queries[some, None], rows)
        numbers = torch.from_numpy(np.where(found < 0, -1, found + self._first))
        return numbers, similarity


def _centroids(faiss: ModuleType, targets: Rows) -> np.ndarray:
    """[lists, d] float32 of unit length, from a sample that is evenly spread over the targets."""
    lists = max(1, min(round(LISTS * math.sqrt(len(targets))), len(targets) // SAMPLE))
    sample = targets[:: max(1, len(targets) // (lists * SAMPLE))].cpu().numpy()
    kmeans = faiss.Kmeans(sample.shape[1], lists, niter=ITERATIONS, seed=1, spherical=True)
    kmeans.train(sample)
    return kmeans.centroids

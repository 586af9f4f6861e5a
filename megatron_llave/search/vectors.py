"""The exact search in float32, and the smaller forms of vectors with which a search is faster and not exact.

Shapes: n images, d numbers of an embedding. All vectors have unit length, so that a product is a cosine similarity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 2**22
"""Bytes of the vectors in float32 that are multiplied at a time, and of their similarities to all queries; they stay in
a core's cache while int8 becomes float32."""
OVERSAMPLING = 4
"""How many times as many images as asked for are found with small vectors and then compared with the exact ones."""
LEAST_FOUND = 100
"""The least number of images that are found with small vectors."""
RECALL_QUERIES = 1000
"""Number of images whose neighbours are looked for to measure the recall."""
RECALL_AT = (1, 10)


@dataclass(frozen=True)
class SmallVectors:
    """The first numbers of each vector, in float32 of unit length or in int8 with a scale for each vector."""

    rows: np.ndarray
    """[n, dims], float32 or int8."""
    scales: np.ndarray | None
    """[n] float32; None: the rows are float32."""

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self.rows)


def shorten(vectors: np.ndarray, dims: int, kind: str) -> SmallVectors:
    """Return the first `dims` numbers of vectors [n, d] float32 at unit length, in int8 if `kind` says so.

    int8 is symmetric: the largest number of each vector is 127, so that a vector does not depend on the others.
    """
    cut = np.array(vectors[:, :dims], np.float32)
    cut /= np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    if kind == "float32":
        return SmallVectors(cut, None)
    scales = np.maximum(np.abs(cut).max(axis=1), np.finfo(np.float32).tiny) / 127 if len(cut) else cut[:, 0]
    return SmallVectors(np.rint(cut / scales[:, None]).astype(np.int8), scales.astype(np.float32))


def best_rows(queries: np.ndarray, vectors: np.ndarray | SmallVectors, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar vectors of each query by comparing it with all of them, a block at a time.

    Products are in float32. Of equal similarities the one with the smaller number comes first.

    Args:
        queries: [q, d] float32.
        vectors: [n, d] float32, which may be mapped into memory, or small ones, for queries shortened alike.
        k: how many, at most n are returned.

    Returns:
        Numbers [q, k] int64, best first, and similarities [q, k] float32.
    """
    rows, scales = (vectors.rows, vectors.scales) if isinstance(vectors, SmallVectors) else (vectors, None)
    k = min(k, len(rows))
    best = np.empty((len(queries), 0), np.int64)
    similar = np.empty((len(queries), 0), np.float32)
    step = max(1, BLOCK_BYTES // (4 * max(1, rows.shape[1], len(queries))))
    for start in range(0, len(rows), step):
        block = np.asarray(rows[start : start + step], np.float32)  # [block, d]
        product = queries @ block.T  # [q, block]
        if scales is not None:
            product *= scales[start : start + step]
        similar = np.concatenate([similar, product], axis=1)
        best = np.concatenate([best, np.broadcast_to(np.arange(start, start + len(block)), product.shape)], axis=1)
        best, similar = _largest(best, similar, k)
    order = np.lexsort((best, -similar))  # by similarity, then by number
    return np.take_along_axis(best, order, axis=1), np.take_along_axis(similar, order, axis=1)


def _largest(best: np.ndarray, similar: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the k largest of each row; of those equal to the smallest that is kept, the ones with the lowest numbers."""
    if similar.shape[1] <= k:
        return best, similar
    limit = -np.partition(-similar, k - 1, axis=1)[:, k - 1 : k]  # [q, 1] the k-th largest
    is_equal = similar == limit
    room = k - (similar > limit).sum(axis=1, keepdims=True)
    kept = (similar > limit) | is_equal & (np.cumsum(is_equal, axis=1) <= room)  # numbers rise along a row
    return best[kept].reshape(len(best), k), similar[kept].reshape(len(best), k)


def search(queries: np.ndarray, exact: np.ndarray, small: SmallVectors | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search as `best_rows` does, in all vectors, or among those that small ones find and exact ones put in order.

    The similarities are those of the exact vectors in both cases; only images that the small ones miss are missing.
    """
    if small is None:
        return best_rows(queries, exact, k)
    kind = "float32"  # of queries, which are few
    found, _ = best_rows(shorten(queries, small.rows.shape[1], kind).rows, small, max(OVERSAMPLING * k, LEAST_FOUND))
    found.sort(axis=1)
    numbers = np.empty((len(queries), min(k, len(exact))), np.int64)
    similar = np.empty(numbers.shape, np.float32)
    for query, candidates in enumerate(found):
        places, similar[query : query + 1] = best_rows(queries[query : query + 1], exact[candidates], k)
        numbers[query] = candidates[places[0]]
    return numbers, similar


def recall(exact: np.ndarray, small: SmallVectors, at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Measure which share of the exact nearest neighbours the small vectors find.

    Up to RECALL_QUERIES images, spread evenly over the index, are the queries; each is left out of its own neighbours.

    Returns:
        For each k of `at`, the mean share of the k exact neighbours among the k found, "recall@k" from 0 to 1.
    """
    chosen = np.unique(np.linspace(0, len(exact) - 1, min(len(exact), RECALL_QUERIES)).astype(np.int64))
    deepest = min(max(at), len(exact) - 1)
    if deepest < 1:
        return {f"recall@{k}": 1.0 for k in at}
    queries = np.asarray(exact[chosen], np.float32)
    neighbours = [_without(search(queries, exact, form, deepest + 1)[0], chosen) for form in (None, small)]
    shares = {}
    for k in at:
        right, found = (numbers[:, : min(k, deepest)] for numbers in neighbours)
        shares[f"recall@{k}"] = float((right[:, :, None] == found[:, None, :]).any(axis=2).mean())
    return shares


def _without(numbers: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Remove from each row [q, k + 1] its own number, or the last one where that is not in it; [q, k]."""
    is_own = numbers == own[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return numbers[~is_own].reshape(len(numbers), -1)

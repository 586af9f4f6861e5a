"""Ranks candidates for queries, and computes scores from the ranking: pure functions of tensors and a process group.

Shapes: q queries, c candidates over all ranks (c_local on this one), n of them in one block, d embedding. For
embeddings of length up to sqrt(2) the ranking is bitwise independent of sharding, chunking and device (`_fixed_point`).
Equal similarities are ordered by candidate index, as numpy's argmax does in the official MMEB evaluation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

CANDIDATES_PER_BLOCK = 16384
LOW_WORD = 2**32 - 1
# Lower than the sort key of every similarity; its upper half has the bits of a NaN, which no similarity is.
ABSENT = torch.iinfo(torch.int64).min


class Rows(Protocol):
    """A tensor [n, d], or an object that reads slices of one when asked for them."""

    def __len__(self) -> int:
        """Number of rows, n."""

    def __getitem__(self, index: slice, /) -> Tensor:
        """The rows of a slice, [rows, d]."""


@dataclass
class Ranking:
    """The best candidates of each query."""

    top: Tensor
    """[q, k] int64 global candidate indices, best first; -1 where there are fewer than k candidates."""
    positive: Tensor
    """[q] float32 similarity of the right candidate, the most similar one of several."""
    hardest_negative: Tensor
    """[q] float32 largest similarity of another candidate; -inf where there is none."""


def rank_candidates(
    queries: Tensor,
    candidates: Tensor,
    positives: Tensor,
    k: int,
    offset: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
    labels: Tensor | None = None,
) -> Ranking:
    """Rank the candidates of all ranks of `group` for each query; the result is the same on all of them.

    Args:
        queries: [q, d] L2-normalised, the same on all ranks.
        candidates: [c_local, d] L2-normalised, rows [offset, offset + c_local) of all candidates; may be empty.
        positives: [q] or [q, r] int64 labels of each query's right candidates, the same on all ranks.
        k: number of candidates to keep per query.
        offset: global index of this rank's first candidate.
        group: ranks that the candidates are spread over; None: this rank has all of them.
        chunk: number of queries whose similarities are held at a time.
        labels: [c_local] int64, equal for candidates that are the same input, which are then right or wrong together;
            None: each candidate's global index.

    Raises:
        ValueError: k is below 1, or none of the positives of a query is the label of a candidate.
    """
    columns = (positives[:, None] if positives.ndim == 1 else positives).unbind(1)
    scores = torch.full((2, len(queries)), -math.inf, device=queries.device)  # [2, q] positive, hardest negative

    def compare(rows: slice, similarity: Tensor, index: Tensor) -> None:
        label = index if labels is None else labels[index - offset]
        is_positive = reduce(torch.logical_or, (label == right[rows, None] for right in columns))  # [chunk, n]
        in_block = torch.stack(
            [
                similarity.masked_fill(~is_positive, -math.inf).amax(dim=1),
                similarity.masked_fill(is_positive, -math.inf).amax(dim=1),
            ]
        )
        scores[:, rows] = torch.maximum(scores[:, rows], in_block)

    best = _best_keys(queries, candidates, k, offset, group, chunk, compare)
    if group is not None and group.size() > 1 and len(queries) > 0:
        dist.all_reduce(scores, dist.ReduceOp.MAX, group=group)
    missing = columns[0][scores[0] == -math.inf]
    if len(missing) > 0:
        raise ValueError(f"positive {int(missing[0])} is not the label of a candidate")
    return Ranking(_indices(best), scores[0], scores[1])


def search(
    queries: Tensor,
    candidates: Rows,
    k: int,
    offset: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
    left_out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Search exactly for each query's k best candidates; the arguments are those of rank_candidates, and `left_out`.

    `candidates` may lie on disk: CANDIDATES_PER_BLOCK rows are read at a time. The result is the same on all ranks.

    Args:
        left_out: candidates that a query does not have, as [m] int64 numbers of queries, not falling, and [m] int64
            global indices of candidates; the same on all ranks. The others move up in its ranking.

    Returns:
        Global indices [q, k] int64, best first, and similarities [q, k] float32; -1 and -inf where there are fewer.

    Raises:
        ValueError: k is below 1.
    """
    of_query, of_candidate = left_out or (queries.new_zeros(0, dtype=torch.int64),) * 2

    def hide(rows: slice, similarity: Tensor, index: Tensor) -> None:
        bounds = torch.tensor([rows.start, rows.stop], device=of_query.device)
        chosen = slice(*torch.searchsorted(of_query, bounds).tolist())
        row, column = of_query[chosen] - rows.start, of_candidate[chosen] - index[0]
        inside = (column >= 0) & (column < len(index))
        similarity[row[inside], column[inside]] = -math.inf  # which no other similarity is (_product)

    best = _best_keys(queries, candidates, k, offset, group, chunk, hide if len(of_query) else _see_nothing)
    ordered = best >> 32  # the upper half of ABSENT is below that of every similarity
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    similarity = bits.to(torch.int32).view(torch.float32).masked_fill(best == ABSENT, -math.inf)
    return _indices(best).masked_fill(similarity == -math.inf, -1), similarity


def _see_nothing(rows: slice, similarity: Tensor, index: Tensor) -> None:
    """Leave the similarities of a block as they are."""


def _best_keys(
    queries: Tensor,
    candidates: Rows,
    k: int,
    offset: int,
    group: dist.ProcessGroup | None,
    chunk: int,
    compare: Callable[[slice, Tensor, Tensor], None],
) -> Tensor:
    """Sort keys [q, k] of the best candidates of all ranks; `compare` sees every block's similarities [chunk, n].

    It may set some of them to -inf, which is below every other similarity.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    best = torch.full((len(queries), k), ABSENT, dtype=torch.int64, device=queries.device)  # [q, k]
    for first in range(0, len(queries), chunk):
        rows = slice(first, first + chunk)
        chosen = _fixed_point(queries[rows])
        for start in range(0, len(candidates), CANDIDATES_PER_BLOCK):
            block = _fixed_point(candidates[start : start + CANDIDATES_PER_BLOCK].to(queries.device))  # [n, d]
            similarity = _product(chosen, block)  # [chunk, n]
            index = torch.arange(len(block), device=queries.device) + offset + start  # [n]
            compare(rows, similarity, index)
            keys = _sort_key(similarity, index)
            if keys.shape[1] > k:  # first among themselves: joined to the others they would be copied whole
                keys = keys.topk(k, dim=1).values
            best[rows] = torch.cat([best[rows], keys], dim=1).topk(k, dim=1).values
    if group is not None and group.size() > 1 and len(queries) > 0:
        gathered = [torch.empty_like(best) for _ in range(group.size())]
        dist.all_gather(gathered, best, group=group)
        best = torch.cat(gathered, dim=1).topk(k, dim=1).values  # [q, ranks * k] -> [q, k]
    return best


def _indices(keys: Tensor) -> Tensor:
    return torch.where(keys == ABSENT, -1, LOW_WORD - (keys & LOW_WORD))


def _fixed_point(embedding: Tensor) -> Tensor:
    """Round to multiples of 2^-26, in float64: their dot products are then free of rounding.

    Every product is a multiple of 2^-52 and, for lengths up to sqrt(2), every partial sum is at most 2, so all of them
    fit the 53 bits of a float64: the order in which a matrix product adds up, which differs between shapes and devices,
    no longer matters. The similarity moves by about 1e-8, less than the spacing of float32 near 1.
    """
    return torch.round(embedding.double() * 2**26) / 2**26


def _product(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [q, n] float32 of rows in fixed point."""
    similarity = (queries @ candidates.T).float()
    # A broken embedding ranks behind every other; adding 0 turns -0 into 0, which equals it but has other bits.
    return similarity.nan_to_num(nan=torch.finfo(torch.float32).min) + 0.0


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [q, n] float32 of queries [q, d] and candidates [n, d], with the bits that the rankings compare."""
    return _product(_fixed_point(queries), _fixed_point(candidates))


def paired_similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [n] float32 of each row of queries [n, d] with that row of candidates [n, d], with the same bits."""
    similarity = (_fixed_point(queries) * _fixed_point(candidates)).sum(1).float()
    return similarity.nan_to_num(nan=torch.finfo(torch.float32).min) + 0.0


def _sort_key(similarity: Tensor, index: Tensor) -> Tensor:
    """Keys [q, n] int64, all different: larger for a larger similarity [q, n], then for a smaller index [n]."""
    bits = similarity.view(torch.int32).long()
    # The bits of a float rise with its size; of a negative one they must fall.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * 2**32 + (LOW_WORD - index)


def alignment(positive: Tensor) -> float:
    """Mean squared distance of queries and their right candidates, from their similarities [q]; 0 is best.

    Wang and Isola, arXiv 2005.10242, with exponent 2.
    """
    return float((2 - 2 * positive.double()).mean())


def uniformity(embeddings: Tensor) -> float:
    """Log of the mean of exp(-2 |x - y|^2) over pairs of different rows of [n, d]; lower is more evenly spread.

    Wang and Isola, arXiv 2005.10242, with t = 2. It is 0 where all rows are equal, and NaN for fewer than two rows.
    """
    squared = torch.pdist(embeddings.double()).square()
    return float(squared.mul(-2).exp().mean().log())


def hub_share(best: Tensor) -> float:
    """Percentage of queries won by the most frequent of the best candidates [q]; 100 where one wins all queries."""
    return 100.0 * int(best.unique(return_counts=True)[1].max()) / len(best)

"""Ranking candidates for queries, and the numbers read off the ranking: pure functions of tensors and a process group.

Used by evaluation, after the embedder. Shapes: q queries, c candidates over all ranks (c_local on this one), n of them
in one block, d embedding. The ranking does not depend on sharding, chunking or device, bit for bit, for embeddings of
length up to sqrt(2): see `_fixed_point`. Equal similarities are ordered by candidate index, as numpy's argmax does in
the released evaluation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

CANDIDATES_PER_BLOCK = 16384
LOW_WORD = 2**32 - 1
# Below the key of every similarity: the bits of a NaN, which no similarity is.
ABSENT = torch.iinfo(torch.int64).min


class Rows(Protocol):
    """A tensor [n, d], or something that makes slices of one when asked for."""

    def __len__(self) -> int:
        """n."""

    def __getitem__(self, index: slice, /) -> Tensor:
        """[rows, d]."""


@dataclass
class Ranking:
    """The best candidates of each query."""

    top: Tensor
    """[q, k] int64 global candidate indices, best first; -1 where there are fewer than k candidates."""
    positive: Tensor
    """[q] float32 similarity of the positive."""
    hardest_negative: Tensor
    """[q] float32 largest similarity of a candidate that is not the positive; -inf where there is none."""


def rank_candidates(
    queries: Tensor,
    candidates: Tensor,
    positives: Tensor,
    k: int,
    offset: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
) -> Ranking:
    """Rank the candidates of all ranks of `group` for each query; the result is the same on all of them.

    Args:
        queries: [q, d] L2-normalised, the same on all ranks.
        candidates: [c_local, d] L2-normalised, rows [offset, offset + c_local) of all candidates; may be empty.
        positives: [q] int64 global index of each query's right candidate, the same on all ranks.
        k: candidates to keep per query.
        offset: global index of this rank's first candidate.
        group: ranks the candidates are spread over; None: all of them are here.
        chunk: queries whose similarities are held at a time.

    Raises:
        ValueError: k is below 1, or a positive is not among the candidates.
    """
    scores = torch.full((2, len(queries)), -math.inf, device=queries.device)  # [2, q] positive, hardest negative

    def compare(rows: slice, similarity: Tensor, index: Tensor) -> None:
        is_positive = index == positives[rows, None]  # [chunk, n]
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
    missing = positives[scores[0] == -math.inf]
    if len(missing) > 0:
        raise ValueError(f"positive {int(missing[0])} is not the index of a candidate")
    return Ranking(_indices(best), scores[0], scores[1])


def search(
    queries: Tensor,
    candidates: Rows,
    k: int,
    offset: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each query: exact search, the same result on all ranks; arguments of rank_candidates.

    `candidates` may lie on a disk: a block of CANDIDATES_PER_BLOCK rows is read at a time.

    Returns:
        Global indices [q, k] int64, best first, and similarities [q, k] float32; -1 and -inf where there are fewer.

    Raises:
        ValueError: k is below 1.
    """
    best = _best_keys(queries, candidates, k, offset, group, chunk)
    ordered = best >> 32  # of ABSENT: below every similarity's
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    similarity = bits.to(torch.int32).view(torch.float32)
    return _indices(best), similarity.masked_fill(best == ABSENT, -math.inf)


def _best_keys(
    queries: Tensor,
    candidates: Rows,
    k: int,
    offset: int,
    group: dist.ProcessGroup | None,
    chunk: int,
    compare: Callable[[slice, Tensor, Tensor], None] = lambda rows, similarity, index: None,
) -> Tensor:
    """Sort keys [q, k] of the best candidates of all ranks; `compare` sees every block's similarities [chunk, n]."""
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
    """[q, n] float32, of rows in fixed point."""
    similarity = (queries @ candidates.T).float()
    # A broken embedding ranks behind every other; adding 0 turns -0 into 0, which equals it but has other bits.
    return similarity.nan_to_num(nan=torch.finfo(torch.float32).min) + 0.0


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """[q, n] float32 of queries [q, d] and candidates [n, d], the bits that the rankings here compare."""
    return _product(_fixed_point(queries), _fixed_point(candidates))


def rank_own_candidates(query: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities [n] float32 of one query [d] and its own candidates [n, d], and the k best of them, [min(k, n)].

    The same bits as `rank_candidates`; among equal ones the first is best, as numpy's argmax has it.
    """
    similarity = similarities(query[None], candidates)  # [1, n]
    keys = _sort_key(similarity, torch.arange(len(candidates), device=query.device))
    return similarity[0], keys[0].topk(min(k, len(candidates))).indices


def _sort_key(similarity: Tensor, index: Tensor) -> Tensor:
    """[q, n] int64, all different: larger for a larger similarity [q, n] and, among equal ones, a smaller index [n]."""
    bits = similarity.view(torch.int32).long()
    # The bits of a float rise with its size; of a negative one they must fall.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * 2**32 + (LOW_WORD - index)


def precision_at_1(ranking: Ranking, positives: Tensor) -> float:
    """Queries whose best candidate is the positive, in percent."""
    return recall_at_k(ranking, positives, 1)


def recall_at_k(ranking: Ranking, positives: Tensor, k: int) -> float:
    """Queries whose positive is among the k best candidates, in percent.

    Raises:
        ValueError: there are no queries, or the ranking holds fewer than k candidates per query.
    """
    num_queries, kept = ranking.top.shape
    if not 1 <= k <= kept or num_queries == 0:
        raise ValueError(f"recall at {k} needs queries and a ranking of at least {k}, not {num_queries} x {kept}")
    hits = (ranking.top[:, :k] == positives[:, None]).any(dim=1)  # [q, k] -> [q]
    return 100.0 * int(hits.sum()) / num_queries


def alignment(positive: Tensor) -> float:
    """Mean squared distance of queries and their positives, from their similarities [q]: 0 is best.

    Wang and Isola, arXiv 2005.10242, with exponent 2.
    """
    return float((2 - 2 * positive.double()).mean())


def uniformity(embeddings: Tensor, sample: int = 2000) -> float:
    """Log of the mean of exp(-2 |x - y|^2) over pairs of different rows: 0 if all are one point, lower is more spread.

    Wang and Isola, arXiv 2005.10242, with t = 2. Of more than `sample` rows [n, d] as many, evenly spaced, are taken;
    NaN where there are fewer than two.
    """
    chosen = torch.linspace(0, len(embeddings) - 1, min(sample, len(embeddings))).round().long()
    squared = torch.pdist(embeddings[chosen.to(embeddings.device)].double()).square()
    return float(squared.mul(-2).exp().mean().log())


def hub_share(best: Tensor) -> float:
    """Share of queries, in percent, that the most frequent best candidate [q] wins: 100 where one wins them all."""
    return 100.0 * int(best.unique(return_counts=True)[1].max()) / len(best)

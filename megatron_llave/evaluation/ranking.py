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
PAIR_COST = 32
"""How many times as much the similarity of a single pair costs as one in a matrix product, about."""
PAIR_ELEMENTS = 2**18
"""Elements of the rows of single pairs that are in memory at a time."""
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

    see = hide if len(of_query) else _see_nothing
    best = _best_keys(queries, candidates, k, offset, group, chunk, see, is_screened=True)
    return _indices(best), _similarity_of(best)


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
    is_screened: bool = False,
) -> Tensor:
    """Sort keys [q, k] of the best candidates of all ranks; `compare` sees every block's similarities [chunk, n].

    It may set some of them to -inf, which no other similarity is: such a candidate is not found. If `is_screened`, the
    similarities that it sees may be rounded ones (_screen); those of the keys are not. That takes less time where there
    are many candidates, but on a GPU the host waits twice for each block, which an evaluation while training avoids.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    best = torch.full((len(queries), k), ABSENT, dtype=torch.int64, device=queries.device)  # [q, k]
    for first in range(0, len(queries), chunk):
        rows = slice(first, first + chunk)
        chosen = _fixed_point(queries[rows])
        for start in range(0, len(candidates), CANDIDATES_PER_BLOCK):
            block = _fixed_point(candidates[start : start + CANDIDATES_PER_BLOCK].to(queries.device))  # [n, d]
            similarity, error = _screen(chosen, block) if is_screened else (_product(chosen, block), 0.0)  # [chunk, n]
            index = torch.arange(len(block), device=queries.device) + offset + start  # [n]
            compare(rows, similarity, index)
            if is_screened:
                row, column = _near(similarity, error, best[rows])
                exact = _at(chosen, block, row, column) if error else similarity[row, column]  # [m]
                keys = _in_rows(row, _sort_key(exact, index[column]), len(chosen))  # [chunk, most of a query]
            else:
                keys = _sort_key(similarity, index)  # [chunk, n]
            if keys.shape[1] > k:  # first among themselves: joined to the others they would be copied whole
                keys = keys.topk(k, dim=1).values
            best[rows] = torch.cat([best[rows], keys], dim=1).topk(k, dim=1).values
    return _of_all_ranks(best, group)


def rank_found(
    index: Tensor, similarity: Tensor, k: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Rank candidates that each rank of `group` has found among its own, by the order of `search`.

    Args:
        index: [q, n] int64 global indices, in any order, each at most once; -1 for none. n may differ between ranks.
        similarity: [q, n] float32, from paired_similarities.
        k: number of candidates to keep per query.
        group: ranks that the candidates are spread over; None: this rank has all of them.

    Returns:
        What `search` returns.
    """
    keys = _sort_key(similarity, index).masked_fill(index < 0, ABSENT)
    keys = torch.cat([keys, keys.new_full((len(keys), k), ABSENT)], dim=1)  # at least k of them
    best = _of_all_ranks(keys.topk(k, dim=1).values, group)
    return _indices(best), _similarity_of(best)


def _of_all_ranks(best: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The best sort keys [q, k] of all ranks, from those [q, k] of each."""
    if group is None or group.size() == 1 or len(best) == 0:
        return best
    gathered = [torch.empty_like(best) for _ in range(group.size())]
    dist.all_gather(gathered, best, group=group)
    return torch.cat(gathered, dim=1).topk(best.shape[1], dim=1).values  # [q, ranks * k] -> [q, k]


def _screen(queries: Tensor, candidates: Tensor) -> tuple[Tensor, float]:
    """Similarities [q, n] float32 of rows in fixed point, and a bound of how far they are from those of _product.

    They are products in float32, in which every order of adding up is off by at most d u / (1 - d u) |x| |y| with the
    unit roundoff u = 2^-24. Rounding the rows to float32, which changes those of other types only, the result of
    _product, and the differences that _near computes, add less than 8 u. Where this does not hold, because lengths are
    above sqrt(2) or not finite or products in float32 are set to a lower precision, the similarities are those of
    _product and the bound is 0.
    """
    lengths = torch.stack([torch.linalg.vector_norm(rows, dim=1).amax() for rows in (queries, candidates)])
    width = queries.shape[1]
    if width > 2**16 or not bool((lengths <= math.sqrt(2)).all()) or not _has_full_float32():
        return _product(queries, candidates), 0.0
    return queries.float() @ candidates.float().T, (1.01 * width + 8) * 2**-24 * max(1.0, float(lengths.prod()))


def _has_full_float32() -> bool:
    """Whether products of float32 are computed in float32, not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's answer where settings of the newer, separate kind lower the precision
        return False


def _near(similarity: Tensor, error: float, best: Tensor) -> tuple[Tensor, Tensor]:
    """Places [m], [m] in similarity [q, n] of all candidates that can be among the k best of their queries.

    The similarities may be off by `error`. `best` [q, k] are the sort keys of the best candidates before this block.
    """
    k = best.shape[1]
    least = _similarity_of(best[:, -1]) - error  # [q]
    if similarity.shape[1] > k and torch.count_nonzero(similarity >= least[:, None]) > k * len(best):
        least = torch.maximum(least, similarity.topk(k, dim=1).values[:, -1] - 2 * error)
    least = least.clamp(min=torch.finfo(torch.float32).min)  # -inf: left out by `compare`
    return (similarity >= least[:, None]).nonzero(as_tuple=True)


def _at(queries: Tensor, candidates: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Similarities [m] float32 of rows in fixed point at the places row [m], column [m] of _product."""
    if len(row) * PAIR_COST > len(queries) * len(candidates):
        return _product(queries, candidates)[row, column]
    step = max(1, PAIR_ELEMENTS // queries.shape[1])
    pairs = zip(row.split(step), column.split(step))
    parts = [_paired(queries[some], candidates[others]) for some, others in pairs]
    return torch.cat([*parts, queries.new_zeros(0, dtype=torch.float32)])


def _in_rows(row: Tensor, keys: Tensor, count: int) -> Tensor:
    """Keys [count, most of a row] of the rows [m] not falling that keys [m] belong to; ABSENT behind the last."""
    starts = torch.searchsorted(row, torch.arange(count + 1, device=row.device))
    place = torch.arange(len(row), device=row.device) - starts[row]
    table = torch.full((count, int(starts.diff().max())), ABSENT, dtype=torch.int64, device=row.device)
    table[row, place] = keys
    return table


def _indices(keys: Tensor) -> Tensor:
    return torch.where(keys == ABSENT, -1, LOW_WORD - (keys & LOW_WORD))


def _similarity_of(keys: Tensor) -> Tensor:
    """The similarities, float32, that are in sort keys; -inf for ABSENT."""
    ordered = keys >> 32  # the upper half of ABSENT is below that of every similarity
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(torch.int32).view(torch.float32).masked_fill(keys == ABSENT, -math.inf)


def _fixed_point(embedding: Tensor) -> Tensor:
    """Round to multiples of 2^-26, in float64: their dot products are then free of rounding.

    Every product is a multiple of 2^-52 and, for lengths up to sqrt(2), every partial sum is at most 2, so all of them
    fit the 53 bits of a float64: the order in which a matrix product adds up, which differs between shapes and devices,
    no longer matters. The similarity moves by about 1e-8, less than the spacing of float32 near 1.
    """
    return (embedding.double() * 2**26).round_().div_(2**26)


def _product(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [q, n] float32 of rows in fixed point."""
    return _comparable((queries @ candidates.T).float())


def _paired(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [..., n] float32 of rows in fixed point, as paired_similarities."""
    return _comparable((queries * candidates).sum(-1).float())


def _comparable(similarity: Tensor) -> Tensor:
    """Rank a broken embedding behind every other one, and turn -0 into 0, which equals it but has other bits."""
    return similarity.nan_to_num_(nan=torch.finfo(torch.float32).min).add_(0.0)


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [q, n] float32 of queries [q, d] and candidates [n, d], with the bits that the rankings compare."""
    return _product(_fixed_point(queries), _fixed_point(candidates))


def paired_similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Similarities [..., n] float32 of each row of queries [..., n, d] with that row of candidates [..., n, d].

    They have the bits of `similarities`. Where one of the two has one row, it goes with all rows of the other.
    """
    return _paired(_fixed_point(queries), _fixed_point(candidates))


def _sort_key(similarity: Tensor, index: Tensor) -> Tensor:
    """Keys int64: larger for a larger similarity [...] float32, then for a smaller index, which is broadcast to it."""
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

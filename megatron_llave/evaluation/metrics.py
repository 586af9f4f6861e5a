"""Retrieval with relevance judgements: Precision@1, Recall@k, MRR and nDCG@k of a ranking. Pure functions.

As trec_eval computes them: gains are the grades themselves, the discount is log2(1 + rank), a query without a relevant
candidate is left out, and a candidate without a judgement is not relevant.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_llave.errors import ConfigError
from megatron_llave.evaluation.ranking import similarities

Judgements = Mapping[str, Mapping[str, int]]
"""Query id -> candidate id -> grade; relevant where it is above 0."""


def score_ranking(
    ranking: Mapping[str, Sequence[str]], judgements: Judgements, depths: Sequence[int]
) -> dict[str, float]:
    """Means over the judged queries, in percent.

    Args:
        ranking: query id -> candidate ids, best first, at least max(depths) of them where there are so many.
        judgements: of these queries.
        depths: k of recall@k and ndcg@k; the largest one also bounds the rank that MRR sees.

    Returns:
        precision@1, recall@k and ndcg@k for each k, mrr.

    Raises:
        ValueError: no query has a relevant candidate.
    """
    judged = [query for query in ranking if any(grade > 0 for grade in judgements.get(query, {}).values())]
    if not judged:
        raise ValueError("no query has a relevant candidate")
    rows = [_score_query(ranking[query], judgements[query], depths) for query in judged]
    return {name: 100.0 * math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _score_query(ranked: Sequence[str], grades: Mapping[str, int], depths: Sequence[int]) -> dict[str, float]:
    gains = [max(0, grades.get(candidate, 0)) for candidate in ranked[: max(depths)]]
    ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    first = next((rank for rank, gain in enumerate(gains, start=1) if gain > 0), math.inf)
    found = {"precision@1": float(first == 1), "mrr": 1 / first}
    for k in depths:
        found[f"recall@{k}"] = sum(gain > 0 for gain in gains[:k]) / len(ideal)
        found[f"ndcg@{k}"] = _discounted(gains[:k]) / _discounted(ideal[:k])
    return found


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(1 + rank) for rank, gain in enumerate(gains, start=1))


def parse_depths(given: Sequence[str | int]) -> list[int]:
    """The k of recall and nDCG.

    Raises:
        ConfigError: one is no number of at least 1, or there is none.
    """
    try:
        depths = [int(one) for one in given]
    except ValueError:
        depths = []
    if not depths or min(depths) < 1:
        raise ConfigError(f"--k {' '.join(map(str, given))} must be numbers of at least 1")
    return depths


DEPTHS = (1, 5, 10)


def ranks_of_right(queries: Tensor, candidates: Tensor, is_right: Tensor, chunk: int = 1024) -> Tensor:
    """Rank, from 1, of each query's best right candidate, [q] int64; equal candidates stand in index order.

    Args:
        queries: [q, d] of unit length.
        candidates: [c, d] of unit length.
        is_right: [q, c] bool, with a right one in each row.
        chunk: queries whose similarities are held at a time.
    """
    ranks = []
    for start in range(0, len(queries), chunk):
        similarity, right = similarities(queries[start : start + chunk], candidates), is_right[start : start + chunk]
        best = similarity.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True)  # the first of equal ones
        index = torch.arange(len(candidates))
        is_before = (similarity > best.values) | ((similarity == best.values) & (index < best.indices))
        ranks.append(1 + is_before.sum(dim=1))
    return torch.cat(ranks)


def summarise_ranks(ranks: Tensor) -> dict[str, float]:
    """Recall@k in percent for each of DEPTHS, and the median rank."""
    found = {f"recall@{k}": 100.0 * int((ranks <= k).sum()) / len(ranks) for k in DEPTHS}
    return {**found, "median_rank": float(np.median(ranks.numpy()))}

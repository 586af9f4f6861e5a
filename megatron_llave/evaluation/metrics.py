"""Scores of retrieval with relevance judgements (Precision@1, Recall@k, MRR, nDCG@k) and of ranks. Pure functions.

They are computed as by trec_eval: the gain is the grade itself, the discount is log2(1 + rank), a query without a
relevant candidate is left out, and a candidate without a judgement is not relevant.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_llave.errors import ConfigError
from megatron_llave.evaluation.ranking import similarities

Judgements = Mapping[str, Mapping[str, int]]
"""Query id -> candidate id -> grade; a candidate is relevant if its grade is above 0."""


def score_ranking(
    ranking: Mapping[str, Sequence[str]], judgements: Judgements, depths: Sequence[int]
) -> dict[str, float]:
    """Mean scores over the judged queries, in percent.

    Args:
        ranking: query id -> candidate ids, best first; at least max(depths), or all there are.
        judgements: grades of the queries' candidates.
        depths: values of k for recall@k and ndcg@k; MRR looks as deep as the largest.

    Returns:
        The scores precision@1, mrr, and recall@k and ndcg@k for each k.

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
    scores = {"precision@1": float(first == 1), "mrr": 1 / first}
    for k in depths:
        scores[f"recall@{k}"] = sum(gain > 0 for gain in gains[:k]) / len(ideal)
        scores[f"ndcg@{k}"] = _discounted(gains[:k]) / _discounted(ideal[:k])
    return scores


def chance_scores(judgements: Judgements, num_candidates: Mapping[str, int], depths: Sequence[int]) -> dict[str, float]:
    """The expected scores of a random order, in percent: what `score_ranking` gives on average over all orders.

    Args:
        judgements: as for `score_ranking`.
        num_candidates: query id -> number of candidates that it is ranked against; queries without a relevant one are
            left out.
        depths: as for `score_ranking`.

    Raises:
        ValueError: no query has a relevant candidate.
    """
    grades = {query: [grade for grade in judgements.get(query, {}).values() if grade > 0] for query in num_candidates}
    rows = [_chance(values, num_candidates[query], depths) for query, values in grades.items() if values]
    if not rows:
        raise ValueError("no query has a relevant candidate")
    return {name: 100.0 * math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _chance(grades: list[int], num: int, depths: Sequence[int]) -> dict[str, float]:
    """Expected scores of a query with these grades of its relevant candidates among `num` candidates."""
    ideal, relevant = sorted(grades, reverse=True), len(grades)
    scores = {"precision@1": relevant / num, "mrr": 0.0}
    none_before = 1.0  # probability that no candidate before the rank is relevant
    for rank in range(1, min(max(depths), num) + 1):
        scores["mrr"] += none_before * relevant / (num - rank + 1) / rank
        none_before *= 1 - relevant / (num - rank + 1)
    for k in depths:
        scores[f"recall@{k}"] = min(k, num) / num
        scores[f"ndcg@{k}"] = _discounted([sum(grades) / num] * min(k, num)) / _discounted(ideal[:k])
    return scores


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(1 + rank) for rank, gain in enumerate(gains, start=1))


def parse_depths(given: Sequence[str | int]) -> list[int]:
    """Convert the values of k for recall@k and nDCG@k.

    Raises:
        ConfigError: a value is not a number of at least 1, or there is no value.
    """
    try:
        depths = [int(value) for value in given]
    except ValueError:
        depths = []
    if not depths or min(depths) < 1:
        raise ConfigError(f"--k {','.join(map(str, given))} must be numbers of at least 1")
    return depths


TIES_BY_INDEX = "equal similarities are ranked in the order in which the candidates are given"
"""The rule for ties of the rankings that this file scores, as the results state it."""
DEPTHS = (1, 5, 10)
"""Values of k for the recall of summarise_ranks."""


def ranks_of_right(queries: Tensor, candidates: Tensor, is_right: Tensor, chunk: int = 1024) -> Tensor:
    """Rank, from 1, of each query's best right candidate, [q] int64; equal similarities are ranked in index order.

    Args:
        queries: [q, d] of unit length.
        candidates: [c, d] of unit length.
        is_right: [q, c] bool, with at least one right candidate in each row.
        chunk: number of queries whose similarities are held at a time.
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
    recalls = {f"recall@{k}": 100.0 * int((ranks <= k).sum()) / len(ranks) for k in DEPTHS}
    return {**recalls, "median_rank": float(np.median(ranks.numpy()))}

"""Retrieval with relevance judgements: Precision@1, Recall@k, MRR and nDCG@k of a ranking. Pure functions.

As trec_eval computes them: gains are the grades themselves, the discount is log2(1 + rank), a query without a relevant
candidate is left out, and a candidate without a judgement is not relevant.
"""

import math
from collections.abc import Mapping, Sequence

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

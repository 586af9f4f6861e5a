"""Scores of a ranking with judgements, against trec_eval's definitions worked out by hand."""

import itertools
import math

import pytest

from megatron_llave.evaluation.metrics import chance_scores, score_ranking

RANKING = {"q1": ["a", "b", "c", "d"], "q2": ["d", "c", "b", "a"], "q3": ["a", "b", "c", "d"]}


def test_binary_judgements():
    scores = score_ranking(RANKING, {"q1": {"a": 1, "c": 1, "x": 1}, "q2": {"a": 1, "d": 0}}, [1, 3])
    # q1: hits at ranks 1 and 3 of three relevant ones; q2: its one at rank 4, which 3 does not reach.
    discount = 1 + 1 / math.log2(3) + 1 / 2
    assert scores == pytest.approx(
        {
            "precision@1": 50.0,
            "mrr": 50.0,
            "recall@1": 100 / 3 / 2,
            "recall@3": 200 / 3 / 2,
            "ndcg@1": 50.0,
            "ndcg@3": 50 * (1 + 1 / 2) / discount,
        }
    )


@pytest.mark.parametrize("grades", [{"b": 1}, {"a": 3, "d": 1, "e": 0}, {"a": 1, "b": 1, "c": 2, "d": 1, "e": 1}])
def test_chance_is_the_mean_over_all_orders(grades):
    depths = [1, 2, 4]
    orders = [score_ranking({"q": order}, {"q": grades}, depths) for order in itertools.permutations("abcde")]
    mean = {name: sum(scores[name] for scores in orders) / len(orders) for name in orders[0]}
    assert chance_scores({"q": grades}, {"q": 5, "unjudged": 5}, depths) == pytest.approx(mean)


def test_graded_judgements_and_the_depth_of_mrr():
    scores = score_ranking({"q": ["a", "b", "c"]}, {"q": {"b": 3, "c": 1, "a": -1}}, [2])
    assert scores["ndcg@2"] == pytest.approx(100 * (3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert scores["mrr"] == 50.0 and scores["precision@1"] == 0.0 and scores["recall@2"] == 50.0
    assert score_ranking({"q": ["a", "b", "c"]}, {"q": {"c": 1}}, [2])["mrr"] == 0.0


def test_perfect_ranking_is_a_hundred_and_unjudged_queries_are_left_out():
    scores = score_ranking(RANKING, {"q1": {"a": 2, "b": 1}, "q3": {"a": 0}}, [2, 4])
    assert set(scores.values()) == {100.0}
    with pytest.raises(ValueError, match="no query has a relevant candidate"):
        score_ranking(RANKING, {"q3": {"a": 0}}, [1])

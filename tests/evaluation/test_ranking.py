"""Ranking: against numpy, with exact ties, over chunks, blocks and ranks; and the numbers read off it."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from run_ranks import run_ranks

from megatron_llave.evaluation import ranking
from megatron_llave.evaluation.ranking import paired_similarities, rank_candidates, search
from megatron_llave.evaluation.ranking import similarities as ranking_similarities
from megatron_llave.loss.similarities import cosine_counts, mean_margin, order_auc, overlap_coefficient

CHECK = Path(__file__).parents[1] / "distributed" / "check_retrieval.py"


def random_case(q: int, c: int, d: int, distinct: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit queries and candidates, of which only `distinct` differ, and positives."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(q, d, generator=generator), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(distinct, d, generator=generator), dim=1)
    candidates = rows[torch.randint(distinct, (c,), generator=generator)]
    return queries, candidates, torch.randint(c, (q,), generator=generator)


@pytest.mark.parametrize("distinct", [3, 20, 400])
def test_ranks_like_a_stable_sort_in_numpy(distinct):
    queries, candidates, positives = random_case(40, 400, 24, distinct)
    ranking = rank_candidates(queries, candidates, positives, 50)
    # Equal rows must tie exactly, so the reference is a product per candidate that sees nothing but its row.
    exact = np.array([[np.dot(q, c) for c in candidates.double().numpy()] for q in queries.double().numpy()])
    order = np.argsort(-exact.astype(np.float32), axis=1, kind="stable")
    np.testing.assert_array_equal(ranking.top.numpy(), order[:, :50])
    np.testing.assert_array_equal(ranking.top[:, 0].numpy(), exact.astype(np.float32).argmax(axis=1))
    assert ranking.top.dtype == torch.int64 and ranking.positive.dtype == torch.float32
    rows = np.arange(40)
    np.testing.assert_allclose(ranking.positive.numpy(), exact[rows, positives.numpy()], atol=6e-8)
    exact[rows, positives.numpy()] = -np.inf
    np.testing.assert_allclose(ranking.hardest_negative.numpy(), exact.max(axis=1), atol=6e-8)


def test_of_several_right_candidates_the_most_similar_one_counts():
    queries, candidates, first = random_case(40, 400, 24, 90)
    positives = torch.stack([first, (first + 7) % 400, first], dim=1)  # one is given twice
    ranking = rank_candidates(queries, candidates, positives, 5, chunk=17)
    exact = ranking_similarities(queries, candidates).numpy()
    rows = np.arange(40)[:, None]
    np.testing.assert_array_equal(ranking.positive.numpy(), exact[rows, positives.numpy()].max(axis=1))
    exact[rows, positives.numpy()] = -np.inf
    np.testing.assert_array_equal(ranking.hardest_negative.numpy(), exact.max(axis=1))
    assert torch.equal(ranking.top, rank_candidates(queries, candidates, first, 5).top)


@pytest.mark.parametrize(("chunk", "block"), [(1024, 16384), (7, 64)])
def test_search_leaves_out_what_a_query_does_not_have(chunk, block, monkeypatch):
    monkeypatch.setattr(ranking, "CANDIDATES_PER_BLOCK", block)
    queries, candidates, _ = random_case(20, 300, 24, 90)
    hidden = torch.rand(20, 300, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[3] = True
    hidden[4, :298] = True
    hidden[5] = False
    index, similarity = search(queries, candidates, 40, chunk=chunk, left_out=tuple(hidden.nonzero().T))
    exact = ranking_similarities(queries, candidates).masked_fill(hidden, -math.inf).numpy()
    order = np.argsort(-exact, axis=1, kind="stable")[:, :40]
    expected = np.take_along_axis(exact, order, 1)
    np.testing.assert_array_equal(similarity.numpy(), expected)
    np.testing.assert_array_equal(index.numpy(), np.where(expected == -math.inf, -1, order))
    assert (
        (index[3] == -1).all()
        and (index[4] >= 0).sum() == 2
        and torch.equal(index[5], search(queries[5:6], candidates, 40)[0][0])
    )


def near_ties(c: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates at about the same distance of the first query, far closer than float32 adds up; zeros and repeats."""
    generator = torch.Generator().manual_seed(2)
    queries = torch.nn.functional.normalize(torch.randn(9, d, generator=generator), dim=1)
    queries[1] = 0
    queries[2] = 1 / math.sqrt(d)  # rounding errors of sums without a change of sign are the largest ones
    rows = queries[0] + 1e-7 * torch.randn(c, d, generator=generator)
    rows[c // 3 :] = torch.rand(c - c // 3, d, generator=generator) + 5
    candidates = torch.nn.functional.normalize(rows, dim=1)
    candidates[::7], candidates[5::11] = candidates[0].clone(), 0
    return queries, candidates


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float64", "long", "broken"])
@pytest.mark.parametrize(("chunk", "block"), [(1024, 16384), (4, 100)])
def test_search_with_products_in_float32_changes_no_bit(form, chunk, block, monkeypatch):
    monkeypatch.setattr(ranking, "CANDIDATES_PER_BLOCK", block)
    errors, screen = [], ranking._screen
    monkeypatch.setattr(ranking, "_screen", lambda *rows: errors.append(screen(*rows)) or errors[-1])
    queries, candidates = near_ties(480, 500)
    if form in ("bfloat16", "float64"):
        queries, candidates = (rows.to(getattr(torch, form)) for rows in (queries, candidates))
    if form == "float64":
        candidates += 1e-9
    if form == "long":
        candidates[:150] *= 3
    if form == "broken":
        candidates[40], candidates[150, 3], candidates[151, 3] = math.nan, math.inf, -math.inf
    hidden = torch.rand(9, 480, generator=torch.Generator().manual_seed(1)) < 0.1
    hidden[4, :470], hidden[5] = True, False
    exact = ranking_similarities(queries, candidates).masked_fill(hidden, -math.inf)
    for k in (1, 30):
        index, similarity = search(queries, candidates, k, chunk=chunk, left_out=tuple(hidden.nonzero().T))
        order = exact.argsort(dim=1, descending=True, stable=True)[:, :k]
        expected = exact.gather(1, order)
        assert torch.equal(similarity, expected)
        assert torch.equal(index, order.masked_fill(expected == -math.inf, -1))
    is_screened = [error > 0 for _, error in errors]
    assert any(is_screened) == (form not in ("long", "broken") or block == 100)
    assert all(is_screened) == (form not in ("long", "broken"))


@pytest.mark.parametrize("length", [1.0, 1.41, 1e-3])
@pytest.mark.parametrize("width", [1, 24, 3584])
def test_products_in_float32_are_within_their_bound(length, width):
    queries, candidates = near_ties(300, width)
    rows = [ranking._fixed_point(part * length) for part in (queries, candidates)]
    similarity, error = ranking._screen(*rows)
    assert 0 < error < 1e-3
    assert (similarity.double() - ranking._product(*rows).double()).abs().max() <= error


def test_products_in_lower_precision_are_not_used(monkeypatch):
    rows = [ranking._fixed_point(part) for part in near_ties(30, 24)]
    assert ranking._screen(*rows)[1] > 0
    for precision in ("high", "medium"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert ranking._screen(*rows)[1] == 0 and torch.equal(ranking._screen(*rows)[0], ranking._product(*rows))

    def mixed() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert ranking._screen(*rows)[1] == 0


def test_paired_similarities_have_the_bits_of_the_ranking():
    queries, candidates, _ = random_case(20, 20, 24, 20)
    assert torch.equal(paired_similarities(queries, candidates), ranking_similarities(queries, candidates).diagonal())


def test_all_candidates_equal_gives_the_indices_in_order():
    queries = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    candidates = queries[:1].repeat(1000, 1)
    ranking = rank_candidates(queries, candidates, torch.tensor([0, 5, 999]), 7)
    assert ranking.top.tolist() == [list(range(7))] * 3
    assert torch.equal(ranking.positive, ranking.hardest_negative)


def test_minus_zero_ties_with_zero_and_negative_similarities_keep_their_order():
    candidates = torch.tensor([[-1.0, 0.0], [-0.5, 0.0], [-0.0, -0.0], [0.0, 0.0], [1.0, 0.0]])
    ranking = rank_candidates(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), candidates, torch.tensor([4, 4]), 5)
    assert ranking.top.tolist() == [[4, 2, 3, 1, 0], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("chunk", [1, 3, 17, 1024])
@pytest.mark.parametrize("block", [10, 127])
def test_chunks_and_blocks_change_no_bit(chunk, block, monkeypatch):
    queries, candidates, positives = random_case(33, 210, 40, 90)
    expected = rank_candidates(queries, candidates, positives, 12)
    monkeypatch.setattr(ranking, "CANDIDATES_PER_BLOCK", block)
    ranked = rank_candidates(queries, candidates, positives, 12, chunk=chunk)
    assert torch.equal(ranked.top, expected.top)
    assert torch.equal(ranked.positive, expected.positive)
    assert torch.equal(ranked.hardest_negative, expected.hardest_negative)


def test_no_more_than_chunk_queries_meet_the_candidates_at_a_time(monkeypatch):
    seen = []
    for name in ("_product", "_screen"):  # of rank_candidates, of search
        original = getattr(ranking, name)
        noted = partial(lambda original, *rows: seen.append(tuple(map(len, rows))) or original(*rows), original)
        monkeypatch.setattr(ranking, name, noted)
    queries, candidates, positives = random_case(10, 30, 8, 30)
    rank_candidates(queries, candidates, positives, 2, chunk=4)
    search(queries, candidates, 2, chunk=4)
    scored, screened = [(4, 30), (4, 30), (2, 30)], [(4, 30)] * 4 + [(2, 30)] * 2  # and then compared in float64
    assert seen == scored + screened


def test_offset_shifts_the_indices():
    queries, candidates, positives = random_case(6, 20, 8, 20)
    here = rank_candidates(queries, candidates, positives, 3)
    shifted = rank_candidates(queries, candidates, positives + 1000, 3, offset=1000)
    assert torch.equal(shifted.top, here.top + 1000)
    assert torch.equal(shifted.positive, here.positive)


def test_fewer_candidates_than_k_are_padded_with_minus_one():
    queries, candidates, _ = random_case(2, 1, 8, 1)
    ranking = rank_candidates(queries, candidates, torch.zeros(2, dtype=torch.int64), 3)
    assert ranking.top.tolist() == [[0, -1, -1]] * 2
    assert ranking.hardest_negative.tolist() == [float("-inf")] * 2


def test_broken_candidate_ranks_last():
    candidates = torch.tensor([[float("nan"), 0.0], [-1.0, 0.0], [0.0, 1.0]])
    ranking = rank_candidates(torch.tensor([[1.0, 0.0]]), candidates, torch.tensor([2]), 3)
    assert ranking.top.tolist() == [[2, 1, 0]]


def test_wrong_arguments_are_named():
    queries, candidates, positives = random_case(2, 5, 8, 5)
    with pytest.raises(ValueError, match="positive 5 is not the label of a candidate"):
        rank_candidates(queries, candidates, torch.tensor([0, 5]), 2)
    with pytest.raises(ValueError, match="k=0"):
        rank_candidates(queries, candidates, positives, 0)


def test_bfloat16_embeddings_are_ranked_in_float32():
    queries, candidates, positives = random_case(5, 50, 16, 50)
    low = rank_candidates(queries.bfloat16(), candidates.bfloat16(), positives, 4)
    same = rank_candidates(queries.bfloat16().float(), candidates.bfloat16().float(), positives, 4)
    assert torch.equal(low.top, same.top) and torch.equal(low.positive, same.positive)


@pytest.mark.parametrize("world", [2, 4])
def test_candidates_spread_over_ranks(world):
    output = run_ranks(world, CHECK, timeout=120)
    assert output.count("all rankings equal") == world


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.4])
def test_auc_and_margin_have_a_sign_where_overlap_has_none(shift):
    generator = torch.Generator().manual_seed(0)
    hardest = torch.randn(150, generator=generator).mul(0.2).round(decimals=1)  # many equal ones
    positive = torch.randn(200, generator=generator).mul(0.2).round(decimals=1) + shift
    slow = [(float(a) > float(b)) + (float(a) == float(b)) / 2 for a in positive for b in hardest]
    assert order_auc(positive, hardest) == pytest.approx(sum(slow) / len(slow))
    assert order_auc(hardest, positive) == pytest.approx(1 - sum(slow) / len(slow))
    slow = [float(a) - float(b) for a, b in zip(positive[:150], hardest)]
    assert mean_margin(positive[:150], hardest) == pytest.approx(sum(slow) / 150, abs=1e-7)
    # The worse model overlaps as little as the better one; only the other two tell them apart.
    better, worse = (torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])), (torch.tensor([0.1]), torch.tensor([0.9]))
    assert overlap_coefficient(*better) == overlap_coefficient(*worse) == 0
    assert (order_auc(*better), order_auc(*worse)) == (1, 0) and mean_margin(*worse) < 0 < mean_margin(*better)


def test_auc_and_margin_leave_out_what_is_not_finite():
    positive, hardest = torch.tensor([0.5, 0.5]), torch.tensor([-torch.inf, 0.25])
    assert order_auc(positive, hardest) == 1 and mean_margin(positive, hardest) == 0.25
    assert math.isnan(order_auc(positive[:1], hardest[:1])) and math.isnan(mean_margin(positive[:1], hardest[:1]))


def test_overlap_coefficient():
    low, high = torch.linspace(0, 0.4, 100), torch.linspace(0.6, 1, 100)
    assert overlap_coefficient(low, high) == 0.0
    assert overlap_coefficient(low, low) == pytest.approx(1.0)
    # Samples of different sizes, and 2 of 4 against 6 of 8 values in the lower of two bins: 0.5 + 0.25 shared.
    a, b = torch.tensor([0.0, 0.1, 0.9, 1.0]), torch.tensor([0.0] * 6 + [1.0] * 2)
    assert overlap_coefficient(a, b, bins=2) == pytest.approx(0.75)
    assert overlap_coefficient(b, a, bins=2) == pytest.approx(0.75)
    assert overlap_coefficient(torch.ones(3), torch.ones(5)) == 1.0
    assert overlap_coefficient(torch.ones(3), torch.tensor([float("-inf")])) == 0.0
    with_gap = torch.tensor([0.0, 1.0, float("-inf")])
    assert overlap_coefficient(with_gap, torch.tensor([0.0, 1.0]), bins=2) == pytest.approx(1.0)


def test_cosines_are_counted_in_equal_bins_and_what_is_not_finite_in_none() -> None:
    counts = cosine_counts(torch.tensor([-1.0, 0.001, 1.0, 1.0000001, -math.inf, math.nan]))
    assert (len(counts), sum(counts), counts[0], counts[25], counts[-1]) == (50, 4, 1, 1, 2)

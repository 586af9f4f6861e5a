"""The loss: the released code's numbers on 1, 2 and 4 real ranks, its schedules, and what the stop-gradient is for."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from logical_gpu import LogicalGpu
from reference import dense_contrastive_loss
from run_ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_llave.config.loss import LossConfig
from megatron_llave.loss import build_loss
from megatron_llave.loss.contrastive import hardness_weighted_contrastive_loss
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.matryoshka import matryoshka_loss
from megatron_llave.loss.schedules import alpha_at, temperature_at

CONFIG = LossConfig(temperature=0.05, alpha=9.0)
CHECK = Path(__file__).parents[1] / "distributed" / "check_loss.py"


def unit_rows(count: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def pairs(query: torch.Tensor, target: torch.Tensor, hard: torch.Tensor | None = None) -> PairEmbeddings:
    return PairEmbeddings(query, target, query.new_zeros(0, query.shape[1]) if hard is None else hard)


@pytest.mark.parametrize(("world", "cases"), [(1, 7), (2, 4), (4, 5)])
def test_golden_cases_and_unequal_rows_on_real_ranks(world: int, cases: int) -> None:
    assert f"{cases} golden cases hold on {world} ranks" in run_ranks(world, CHECK)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 9.0])
def test_equals_the_formula_written_out(alpha: float) -> None:
    ours = [unit_rows(7, seed).requires_grad_() for seed in (0, 1)]
    plain = [x.detach().clone().requires_grad_() for x in ours]
    loss, _ = hardness_weighted_contrastive_loss(pairs(*ours), config=LossConfig(temperature=0.05, alpha=alpha))
    expected = dense_contrastive_loss(*plain, temperature=0.05, alpha=alpha)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for x, y in zip(ours, plain):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


def test_bfloat16_embeddings_are_compared_in_float32() -> None:
    query, target = unit_rows(6, 0).bfloat16(), unit_rows(6, 1).bfloat16()
    loss, _ = hardness_weighted_contrastive_loss(pairs(query, target), config=LossConfig())
    assert loss.dtype == torch.float32
    expected = dense_contrastive_loss(query.double(), target.double(), 0.02, 9.0)
    assert abs(loss.item() - expected.item()) < 1e-4


def test_a_single_pair_has_no_negative() -> None:
    loss, seen = hardness_weighted_contrastive_loss(pairs(unit_rows(1, 0), unit_rows(1, 1)), config=CONFIG)
    assert loss.item() == 0
    assert seen.hardest_negative.tolist() == [-torch.inf]
    assert seen.effective_negatives.tolist() == seen.hardest_share.tolist() == [0]


def test_temperature_falls_geometrically_and_alpha_rises_linearly() -> None:
    config = LossConfig(
        temperature=0.04, temperature_start=0.16, temperature_warmup_steps=100, alpha=9.0, alpha_warmup_steps=10
    )
    assert [temperature_at(config, step) for step in (0, 100, 5000)] == [0.16, 0.04, 0.04]
    assert temperature_at(config, 50) == pytest.approx(0.08)
    assert [alpha_at(config, step) for step in (0, 5, 10, 99)] == [0, 4.5, 9, 9]
    assert temperature_at(LossConfig(), 0) == 0.02
    assert alpha_at(LossConfig(), 0) == 9


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_do_not_change_the_result(chunk: int) -> None:
    whole, parts = ([unit_rows(7, seed).requires_grad_() for seed in (0, 1)] for _ in range(2))
    one, _ = hardness_weighted_contrastive_loss(pairs(*whole), config=CONFIG)
    other, _ = hardness_weighted_contrastive_loss(pairs(*parts), config=CONFIG, chunk=chunk)
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    for x, y in zip(whole, parts):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("directions", ["symmetric", "query_to_target"])
@pytest.mark.parametrize("mask", [False, True])
def test_masked_duplicate_is_not_pushed_away(mask: bool, directions: str) -> None:
    """Pairs 0 and 1 share their target. Orthogonal queries let each similarity's slope be read off the gradient."""
    query, target = torch.eye(6, 24, dtype=torch.float64), unit_rows(6, 1)
    target[1] = target[0]
    target.requires_grad_()
    ids = PairIds(torch.arange(6), torch.tensor([0, 0, 2, 3, 4, 5]), torch.arange(0))
    config = LossConfig(temperature=0.05, mask_same_target=mask, directions=directions)
    loss, _ = hardness_weighted_contrastive_loss(pairs(query, target), ids, config=config)
    loss.backward()
    slope = query @ target.grad.T  # [6, 6] d loss / d cosine
    assert (slope[0, 1] == 0 and slope[1, 0] == 0) if mask else (slope[0, 1] > 1e-3 and slope[1, 0] > 1e-3)
    assert (slope[0, 2:] > 0).all() and (slope.diagonal() < 0).all()


def test_mask_without_ids_is_refused() -> None:
    config = LossConfig(mask_same_target=True)
    for ids, hard in ((None, None), (PairIds(torch.arange(2), torch.arange(2), torch.arange(0)), unit_rows(1, 2))):
        with pytest.raises(ValueError, match="needs the ids of all queries, targets and hard negatives"):
            hardness_weighted_contrastive_loss(pairs(unit_rows(2, 0), unit_rows(2, 1), hard), ids, config=config)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"query \(2, 24\) and target \(3, 24\) must have one shape"):
        hardness_weighted_contrastive_loss(pairs(unit_rows(2, 0), unit_rows(3, 1)), config=CONFIG)
    with pytest.raises(ValueError, match=r"dims=\[4, 25\] go beyond the embedding's 24"):
        matryoshka_loss(pairs(unit_rows(2, 0), unit_rows(2, 1)), config=LossConfig(matryoshka_dims=[4, 25]))


def test_a_copy_of_the_positive_is_not_above_it_by_rounding() -> None:
    """Every target comes twice; with a margin of 0 the copies stay negatives in every chunk."""
    query, target = (torch.nn.functional.normalize(torch.randn(64, 256, generator=g), dim=1) for g in generators(2))
    target[32:] = target[:32]
    config = LossConfig(temperature=0.05, mask_margin=0.0, directions="query_to_target")
    losses = [
        hardness_weighted_contrastive_loss(pairs(query, target), config=config, chunk=chunk)[0].item()
        for chunk in (1, 7, 64)
    ]
    double = hardness_weighted_contrastive_loss(pairs(query.double(), target.double()), config=config)
    assert losses == pytest.approx([double[0].item()] * 3, rel=1e-4)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize(("name", "value"), [("hardness", "none"), ("directions", "target_to_query")])
def test_rule_that_means_nothing_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='{value}' is not one of"):
        LossConfig(**{name: value})


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("has_reward", [False, True])
def test_no_matrix_of_all_pairs_is_made(has_reward: bool) -> None:
    """256 pairs of width 24 in chunks of 8, every rule on: a full matrix would have 256 x 272 elements."""
    query, target, hard = (unit_rows(n, seed).requires_grad_() for seed, n in enumerate((256, 256, 16)))
    ids = PairIds(torch.arange(256), torch.arange(256) // 2, torch.arange(16))
    reward = PairEmbeddings(unit_rows(256, 3), unit_rows(256, 4), unit_rows(16, 5)) if has_reward else None
    config = LossConfig(temperature=0.05, mask_same_target=True, mask_margin=0.1)
    with LargestOutput() as largest:
        loss, _ = hardness_weighted_contrastive_loss(pairs(query, target, hard), ids, reward, config=config, chunk=8)
        loss.backward()
    assert largest.elements == 272 * 24  # the columns, not 256 x 272 logits


def many_pairs(rows: int = 64) -> tuple[PairEmbeddings, PairIds]:
    """Pairs with two targets, three hard negatives and scores each, as `PairEmbeddings.of` knows them; some id is 0."""
    query, target, hard = (unit_rows(rows * n, seed).requires_grad_() for seed, n in enumerate((1, 2, 3)))
    owners = (torch.arange(rows).repeat_interleave(n) for n in (2, 3))
    ids = PairIds(torch.arange(rows), torch.arange(2 * rows), torch.arange(3 * rows) % 7)
    ids.scores = torch.arange(5.0 * rows) % 4
    return PairEmbeddings(query, target, hard, *owners, most_targets=2, most_hard_negatives=3), ids


@pytest.mark.parametrize(
    "changes",
    [{"negatives": "own"}, {"negatives": "own", "soft_labels": "scores"}, {"objective": "cosent"}],
    ids=str,
)
def test_what_lies_beside_a_query_needs_no_large_matrix_and_no_wait(changes: dict) -> None:
    """It is as large as the query's own targets and hard negatives, whose largest number the host knows."""
    embeddings, ids = many_pairs()
    compare = build_loss(replace(CONFIG, mask_same_target=True, mask_margin=0.1, **changes), None)
    unknown = replace(embeddings, most_targets=None, most_hard_negatives=None)
    with LargestOutput() as largest:
        loss, _ = compare(embeddings, ids, None)
        loss.backward()
    assert loss.equal(compare(unknown, ids, None)[0])
    if "objective" not in changes:
        assert largest.elements == 3 * 64 * 24  # the hard negatives, not all pairs of them and of the targets
    with LogicalGpu() as gpu:
        on_gpu, gpu_ids = (
            replace(x, **{f.name: y.detach().to("cuda") for f in fields(x) if torch.is_tensor(y := getattr(x, f.name))})
            for x in (embeddings, ids)
        )
        before = gpu.waits.total()
        compare(on_gpu.map(torch.Tensor.requires_grad_), gpu_ids, None)[0].backward()
        assert gpu.waits.total() == before, gpu.waits


@pytest.mark.parametrize("source", ["self", "ema", "stored"])
def test_matryoshka_is_the_mean_over_renormalised_prefixes(source: str) -> None:
    """The hardness of a prefix is that of the reward model's prefix, but stored vectors stay whole."""
    has_reward, is_stored = source != "self", source == "stored"
    ours = [unit_rows(n, seed).requires_grad_() for seed, n in enumerate((5, 5, 2))]
    plain = [x.detach().clone().requires_grad_() for x in ours]
    judge = PairEmbeddings(unit_rows(5, 3), unit_rows(5, 4), unit_rows(2, 5)) if has_reward else None
    config = LossConfig(temperature=0.1, alpha=2.0, matryoshka_dims=[4, 8, 24], reward=source)
    ours.append(torch.tensor(0.1, dtype=torch.float64).log().requires_grad_())
    plain.append(ours[-1].detach().clone().requires_grad_())
    loss, _ = matryoshka_loss(pairs(*ours[:3]), reward=judge, config=config, log_temperature=ours[3])
    losses = []
    for k in (4, 8, 24):
        query, target, hard = (torch.nn.functional.normalize(x[:, :k], dim=1) for x in plain[:3])
        reward = None
        if has_reward:
            parts = (judge.query, judge.target, judge.hard_negatives)
            width = 24 if is_stored else k
            reward = PairEmbeddings(*(torch.nn.functional.normalize(x[:, :width], dim=1) for x in parts))
        losses.append(dense_contrastive_loss(query, target, plain[3].exp(), 2.0, hard, reward=reward))
    expected = sum(losses) / 3
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for x, y in zip(ours, plain):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-12)


def test_statistics_of_a_known_batch() -> None:
    """Three negatives equally far from each query count as three; one that is much nearer counts as one."""
    query = torch.eye(4, dtype=torch.float64)
    _, even = hardness_weighted_contrastive_loss(pairs(query, query), config=LossConfig(temperature=0.1, alpha=0.0))
    assert even.effective_negatives.tolist() == pytest.approx([3.0] * 4)
    assert even.hardest_share.tolist() == pytest.approx([1 / 3] * 4)
    near = query[[0, 0, 2, 3]]
    _, uneven = hardness_weighted_contrastive_loss(pairs(near, near), config=LossConfig(alpha=0.0))
    assert uneven.effective_negatives[0].item() == pytest.approx(1.0, abs=1e-6)
    assert uneven.hardest_negative[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negatives": "own"},
        {"objective": "cosent"},
        {"soft_labels": "scores", "soft_label_weight": 1.0},
        {"matryoshka_dims": [8, 24]},
    ],
    ids=str,
)
def test_schedules_can_divide_every_loss_in_place(changes: dict) -> None:
    gradients = []
    for divisor in (1, 4):
        rows = [unit_rows(5, seed).requires_grad_() for seed in range(3)]
        scores = torch.arange(10, dtype=torch.float64)
        ids = PairIds(*(torch.arange(5) + 5 * i for i in range(3)), scores=scores)
        compare = build_loss(replace(CONFIG, **changes), None)
        loss, _ = compare(replace(pairs(*rows), hard_rows=torch.arange(5)), ids, None)
        loss /= divisor
        loss.backward()
        gradients.append(rows[0].grad * divisor)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)

"""Under torchrun: the loss on real ranks, against the released code's numbers and against one process with all rows."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from reference import (
    dense_contrastive_loss,
    dense_cosent_loss,
    dense_own_negatives_loss,
    dense_soft_label_loss,
    is_above,
    row_means,
    same_pairs,
)
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed import process_groups
from megatron_llave.loss import build_loss
from megatron_llave.loss.contrastive import LossShare, SimilarityStatistics, hardness_weighted_contrastive_loss
from megatron_llave.loss.cosent import cosent_loss
from megatron_llave.loss.inputs import PairEmbeddings, PairIds

DTYPES = {torch.float64: (1e-12, 1e-12), torch.float32: (5e-6, 1e-5)}  # loss absolute, gradient relative to its maximum
GOLDEN = Path(__file__).parents[1] / "golden" / "loss"


def check_golden(path: Path, group: dist.ProcessGroup) -> None:
    """The stored case's rows, one set per rank."""
    case, rank = np.load(path), group.rank()
    for dtype, (loss_tolerance, gradient_tolerance) in DTYPES.items():
        query, target = (torch.tensor(case[name][rank], dtype=dtype).requires_grad_() for name in ("query", "target"))
        config = LossConfig(temperature=1 / float(case["logit_scale"]), alpha=float(case["alpha"]))
        embeddings = PairEmbeddings(query, target, query.new_zeros(0, query.shape[1]))
        loss, _ = hardness_weighted_contrastive_loss(embeddings, config=config, group=group)
        loss.backward()
        assert loss.dtype == dtype
        assert abs(loss.item() - case["loss_per_rank"][rank]) <= loss_tolerance, (path.name, dtype, loss.item())
        for ours, name in ((query.grad, "grad_query"), (target.grad, "grad_target")):
            error = np.abs(ours.double().numpy() - case[name][rank]).max() / np.abs(case[name]).max()
            assert error <= gradient_tolerance, f"{path.name} {dtype} {name}: {error:.1e}"


RULES = [
    LossConfig(),
    LossConfig(mask_same_target=True),
    LossConfig(mask_margin=0.1),
    LossConfig(mask_same_target=True, mask_margin=0.3, hardness="in_batch"),
    LossConfig(hardness="hard_negatives", directions="query_to_target"),
]


@dataclass
class Case:
    """Rows of all ranks, and which of them this rank has."""

    embeddings: PairEmbeddings
    ids: PairIds
    reward: PairEmbeddings
    own: tuple[slice, slice, slice]
    """This rank's rows, targets and hard negatives."""

    def local(self, dtype: torch.dtype) -> tuple[PairEmbeddings, PairIds, PairEmbeddings]:
        """This rank's part, whose embeddings are leaves."""
        rows, targets, hard = self.own
        parts = [getattr(self.embeddings, name)[part].to(dtype, copy=True) for name, part in zip(NAMES, self.own)]
        mine = [self.embeddings.target_rows[targets] - rows.start, self.embeddings.hard_rows[hard] - rows.start]
        target_rows = mine[0] if len(mine[0]) != len(parts[0]) else None
        embeddings = PairEmbeddings(*(part.requires_grad_() for part in parts), target_rows, mine[1])
        ids = PairIds(*(getattr(self.ids, name)[part] for name, part in zip(NAMES, self.own)))
        ids.scores = torch.cat([part[own] for part, own in zip(self.split_scores(), (targets, hard))])
        judged = (getattr(self.reward, name)[part].to(dtype) for name, part in zip(NAMES, self.own))
        return embeddings, ids, PairEmbeddings(*judged, target_rows, mine[1])

    def split_scores(self) -> tuple[Tensor, ...]:
        """Scores of all targets and of all hard negatives."""
        return self.ids.scores.split([len(self.embeddings.target), len(self.embeddings.hard_negatives)])


NAMES = ("query", "target", "hard_negatives")


def make_case(counts: list, hard_counts: list, several: bool, group: dist.ProcessGroup) -> Case:
    """Random unit rows; with `several`, queries have 1, 2, 3, 1, ... targets."""
    generator = torch.Generator().manual_seed(1)
    numbers = [1 + row % 3 if several else 1 for row in range(sum(counts))]
    bounds = [0, *itertools.accumulate(numbers)]
    firsts = [0, *itertools.accumulate(counts)]
    hard_firsts = [0, *itertools.accumulate(hard_counts)]
    sizes = [sum(counts), bounds[-1], sum(hard_counts)]
    rows, judged = (  # the reward model has another width
        [torch.nn.functional.normalize(torch.randn(n, width, generator=generator).double(), dim=1) for n in sizes]
        for width in (8, 5)
    )
    target_rows = torch.repeat_interleave(torch.arange(sizes[0]), torch.tensor(numbers))
    spread = [
        torch.arange(hard) * max(count, 1) // max(hard, 1) + first
        for count, hard, first in zip(counts, hard_counts, firsts)
    ]
    # Repeated queries, repeated targets, and hard negatives of which some are targets too.
    ids = [torch.arange(sizes[0]) // 2, torch.arange(sizes[1]) % 3, torch.arange(sizes[2]) * 2]
    if several:
        ids[1] = torch.arange(sizes[1]) % 7
    scores = torch.randn(sizes[1] + sizes[2], generator=generator).mul(2).round()  # some are equal
    scores[torch.cat([target_rows, *spread]) % 3 == 1] = torch.nan
    scores[: sizes[1]][target_rows == 3] = torch.nan  # which leaves one score or two
    first, last = firsts[group.rank()], firsts[group.rank() + 1]
    own = slice(first, last), slice(bounds[first], bounds[last])
    own_hard = slice(hard_firsts[group.rank()], hard_firsts[group.rank() + 1])
    embeddings = PairEmbeddings(*rows, target_rows, torch.cat(spread))
    return Case(embeddings, PairIds(*ids, scores=scores), PairEmbeddings(*judged), (*own, own_hard))


def check_unequal_rows(
    case: Case, rules: LossConfig, has_reward: bool, group: dist.ProcessGroup, dtype: torch.dtype = torch.float64
) -> None:
    """Ranks with different numbers of rows and hard negatives against all rows in one process, forward and backward."""
    config = replace(rules, temperature=0.1, alpha=9.0)

    def ours(embeddings: PairEmbeddings, ids: PairIds, reward: PairEmbeddings, log_temperature: Tensor) -> LossShare:
        settings = {"config": config, "group": group, "log_temperature": log_temperature, "chunk": 2}
        return hardness_weighted_contrastive_loss(embeddings, ids, reward if has_reward else None, **settings)

    def dense(everything: PairEmbeddings, ids: PairIds, reward: PairEmbeddings, temperature: Tensor) -> Tensor:
        rows = everything.target_rows.tolist()
        parts = everything.query, everything.target, temperature, 9.0, everything.hard_negatives
        reward = reward if has_reward else None
        return dense_contrastive_loss(*parts, ids.query, ids.target, ids.hard_negatives, reward, rules, rows)

    seen = check_against(dense, ours, case, group, dtype, str(rules))
    if dtype == torch.float64:
        check_similarities(seen, case, case.reward if has_reward else case.embeddings, rules)


def check_against(
    dense: Callable, ours: Callable, case: Case, group: dist.ProcessGroup, dtype: torch.dtype, what: str
) -> SimilarityStatistics:
    """A loss of this rank's part against that of all rows, forward and backward."""
    loss_tolerance, gradient_tolerance = DTYPES[dtype]
    everything = replace(
        case.embeddings, **{name: getattr(case.embeddings, name).clone().requires_grad_() for name in NAMES}
    )
    log_temperature = torch.tensor(0.1, dtype=torch.float64).log().requires_grad_()
    own_log = log_temperature.detach().to(dtype).requires_grad_()
    expected = dense(everything, case.ids, case.reward, log_temperature.exp())
    expected.backward()
    embeddings, ids, reward = case.local(dtype)
    loss, seen = ours(embeddings, ids, reward, own_log)
    loss.backward()
    means = torch.stack([loss.detach(), torch.zeros_like(own_log) if own_log.grad is None else own_log.grad])
    dist.all_reduce(means, group=group)
    wanted = torch.stack([expected.detach(), torch.zeros(()) if log_temperature.grad is None else log_temperature.grad])
    loss_error, error = (means.double() / group.size() - wanted).abs()
    assert loss_error <= loss_tolerance, f"{what}: {loss_error:.1e}"
    assert error <= gradient_tolerance * wanted[1].abs().clamp_min(1), f"{what} temperature: {error:.1e}"
    full = [getattr(everything, name).grad for name in NAMES]
    largest = max(float(x.abs().max()) for x in full if x is not None and x.numel()) or 1.0
    for name, whole, part in zip(NAMES, full, case.own):
        own = getattr(embeddings, name).grad
        if len(getattr(embeddings, name)):
            wanted = torch.zeros(()) if whole is None else whole[part]
            error = ((0 if own is None else own.double()) / group.size() - wanted).abs().max() / largest
            assert error <= gradient_tolerance, f"{what} {dtype} {name}: {error:.1e}"
    return seen


def check_similarities(seen: SimilarityStatistics, case: Case, judge: PairEmbeddings, rules: LossConfig) -> None:
    """The statistics from matrices: a masked pair is nobody's hardest negative and has no weight."""
    cosines, hardness = (x.query @ torch.cat([x.target, x.hard_negatives]).T for x in (case.embeddings, judge))
    rows, own = case.embeddings.target_rows.tolist(), case.own[0]
    positive = row_means(cosines, rows)
    hidden = same_pairs(rows, case.ids.query, case.ids.target, case.ids.hard_negatives, rules)
    hidden |= is_above(cosines, positive[:, None], rules)
    weighted = torch.full_like(cosines, 9.0)
    weighted[:, : len(rows)] *= rules.hardness in ("in_batch", "all")
    weighted[:, len(rows) :] *= rules.hardness in ("hard_negatives", "all")
    weights = (cosines / 0.1 + weighted * hardness).exp().masked_fill(hidden, 0.0)[own]
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-300)
    first = slice(0, len(seen.effective_negatives))  # of the first chunk
    torch.testing.assert_close(seen.positive, positive[own])
    torch.testing.assert_close(seen.hardest_negative, cosines.masked_fill(hidden, -torch.inf)[own].amax(1))
    effective = weights.sum(1) ** 2 / (weights**2).sum(1).clamp_min(1e-30)
    torch.testing.assert_close(seen.effective_negatives, effective[first])
    torch.testing.assert_close(seen.hardest_share, weights.amax(1)[first])  # fewer than 100 negatives: 1 % is one


OWN_RULES = [
    LossConfig(temperature=0.1, negatives="own"),
    LossConfig(temperature=0.1, negatives="own", mask_same_target=True, mask_margin=0.1, hardness="in_batch"),
    LossConfig(temperature=0.1, negatives="own", soft_labels="scores", soft_label_weight=0.5, contrastive_weight=0.25),
]


def check_own_negatives(case: Case, rules: LossConfig, has_reward: bool, group: dist.ProcessGroup) -> None:
    """Rows against their own hard negatives alone, beside soft labels or not."""

    def ours(embeddings: PairEmbeddings, ids: PairIds, reward: PairEmbeddings, log_temperature: Tensor) -> LossShare:
        return build_loss(rules, group, log_temperature)(embeddings, ids, reward if has_reward else None)

    def dense(everything: PairEmbeddings, ids: PairIds, reward: PairEmbeddings, temperature: Tensor) -> Tensor:
        loss = dense_own_negatives_loss(everything, temperature, rules, ids, reward if has_reward else None)
        if rules.soft_labels is None:
            return loss
        return 0.25 * loss + 0.5 * dense_soft_label_loss(everything, ids.scores, temperature, rules)

    check_against(dense, ours, case, group, torch.float64, str(rules))


def check_graded(case: Case, group: dist.ProcessGroup) -> None:
    """Soft labels alone, in both forms and with temperatures of their own, and the order of graded pairs."""
    labels = LossConfig(soft_labels="scores", contrastive_weight=0.0, temperature=0.1)
    soft = [labels, replace(labels, soft_label_loss="symmetric_kl", soft_label_temperature=3.0)]
    soft.append(replace(soft[1], soft_label_student_temperature=0.3, matryoshka_dims=[4, 6]))
    for rules in soft:

        def dense(everything: PairEmbeddings, ids: PairIds, _, temperature: Tensor, rules=rules) -> Tensor:
            losses = []
            for k in rules.matryoshka_dims or [8]:
                prefix = everything.map(lambda x, k=k: torch.nn.functional.normalize(x[:, :k]) if k < 8 else x)
                losses.append(dense_soft_label_loss(prefix, ids.scores, temperature, rules))
            return torch.stack(losses).mean()

        def ours(embeddings: PairEmbeddings, ids: PairIds, _, log_temperature: Tensor, rules=rules) -> LossShare:
            return build_loss(rules, group, log_temperature)(embeddings, ids, None)

        seen = check_against(dense, ours, case, group, torch.float64, str(rules))
        rows = torch.cat([case.embeddings.target_rows, case.embeddings.hard_rows])
        counts = torch.bincount(rows[~case.ids.scores.isnan()], minlength=len(case.embeddings.query))[case.own[0]]
        assert seen.soft_label.isnan().equal(counts < 2), f"{rules}: {seen.soft_label} for {counts} scores"

    def order(everything: PairEmbeddings, ids: PairIds, _, temperature: Tensor) -> Tensor:
        return dense_cosent_loss(everything, ids.scores, temperature)

    def our_order(embeddings: PairEmbeddings, ids: PairIds, _, log_temperature: Tensor) -> LossShare:
        config = LossConfig(temperature=0.1, objective="cosent")
        settings = {"config": config, "group": group, "log_temperature": log_temperature, "chunk": 3}
        return cosent_loss(embeddings, ids, **settings)

    check_against(order, our_order, case, group, torch.float64, "cosent")


def main() -> None:
    """Every golden case of this number of ranks, then unequal rows."""
    world = process_groups.initialize_distributed(60)
    group = dist.group.WORLD
    cases = sorted(GOLDEN.glob(f"*_w{world}_*.npz"))
    assert cases, f"no golden case for {world} ranks"
    for path in cases:
        check_golden(path, group)
    rows_and_hard = {
        1: [([5], [0]), ([6], [3])],
        2: [([3, 2], [0, 0]), ([4, 0], [1, 3]), ([4, 4], [2, 0])],
        4: [([1, 2, 3, 4], [0, 0, 0, 0]), ([5, 0, 0, 2], [0, 2, 1, 0]), ([2, 2, 2, 2], [1, 1, 1, 1])],
    }[world]
    for counts, hard_counts in rows_and_hard:
        case = make_case(counts, hard_counts, False, group)
        for rules in RULES:
            for has_reward in (False, True):
                check_unequal_rows(case, rules, has_reward, group)
        check_unequal_rows(case, LossConfig(), True, group, torch.float32)
    for counts, hard_counts in {
        1: [([5], [7])],
        2: [([4, 2], [5, 1]), ([3, 0], [4, 0])],  # in the first, both ranks have scores
        4: [([2, 0, 1, 3], [3, 0, 0, 4])],
    }[world]:
        case = make_case(counts, hard_counts, True, group)
        for number, rules in enumerate(RULES):
            check_unequal_rows(case, rules, number % 2 == 0, group)
        for number, rules in enumerate(OWN_RULES):
            check_own_negatives(case, rules, number % 2 == 0, group)
        check_own_negatives(make_case(counts, hard_counts, False, group), OWN_RULES[0], False, group)
        check_graded(case, group)
    print(f"{len(cases)} golden cases hold on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

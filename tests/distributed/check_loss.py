"""Under torchrun: the loss on real ranks, against the released code's numbers and against one process with all rows."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from reference import dense_contrastive_loss, same_pairs

from megatron_llave.batch import PairEmbeddings, PairIds
from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed import process_groups
from megatron_llave.loss.contrastive import SimilarityStatistics, hardness_weighted_contrastive_loss

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


def check_unequal_rows(
    counts: list, hard_counts: list, rules: LossConfig, has_reward: bool, group, dtype: torch.dtype = torch.float64
) -> None:
    """Ranks with different numbers of rows and hard negatives against all rows in one process, forward and backward."""
    loss_tolerance, gradient_tolerance = DTYPES[dtype]
    generator = torch.Generator().manual_seed(1)
    sizes = [sum(counts), sum(counts), sum(hard_counts)]
    rows, judged = (  # the reward model has another width
        [torch.nn.functional.normalize(torch.randn(n, width, generator=generator).double(), dim=1) for n in sizes]
        for width in (8, 5)
    )
    # Repeated queries, repeated targets, and hard negatives of which some are targets too.
    ids = [torch.arange(sizes[0]) // 2, torch.arange(sizes[0]) % 3, torch.arange(sizes[2]) * 2]
    full = [x.clone().requires_grad_() for x in rows]
    log_temperature = torch.tensor(0.1, dtype=torch.float64).log().requires_grad_()
    reward = PairEmbeddings(*judged) if has_reward else None
    expected = dense_contrastive_loss(*full[:2], log_temperature.exp(), 9.0, full[2], *ids, reward, rules)
    expected.backward()
    own = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
    own_hard = slice(sum(hard_counts[: group.rank()]), sum(hard_counts[: group.rank() + 1]))
    slices = [own, own, own_hard]
    local = [x[part].to(dtype, copy=True).requires_grad_() for x, part in zip(rows, slices)]
    reward = PairEmbeddings(*(x[part].to(dtype) for x, part in zip(judged, slices))) if has_reward else None
    own_ids = PairIds(*(x[part] for x, part in zip(ids, slices)))
    config = replace(rules, temperature=0.1, alpha=9.0)
    own_log = log_temperature.detach().to(dtype).requires_grad_()
    loss, seen = hardness_weighted_contrastive_loss(
        PairEmbeddings(*local), own_ids, reward, config=config, group=group, log_temperature=own_log, chunk=2
    )
    loss.backward()
    means = torch.stack([loss.detach(), own_log.grad])
    dist.all_reduce(means, group=group)
    loss_error, error = (means.double() / group.size() - torch.stack([expected.detach(), log_temperature.grad])).abs()
    assert loss_error <= loss_tolerance
    assert error <= gradient_tolerance * log_temperature.grad.abs().clamp_min(1), f"{rules} temperature: {error:.1e}"
    for ours, reference, part in zip(local, full, slices):
        if len(ours):
            error = (ours.grad.double() / group.size() - reference.grad[part]).abs().max() / reference.grad.abs().max()
            assert error <= gradient_tolerance, f"{counts} {hard_counts} {rules} {dtype}: {error:.1e}"
    if dtype == torch.float64:
        check_similarities(seen, rows, judged if has_reward else rows, ids, slices[0], rules)


def check_similarities(seen: SimilarityStatistics, rows: list, judged: list, ids: list, own: slice, rules) -> None:
    """The statistics from matrices: a masked pair is nobody's hardest negative and has no weight."""
    cosines, hardness = (x[0] @ torch.cat(x[1:]).T for x in (rows, judged))
    positive = cosines.diagonal()[:, None].clone()
    hidden = torch.eye(len(cosines), cosines.shape[1], dtype=torch.bool)
    if rules.mask_margin is not None:
        hidden |= cosines > positive + rules.mask_margin
    if rules.mask_same_target:
        hidden |= same_pairs(*ids)
    weighted = torch.full_like(cosines, 9.0)
    weighted[:, : len(cosines)] *= rules.hardness in ("in_batch", "all")
    weighted[:, len(cosines) :] *= rules.hardness in ("hard_negatives", "all")
    weights = (cosines / 0.1 + weighted * hardness).exp().masked_fill(hidden, 0.0)[own]
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-300)
    first = slice(0, len(seen.effective_negatives))  # of the first chunk
    torch.testing.assert_close(seen.positive, positive[own, 0])
    torch.testing.assert_close(seen.hardest_negative, cosines.masked_fill(hidden, -torch.inf)[own].amax(1))
    effective = weights.sum(1) ** 2 / (weights**2).sum(1).clamp_min(1e-30)
    torch.testing.assert_close(seen.effective_negatives, effective[first])
    torch.testing.assert_close(seen.hardest_share, weights.amax(1)[first])  # fewer than 100 negatives: 1 % is one


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
        for rules in RULES:
            for has_reward in (False, True):
                check_unequal_rows(counts, hard_counts, rules, has_reward, group)
        check_unequal_rows(counts, hard_counts, LossConfig(), True, group, torch.float32)
    print(f"{len(cases)} golden cases hold on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

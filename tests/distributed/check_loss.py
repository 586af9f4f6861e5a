"""Under torchrun: the loss on real ranks, against the released code's numbers and against one process with all rows."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from reference import dense_contrastive_loss

from megatron_llave import parallel
from megatron_llave.batch import PairEmbeddings
from megatron_llave.loss import NegativeRules, SimilarityStatistics, hardness_weighted_contrastive_loss

DTYPES = {torch.float64: (1e-12, 1e-12), torch.float32: (5e-6, 1e-5)}  # loss absolute, gradient relative to its maximum
GOLDEN = Path(__file__).parents[1] / "golden" / "loss"


def check_golden(path: Path, group: dist.ProcessGroup) -> None:
    """The stored case's rows, one set per rank."""
    case, rank = np.load(path), group.rank()
    for dtype, (loss_tolerance, gradient_tolerance) in DTYPES.items():
        query, target = (torch.tensor(case[name][rank], dtype=dtype).requires_grad_() for name in ("query", "target"))
        loss, _ = hardness_weighted_contrastive_loss(
            query, target, 1 / float(case["logit_scale"]), float(case["alpha"]), group
        )
        loss.backward()
        assert loss.dtype == dtype
        assert abs(loss.item() - case["loss_per_rank"][rank]) <= loss_tolerance, (path.name, dtype, loss.item())
        for ours, name in ((query.grad, "grad_query"), (target.grad, "grad_target")):
            error = np.abs(ours.double().numpy() - case[name][rank]).max() / np.abs(case[name]).max()
            assert error <= gradient_tolerance, f"{path.name} {dtype} {name}: {error:.1e}"


RULES = [
    NegativeRules(),
    NegativeRules(mask_same_target=True),
    NegativeRules(mask_margin=0.1),
    NegativeRules(mask_same_target=True, mask_margin=0.3, hardness="in_batch"),
    NegativeRules(hardness="hard_negatives", directions="query_to_target"),
]


def check_unequal_rows(counts: list, hard_counts: list, rules: NegativeRules, has_reward: bool, group) -> None:
    """Ranks with different numbers of rows and hard negatives against all rows in one process, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    sizes = [sum(counts), sum(counts), sum(hard_counts)]
    rows, judged = (
        [torch.nn.functional.normalize(torch.randn(n, 8, generator=generator).double(), dim=1) for n in sizes]
        for _ in range(2)
    )
    # Repeated queries, repeated targets, and hard negatives of which some are targets too.
    ids = [torch.arange(sizes[0]) // 2, torch.arange(sizes[0]) % 3, torch.arange(sizes[2]) * 2]
    full = [x.clone().requires_grad_() for x in rows]
    reward = PairEmbeddings(*judged) if has_reward else None
    expected = dense_contrastive_loss(*full[:2], 0.1, 9.0, full[2], *ids, reward, rules)
    expected.backward()
    own = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
    own_hard = slice(sum(hard_counts[: group.rank()]), sum(hard_counts[: group.rank() + 1]))
    slices = [own, own, own_hard]
    local = [x[part].clone().requires_grad_() for x, part in zip(rows, slices)]
    reward = PairEmbeddings(*(x[part] for x, part in zip(judged, slices))) if has_reward else None
    own_ids = [x[part] for x, part in zip(ids, slices)]
    loss, seen = hardness_weighted_contrastive_loss(
        *local[:2], 0.1, 9.0, group, local[2], *own_ids, reward, rules, chunk=2
    )
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    torch.testing.assert_close(mean / group.size(), expected.detach(), rtol=0, atol=1e-12)
    for ours, reference, part in zip(local, full, slices):
        if len(reference):
            torch.testing.assert_close(ours.grad / group.size(), reference.grad[part], rtol=0, atol=1e-12)
    check_similarities(seen, rows, ids, slices[0], rules)


def check_similarities(seen: SimilarityStatistics, rows: list, ids: list, own: slice, rules: NegativeRules) -> None:
    """A masked pair is nobody's hardest negative."""
    query, target, hard = rows
    cosines = (query @ torch.cat([target, hard]).T)[own]
    places = torch.arange(len(cosines)), torch.arange(own.start, own.stop)
    positive = cosines[places]
    torch.testing.assert_close(seen.positive, positive)
    if rules.mask_margin is not None:
        cosines[cosines > positive[:, None] + rules.mask_margin] = -1
    if rules.mask_same_target:
        cosines[ids[1][own, None] == torch.cat(ids[1:])] = -1
    cosines[places] = -1
    torch.testing.assert_close(seen.hardest_negative, cosines.amax(1))


def main() -> None:
    """Every golden case of this number of ranks, then unequal rows."""
    world = parallel.start_processes(60)
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
    print(f"{len(cases)} golden cases hold on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

"""Under torchrun: the loss on real ranks, against the released code's numbers and against one process with all rows."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from reference import dense_contrastive_loss

from megatron_llave import parallel
from megatron_llave.loss import NegativeRules, hardness_weighted_contrastive_loss

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


def check_unequal_rows(counts: list[int], hard_counts: list[int], rules: NegativeRules, group) -> None:
    """Ranks with different numbers of rows and hard negatives against all rows in one process, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    sizes = [sum(counts), sum(counts), sum(hard_counts)]
    rows = [torch.nn.functional.normalize(torch.randn(n, 8, generator=generator).double(), dim=1) for n in sizes]
    ids = [torch.arange(sum(counts)) // 2, torch.arange(sum(counts)) % 3]  # repeated queries, repeated targets
    full = [x.clone().requires_grad_() for x in rows]
    expected = dense_contrastive_loss(*full[:2], 0.1, 9.0, full[2], *ids, rules)
    expected.backward()
    own = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
    own_hard = slice(sum(hard_counts[: group.rank()]), sum(hard_counts[: group.rank() + 1]))
    slices = [own, own, own_hard]
    local = [x[part].clone().requires_grad_() for x, part in zip(rows, slices)]
    loss, seen = hardness_weighted_contrastive_loss(
        *local[:2], 0.1, 9.0, group, local[2], ids[0][own], ids[1][own], rules, chunk=2
    )
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    torch.testing.assert_close(mean / group.size(), expected.detach(), rtol=0, atol=1e-12)
    for ours, reference, part in zip(local, full, slices):
        if len(reference):
            torch.testing.assert_close(ours.grad / group.size(), reference.grad[part], rtol=0, atol=1e-12)
    cosines = (full[0] @ torch.cat(full[1:]).T).detach()[own]
    places = torch.arange(len(cosines)), torch.arange(own.start, own.stop)
    torch.testing.assert_close(seen.positive, cosines[places])
    cosines[places] = -2
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
            check_unequal_rows(counts, hard_counts, rules, group)
    print(f"{len(cases)} golden cases hold on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

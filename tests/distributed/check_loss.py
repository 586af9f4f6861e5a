"""Under torchrun: the loss on real ranks, against the released code's numbers and against one process with all rows."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from reference import dense_contrastive_loss

from megatron_llave import parallel
from megatron_llave.loss import hardness_weighted_contrastive_loss

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


def check_unequal_rows(counts: list[int], group: dist.ProcessGroup) -> None:
    """Ranks that lost unreadable pairs: the mean over ranks is the mean over rows, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.nn.functional.normalize(torch.randn(sum(counts), 16, generator=generator), dim=1) for _ in range(2)]
    full = [x.double().requires_grad_() for x in rows]
    expected = dense_contrastive_loss(*full, temperature=0.05, alpha=9.0)
    expected.backward()
    own = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
    local = [x[own].double().requires_grad_() for x in rows]
    loss, seen = hardness_weighted_contrastive_loss(*local, temperature=0.05, alpha=9.0, group=group)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    torch.testing.assert_close(mean / group.size(), expected.detach(), rtol=0, atol=1e-12)
    for ours, reference in zip(local, full):
        torch.testing.assert_close(ours.grad / group.size(), reference.grad[own], rtol=0, atol=1e-12)
    cosines = (full[0] @ full[1].T).detach()[own]
    torch.testing.assert_close(seen.positive, cosines[torch.arange(len(cosines)), torch.arange(own.start, own.stop)])
    cosines[torch.arange(len(cosines)), torch.arange(own.start, own.stop)] = -2
    torch.testing.assert_close(seen.hardest_negative, cosines.amax(1) if len(cosines) else cosines.new_zeros(0))


def main() -> None:
    """Every golden case of this number of ranks, then unequal rows."""
    world = parallel.start_processes(60)
    group = dist.group.WORLD
    cases = sorted(GOLDEN.glob(f"*_w{world}_*.npz"))
    assert cases, f"no golden case for {world} ranks"
    for path in cases:
        check_golden(path, group)
    for counts in {1: [[5]], 2: [[3, 2], [4, 0]], 4: [[1, 2, 3, 4], [5, 0, 0, 2]]}[world]:
        check_unequal_rows(counts, group)
    print(f"{len(cases)} golden cases hold on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

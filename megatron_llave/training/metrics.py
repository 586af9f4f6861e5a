"""What a step's loss saw, put together over micro batches and data-parallel ranks: the similarities in the run's log.

No forward of its own: everything comes from the numbers that the loss kept on its way.
"""

import resource

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.distributed.collectives import all_gather_rows, row_counts
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.loss.similarities import cosine_counts, overlap_coefficient

MEANS = {
    "positive": "positive_similarity",
    "hardest_negative": "hardest_negative_similarity",
    "effective_negatives": "effective_negatives",
    "hardest_share": "hardest_share",
}
"""What the loss saw of each query -> under which name its mean stands in the step's record."""


def step_metrics(shares: list[LossShare], batches: list[PairBatch], group: dist.ProcessGroup) -> dict[str, float | int]:
    """Loss, mean similarities and their overlap over the step's pairs, and counts over all data-parallel ranks.

    Only the last pipeline stage has shares of the loss: elsewhere everything but the counts is 0.
    """
    device = batches[0].query_ids.device
    counted = ("num_pairs", "num_hard_negatives", "num_skipped", "num_cut")
    rows = [batch.sequences for batch in batches]
    lengths = [row.cu_seqlens[: row.num_sequences + 1].diff().double() for row in rows]
    counts = [sum(row.num_tokens for row in rows), sum(len(row.tiles) for row in rows)]
    counts += [sum(int((length**2).sum()) for length in lengths)]
    counts += [sum(getattr(batch, name) for batch in batches) for name in counted]
    values = [_values(shares, name, device) for name in MEANS]
    finite = [x.isfinite() for x in values]  # a query without negatives has no hardest one
    sums = [x.masked_fill(~ok, 0.0).sum() for x, ok in zip(values, finite)]
    loss = torch.stack([loss for loss, _ in shares]).mean() if shares else torch.zeros((), device=device)
    own = [x.double() for x in (loss, *sums, *(ok.sum() for ok in finite))]
    totals = torch.cat([torch.stack(own), torch.tensor(counts, dtype=torch.float64, device=device)])
    dist.all_reduce(totals, group=group)
    loss, *totals = totals.tolist()
    sums, lengths, counts = totals[: len(MEANS)], totals[len(MEANS) : 2 * len(MEANS)], totals[2 * len(MEANS) :]
    means = {record: total / max(1, length) for record, total, length in zip(MEANS.values(), sums, lengths)}
    overlap = {"similarity_overlap": overlap_coefficient(*similarities(shares, group, device))}
    names = ("tokens", "tiles", "squared_lengths", "pairs", "hard_negatives", "skipped", "cut")
    return {"loss": loss / group.size(), **means, **overlap, **dict(zip(names, map(int, counts)))}


def histograms(shares: list[LossShare], group: dist.ProcessGroup, device: torch.device) -> dict[str, list[int]]:
    """Queries per bin (retrieval.cosine_counts): the cosine of the positive, and that of the hardest negative."""
    counted = map(cosine_counts, similarities(shares, group, device))
    return dict(zip(("positive_histogram", "hardest_negative_histogram"), counted))


def similarities(shares: list[LossShare], group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine of each query's positive and of its hardest negative, over the step's pairs of all ranks: two [B]."""
    own = torch.stack([_values(shares, name, device) for name in ("positive", "hardest_negative")], dim=1)  # [b, 2]
    [counts] = row_counts(group, own)
    return all_gather_rows(own, counts, group).unbind(1)


def peak_memory_gb() -> float:
    """Most memory this rank has held so far: allocated on its GPU, or resident on a CPU; 1e9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _values(shares: list[LossShare], name: str, device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, device=device), *(getattr(statistics, name) for _, statistics in shares)])

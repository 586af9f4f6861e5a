"""What a step's loss saw, put together over micro batches and data-parallel ranks: the similarities in the run's log.

No forward of its own: everything comes from the numbers that the loss kept on its way.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.loss import Seen
from megatron_llave.parallel import all_gather_rows, row_counts
from megatron_llave.retrieval import overlap_coefficient

MEANS = {
    "positive": "positive_similarity",
    "hardest_negative": "hardest_negative_similarity",
    "effective_negatives": "effective_negatives",
    "hardest_share": "hardest_share",
}
"""What the loss saw of each query -> under which name its mean stands in the step's record."""

HISTOGRAM_BINS = 50
"""Equal bins from -1 to 1."""


def step_metrics(seen: list[Seen], batches: list[PairBatch], group: dist.ProcessGroup) -> dict[str, float | int]:
    """Loss, mean similarities and their overlap over the step's pairs, and counts over all data-parallel ranks.

    Nothing is seen before the last pipeline stage: everything but the counts is 0 there.
    """
    device = batches[0].query_ids.device
    losses = torch.stack([loss for loss, _ in seen]).mean() if seen else torch.zeros(())
    values = [_values(seen, name, device) for name in MEANS]
    tokens = sum(int(batch.sequences.cu_seqlens[batch.sequences.num_sequences]) for batch in batches)
    counted = ("num_pairs", "num_hard_negatives", "num_skipped")
    counts = [tokens, *(sum(getattr(batch, name) for batch in batches) for name in counted)]
    numbers = [float(losses), *counts, *(float(x.sum()) for x in values), *map(len, values)]
    totals = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(totals, group=group)
    loss, *totals = totals.tolist()
    counts, sums, lengths = totals[:4], totals[4 : 4 + len(MEANS)], totals[4 + len(MEANS) :]
    means = {record: total / max(1, length) for record, total, length in zip(MEANS.values(), sums, lengths)}
    overlap = {"similarity_overlap": overlap_coefficient(*similarities(seen, group, device))}
    names = ("tokens", "pairs", "hard_negatives", "skipped")
    return {"loss": loss / group.size(), **means, **overlap, **dict(zip(names, map(int, counts)))}


def histograms(seen: list[Seen], group: dist.ProcessGroup, device: torch.device) -> dict[str, list[int]]:
    """Queries per bin of HISTOGRAM_BINS: the cosine of the positive, and that of the hardest negative."""
    names = ("positive_histogram", "hardest_negative_histogram")
    counted = [torch.histc(x.float().clamp(-1, 1), HISTOGRAM_BINS, -1, 1) for x in similarities(seen, group, device)]
    return {name: counts.int().tolist() for name, counts in zip(names, counted)}


def similarities(seen: list[Seen], group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine of each query's positive and of its hardest negative, over the step's pairs of all ranks: two [B]."""
    own = torch.stack([_values(seen, name, device) for name in ("positive", "hardest_negative")], dim=1)  # [b, 2]
    return all_gather_rows(own, row_counts(own, group), group).unbind(1)


def _values(seen: list[Seen], name: str, device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, device=device), *(getattr(statistics, name) for _, statistics in seen)])

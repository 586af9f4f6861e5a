"""The record of a step for the run's log, reduced over micro batches and data-parallel ranks.

The similarities need no forward pass of their own: they come from the statistics that the loss has kept.
"""

import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import PairBatch, rows_of_ranks, to_device
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.model import PARTS
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed.collectives import all_gather_rows, row_counts
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.loss.similarities import HISTOGRAM_BINS, cosine_counts, mean_margin, order_auc, overlap_coefficient
from megatron_llave.models import family_of
from megatron_llave.planning.flops import Work, achieved

MEANS = {
    "positive": "positive_similarity",
    "hardest_negative": "hardest_negative_similarity",
    "effective_negatives": "effective_negatives",
    "hardest_share": "hardest_share",
    "soft_label": "soft_label_loss",
}
"""Field of the similarity statistics -> name of its mean, over the queries that have it, in the record."""

GRADIENT_NORMS = ("gradient_norm", *(f"gradient_norm_{part}" for part in PARTS))
"""Names in the record of the norm of the whole gradient and of those of the parts of the model."""

HISTOGRAM_RANGES = {
    "positive_histogram": (-1, 1),
    "hardest_negative_histogram": (-1, 1),
    "hardest_share_histogram": (0, 1),
}
"""Name of a histogram in the record -> lower edge of its first bin, upper edge of its last one; bins are equal."""

COMPARISONS = {"overlap": overlap_coefficient, "margin": mean_margin, "auc": order_auc}
"""Name in the record, after `similarity_` -> comparison of the cosines of positives and hardest negatives."""


@dataclass
class StepResult:
    """What `train_step` returns, from which the record of the step is made."""

    config: LossConfig
    """The loss, with the temperature and alpha of the step."""
    batches: list[PairBatch]
    """This rank's micro batches."""
    shares: list[LossShare]
    """The result of each call of the loss; an empty list on all pipeline stages but the last."""
    gradient_norms: list[float]
    """Norms before clipping, of the whole gradient and of that of each of PARTS."""
    learning_rate: float
    """Learning rate of the step's update."""
    temperature_gradient: float | None = None
    """Derivative of the loss with respect to the logarithm of the temperature; None: this step does not learn it."""


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens after `step`; never with an interval of 0."""
    return interval > 0 and step % interval == 0


def collect(
    cfg: RunConfig, step: int, result: StepResult, group: dist.ProcessGroup, started: float, data_seconds: float
) -> dict[str, float | int | str | list[int]]:
    """The record of a step. Only the last pipeline stage knows loss and similarities: they are 0 on the others.

    Args:
        cfg: the run's configuration.
        step: number of the step, from 1.
        result: of `train_step`.
        group: the data-parallel ranks.
        started: time.perf_counter() when the step began to wait for its data.
        data_seconds: how long it waited.
    """
    cost, rows = family_of(cfg.model).cost, [batch.sequences for batch in result.batches]
    pairs = sum(cost.patch_pairs(cfg.model, row.grids) for row in rows)
    record = {"step": step, "subset": result.batches[0].subset, "learning_rate": result.learning_rate}
    record |= {"temperature": result.config.temperature, "alpha": result.config.alpha}
    if result.temperature_gradient is not None:
        record["temperature_gradient"] = result.temperature_gradient
    record |= dict(zip(GRADIENT_NORMS, result.gradient_norms))
    record |= step_metrics(result.shares, result.batches, group, pairs)
    if is_due(step, cfg.log.histogram_interval):
        record |= histograms(result.shares, result.batches, group)
    seconds = time.perf_counter() - started
    work = Work(*(record[name] for name in ("tokens", "squared_lengths", "tiles", "patch_pairs")))
    record |= {"seconds": seconds, "data_seconds": data_seconds, "memory_gb": peak_memory_gb()}
    return record | achieved(cfg.model, work, seconds, dist.get_world_size(), cfg.log.peak_tflops, cfg.lora.parts)


def step_metrics(
    shares: list[LossShare], batches: list[PairBatch], group: dist.ProcessGroup, patch_pairs: int = 0
) -> dict[str, float | int]:
    """Loss, mean similarities and how they compare over the step's pairs, and counts, over all data-parallel ranks.

    Without shares of the loss, as on all pipeline stages but the last, everything but the counts is 0 or NaN.
    `patch_pairs` is what the attention of the vision encoder costs this rank's micro batches, see planning.flops.Work.
    """
    device = batches[0].query_ids.device
    rows = [batch.sequences for batch in batches]
    counts = {
        "tokens": sum(row.num_tokens for row in rows),
        "tiles": sum(row.num_tiles for row in rows),
        "squared_lengths": sum(length**2 for row in rows for length in row.lengths[: row.num_sequences]),
        "patch_pairs": patch_pairs,
    }
    for name in ("pairs", "targets", "hard_negatives", "skipped", "cut"):
        counts[name] = sum(getattr(batch, f"num_{name}") for batch in batches)
    counts_on_device = to_device(torch.tensor([*counts.values()], dtype=torch.float64), device)
    values = [_values(shares, name, device) for name in MEANS]
    finite = [x.isfinite() for x in values]  # -inf without a negative, NaN without soft labels
    sums = [x.masked_fill(~ok, 0.0).sum() for x, ok in zip(values, finite)]
    loss = torch.stack([loss for loss, _ in shares]).mean() if shares else torch.zeros((), device=device)
    local = [x.double() for x in (loss, *sums, *(ok.sum() for ok in finite))]
    totals = torch.cat([torch.stack(local), counts_on_device])
    dist.all_reduce(totals, group=group)
    samples = similarities(shares, batches, group)  # [B, 2]
    read = torch.cat([totals, samples.double().flatten()]).cpu()  # all at once, since the host waits for each copy
    (loss, *totals), samples = read[: len(totals)].tolist(), read[len(totals) :].to(samples.dtype).view(-1, 2)
    sums, lengths, counted = totals[: len(MEANS)], totals[len(MEANS) : 2 * len(MEANS)], totals[2 * len(MEANS) :]
    means = {record: total / max(1, length) for record, total, length in zip(MEANS.values(), sums, lengths)}
    if not lengths[-1]:
        del means[MEANS["soft_label"]]
    compared = {f"similarity_{name}": compare(*samples.unbind(1)) for name, compare in COMPARISONS.items()}
    return {"loss": loss / group.size(), **means, **compared, **dict(zip(counts, map(int, counted)))}


def histograms(shares: list[LossShare], batches: list[PairBatch], group: dist.ProcessGroup) -> dict[str, list[int]]:
    """Number of queries per bin, see HISTOGRAM_RANGES, of the cosine of the positive and of the hardest negative.

    The third has the shares whose mean is hardest_share. A query without a negative counts in the first one alone.
    """
    cosines = similarities(shares, batches, group)  # [B, 2]
    weights = _values(shares, "hardest_share", cosines.device).double().nan_to_num(nan=-1.0)
    of_shares = torch.histc(weights, HISTOGRAM_BINS, 0, 1)
    dist.all_reduce(of_shares, group=group)
    read = torch.cat([of_shares, cosines.double().flatten()]).cpu()  # both at once, since the host waits for each copy
    of_shares, cosines = read[:HISTOGRAM_BINS], read[HISTOGRAM_BINS:].view(-1, 2)
    counts = *map(cosine_counts, cosines.unbind(1)), of_shares.int().tolist()
    return dict(zip(HISTOGRAM_RANGES, counts))


def similarities(shares: list[LossShare], batches: list[PairBatch], group: dist.ProcessGroup) -> Tensor:
    """Cosines [B, 2] of the positive and of the hardest negative of each of the step's queries of all ranks."""
    device = batches[0].query_ids.device
    local = torch.stack([_values(shares, name, device) for name in ("positive", "hardest_negative")], dim=1)  # [b, 2]
    if not shares:
        return local
    of_ranks = rows_of_ranks(batches)
    counts = of_ranks[0] if of_ranks else row_counts(group, local)[0]
    return all_gather_rows(local, counts, group)


def peak_memory_gb() -> float:
    """Peak memory of this rank so far in units of 1e9 bytes: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _values(shares: list[LossShare], name: str, device: torch.device) -> Tensor:
    values = [getattr(statistics, name) for _, statistics in shares]
    return torch.cat([torch.zeros(0, device=device), *(value for value in values if value is not None)])

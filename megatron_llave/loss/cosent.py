"""The CoSENT loss of graded pairs: the order of the cosines is to be the order of the scores.

Its source is https://kexue.fm/archives/8847; sentence-transformers has it as CoSENTLoss.

Shapes: g graded pairs of this rank, G of all ranks, n of a chunk.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed.collectives import all_gather_rows
from megatron_llave.loss.contrastive import LossShare, SimilarityStatistics, log_sum_over_ranks
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.negatives import rows_of_group
from megatron_llave.loss.own_negatives import own_cosines

CHUNK = 1024
"""Graded pairs whose differences from all others are held at a time."""


def cosent_loss(
    embeddings: PairEmbeddings,
    ids: PairIds | None = None,
    reward: PairEmbeddings | None = None,
    *,
    config: LossConfig,
    group: dist.ProcessGroup | None = None,
    log_temperature: Tensor | None = None,
    chunk: int = CHUNK,
) -> LossShare:
    """log(1 + sum of exp((cos_c - cos_p) / tau)) over all graded pairs c, p of all ranks with score_c < score_p.

    A graded pair is a query with one of its targets or own hard negatives that has a score.

    Args:
        embeddings: unit vectors of this rank, with `hard_rows` if there are hard negatives.
        ids: with the scores of the targets and hard negatives; those without a score are left out.
        reward: not used; the loss has no hardness.
        config: temperature; the other fields are not used here.
        group: the ranks whose graded pairs are compared; they may have different numbers. None: this rank alone.
        log_temperature: as in `hardness_weighted_contrastive_loss`.
        chunk: graded pairs whose differences from all others are held at a time.

    Returns:
        The loss, which is the same on every rank; averaging the gradients of the parameters over the ranks gives its
        exact gradient. The statistics have no negatives.
    """
    positives, negatives = own_cosines(embeddings)
    cosines = torch.cat([positives, negatives])
    scores = torch.full_like(cosines, torch.nan) if ids is None or ids.scores is None else ids.scores
    of_ranks = rows_of_group(embeddings, ids, group)
    counts = [targets + hard for targets, hard in zip(of_ranks.targets, of_ranks.hard_negatives)]
    scores = scores.detach().to(cosines.dtype)
    share = _CoSENT.apply(cosines, scores, log_temperature, config.temperature, counts, group, chunk)
    mean_positive = embeddings.mean_of_targets(positives.detach())
    nothing = cosines.new_zeros(0)
    return share, SimilarityStatistics(mean_positive, torch.full_like(mean_positive, -torch.inf), nothing, nothing)


class _CoSENT(torch.autograd.Function):
    """Each rank compares its own graded pairs with all; the backward pass computes the differences again."""

    @staticmethod
    def forward(
        ctx,
        cosines: Tensor,
        scores: Tensor,
        log_temperature: Tensor | None,
        temperature: float,
        counts: list[int],
        group: dist.ProcessGroup | None,
        chunk: int,
    ) -> Tensor:
        everything = all_gather_rows(torch.stack([cosines, scores], 1), counts, group)  # [G, 2]
        total = cosines.new_full((1,), -torch.inf)
        for own in _chunks(cosines, scores, chunk):
            exponents, is_lower, _ = _compare(*own[1:], everything, temperature)
            of_chunk = exponents.masked_fill_(~is_lower, -torch.inf).flatten().logsumexp(0, keepdim=True)
            total = torch.logaddexp(total, of_chunk)
        loss = F.softplus(log_sum_over_ranks(total, group))
        ctx.save_for_backward(cosines, scores, everything, loss)
        ctx.settings = temperature, len(counts), chunk
        return loss.squeeze(0).clone()  # no view, because the schedule divides it in place

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosines, scores, everything, loss = ctx.saved_tensors
        temperature, num_ranks, chunk = ctx.settings
        slope = torch.empty_like(cosines)
        for part, *own in _chunks(cosines, scores, chunk):
            exponents, is_lower, is_higher = _compare(*own, everything, temperature)
            pulled_up = (exponents - loss).exp_().masked_fill_(~is_lower, 0.0).sum(1)
            pushed_down = (-exponents - loss).exp_().masked_fill_(~is_higher, 0.0).sum(1)
            slope[part] = pushed_down - pulled_up
        # The loss is the same on every rank, so that the mean of the ranks' gradients is 1 / ranks of their sum.
        slope *= gradient * num_ranks / temperature
        of_temperature = -(cosines * slope).sum() if ctx.needs_input_grad[2] else None
        return slope, None, of_temperature, None, None, None, None


def _chunks(cosines: Tensor, scores: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for start in range(0, len(cosines), chunk):
        part = slice(start, start + chunk)
        yield part, cosines[part, None], scores[part, None]


def _compare(cosines: Tensor, scores: Tensor, everything: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """[n, G] scaled difference of the others' cosines from those of a chunk; whether their score is lower; or higher.

    A score that is NaN is neither.
    """
    exponents = (everything[:, 0] - cosines) / temperature
    return exponents, everything[:, 1] < scores, everything[:, 1] > scores

"""Hardness-weighted contrastive loss (LLaVE section 3.2).

No [B, B] matrix is ever held. The rows are processed in chunks: the logits of a chunk are computed, folded into running
log-sum-exps, and computed again in the backward pass. Every rank multiplies its own queries with all targets once per
pass, and both directions of the symmetric loss come from that one product.

Shapes: b rows (queries) of this rank, B rows of all ranks, a and A targets, m and M explicit hard negatives of this
rank and of all ranks, C = A + M columns, n rows of a chunk and q targets of them, d width of the embedding. With one
target per query a = b, A = B and q = n.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed.collectives import all_gather_rows, reduce_scatter_rows
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.negatives import (
    Chunk,
    Context,
    Masks,
    chunks_of,
    find_masks,
    find_several,
    gather_ids,
    mean_of_targets,
    rows_of_group,
)

CHUNK = 256
"""Rows whose logits are held at a time."""


@dataclass
class SimilarityStatistics:
    """Similarities that the loss has computed, without a gradient.

    Those of n queries cover only the first chunk of this rank, the others all of its b queries.
    """

    positive: Tensor
    """[b] cosine of each query and its own target; the mean over its targets if it has several."""
    hardest_negative: Tensor
    """[b] largest cosine of each query and a negative that is not masked; -inf for a query without negatives."""
    effective_negatives: Tensor
    """[n] number of equally weighted negatives with the same spread: (sum w)^2 / sum w^2 of their softmax w."""
    hardest_share: Tensor
    """[n] part of the softmax over the negatives that falls on the hardest 1 % of them, at least on one."""
    soft_label: Tensor | None = None
    """[b] loss against the soft labels of each query, NaN where it has none; None: the loss takes no soft labels."""


LossShare = tuple[Tensor, SimilarityStatistics]
"""This rank's share of the loss, a scalar, and the similarity statistics."""


def hardness_weighted_contrastive_loss(
    embeddings: PairEmbeddings,
    ids: PairIds | None = None,
    reward: PairEmbeddings | None = None,
    *,
    config: LossConfig,
    group: dist.ProcessGroup | None = None,
    log_temperature: Tensor | None = None,
    chunk: int = CHUNK,
) -> LossShare:
    """InfoNCE in which the logit of a negative is raised by alpha times its own, detached, cosine.

    The official LLaVE repository adds log(exp(alpha * cos)) in bfloat16, which is alpha * cos with a rounding error of
    up to 0.065.

    A query with several targets has the mean of their losses, in each of which the other targets of the query are left
    out. In the other direction each target is compared with the queries that it is a negative of. A target is not a
    negative of a query that has a target with the same id, if one of the two queries that they belong to has several
    targets.

    Args:
        embeddings: unit vectors of this rank. The targets that are not a query's own, and all hard negatives, of all
            ranks are its negatives.
        ids: needed by config.mask_same_target and where a query has several targets. A hard negative whose id equals
            that of a query's target is masked for that query, on the same conditions. If they do not know the numbers
            of rows of all ranks, the ranks exchange them here.
        reward: embeddings of the same inputs by the reward model, whose cosines are the hardness; None: `embeddings`
            themselves, as in the paper.
        config: temperature, alpha (0 is plain InfoNCE), mask_same_target, mask_margin (measured from the mean of a
            query's positives), hardness and directions; the other fields are not used here.
        group: ranks whose rows are negatives of each other: the data-parallel group, never a model-parallel one. The
            ranks may have different numbers of rows. None: this rank alone.
        log_temperature: a scalar with the logarithm of config.temperature, which gets its gradient: of this rank's
            share of the loss, to be averaged over the ranks like those of the parameters. None: it is not learned.
        chunk: rows whose logits are held at a time.

    Returns:
        This rank's share of the loss, a scalar of at least float32, and the similarity statistics. The mean of the
        shares over the ranks is the mean of the loss over all B rows and the directions; averaging the gradients of the
        parameters over the ranks gives its exact gradient.

    Raises:
        ValueError: there is not one target per query and it is not told whose they are, or ids are needed and missing.
    """
    query, target, rows = embeddings.query, embeddings.target, embeddings.target_rows
    if query.shape != target.shape if rows is None else rows.shape != target.shape[:1]:
        what = "must have one shape" if rows is None else f"need {len(target)} target_rows"
        raise ValueError(f"query {tuple(query.shape)} and target {tuple(target.shape)} {what}")
    precise = torch.promote_types(query.dtype, torch.float32)
    query, target, hard = (x.to(precise) for x in (query, target, embeddings.hard_negatives))
    context = Context(config, group, chunk, *rows_of_group(embeddings, ids, group))
    if context.has_several or config.mask_same_target:
        context.ids = gather_ids(embeddings, ids, context)
    if context.has_several:
        context.several = find_several(embeddings.rows_of_targets, query, context)
    if reward is not None:
        context.reward_query = reward.query.to(precise)
        context.reward_columns = _gather_columns(reward.target.to(precise), reward.hard_negatives.to(precise), context)
    loss, *statistics = _ContrastiveLoss.apply(query, target, hard, log_temperature, context)
    return loss, SimilarityStatistics(*statistics)


def _gather_columns(target: Tensor, hard_negatives: Tensor, context: Context) -> Tensor:
    """[C, d] targets of all ranks, followed by the hard negatives of all ranks."""
    targets = all_gather_rows(target, context.target_counts, context.group)
    if not any(context.hard_counts):
        return targets
    return torch.cat([targets, all_gather_rows(hard_negatives, context.hard_counts, context.group)])


def _logits(cosines: Tensor, chunk: Chunk, masks: Masks, context: Context) -> tuple[Tensor, Tensor | None]:
    """Weighted logits of a chunk's negatives.

    The first is [n, C], of each query against all columns. The second is [n, A], of each target against this chunk's
    queries; it is None unless the loss is symmetric. Positives and masked pairs are -inf. `cosines` [n, C] is
    overwritten.
    """
    config, num_targets = context.config, context.num_targets
    in_batch = config.alpha if config.hardness != "hard_negatives" else 0.0
    explicit = config.alpha if config.hardness != "in_batch" else 0.0
    weights = (slice(None, num_targets), in_batch), (slice(num_targets, None), explicit)
    if context.reward_query is None:
        for columns, alpha in weights:
            cosines[:, columns] *= 1 / config.temperature + alpha
    else:
        hardness = context.reward_query[chunk.rows] @ context.reward_columns.T  # [n, C]
        cosines *= 1 / config.temperature
        for columns, alpha in weights:
            cosines[:, columns] += hardness[:, columns].mul_(alpha)
    logits = cosines
    logits[chunk.own] = -torch.inf
    to_query = logits[:, :num_targets] if context.is_symmetric else None
    if masks.to_target is not None:
        to_query = None if to_query is None else to_query.masked_fill(masks.to_query, -torch.inf)
        logits = logits.masked_fill_(masks.to_target, -torch.inf)
    return logits, to_query


class _ContrastiveLoss(torch.autograd.Function):
    """The loss in chunks of rows. The backward pass computes the logits of each chunk again."""

    @staticmethod
    def forward(
        ctx, query: Tensor, target: Tensor, hard: Tensor, log_temperature: Tensor | None, context: Context
    ) -> tuple[Tensor, ...]:
        columns = _gather_columns(target, hard, context)  # [C, d]
        several, temperature = context.several, context.config.temperature
        own = query if several is None else query[several.rows]
        local_positives = (own * target).sum(1)  # [a]
        positives = all_gather_rows(local_positives, context.target_counts, context.group)  # [A]
        # Log-sum-exp of the negatives alone. Its difference from the positive's logit, the log odds that a negative is
        # taken for the positive, gives the loss and its gradient without cancellation.
        hardest, row_lse = query.new_empty(len(query)), query.new_empty(len(query))
        column_lse = query.new_full((context.num_targets,), -torch.inf)
        softmax_spread = (query.new_zeros(0), query.new_zeros(0))
        for chunk in chunks_of(query, context):
            cosines = query[chunk.rows] @ columns.T  # [n, C]
            masks = find_masks(cosines, chunk, positives, context)
            hardest[chunk.rows] = _hardest(cosines, chunk, masks)
            to_target, to_query = _logits(cosines, chunk, masks, context)
            row_lse[chunk.rows] = to_target.logsumexp(1)
            if to_query is not None:
                column_lse = torch.logaddexp(column_lse, to_query.logsumexp(0))
            if chunk.rows.start == 0:
                softmax_spread = spread(to_target)
        column_log_odds = log_sum_over_ranks(column_lse, context.group) - positives / temperature  # [A]
        row_log_odds = (row_lse if several is None else row_lse[several.rows]) - local_positives / temperature  # [a]
        losses = -F.logsigmoid(-row_log_odds)  # log(1 + negatives / positive)
        if context.is_symmetric:
            losses = losses - F.logsigmoid(-column_log_odds[context.local])
        ctx.context = context
        ctx.save_for_backward(query, columns, positives, row_log_odds, column_log_odds)
        statistics = mean_of_targets(local_positives.clone(), context), hardest, *softmax_spread
        ctx.mark_non_differentiable(*statistics)
        return mean_of_targets(losses, context).sum() * context.scale, *statistics

    @staticmethod
    def backward(ctx, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        query, columns, positives, row_log_odds, column_log_odds = ctx.saved_tensors
        context: Context = ctx.context
        temperature, local, several = context.config.temperature, context.local, context.several
        # Log-sum-exp of positive and negatives: [A] and [a]. The softmax of a negative is exp(logit - this).
        column_lse = positives / temperature - F.logsigmoid(-column_log_odds)
        row_lse = positives[local] / temperature - F.logsigmoid(-row_log_odds)
        positive_slope = torch.sigmoid(row_log_odds)  # [a] one minus the softmax of the positive
        if context.is_symmetric:
            positive_slope = positive_slope + torch.sigmoid(column_log_odds[local])
        if several is not None:
            weights = several.log_weights
            positive_slope = positive_slope * weights[local].exp()
            column_lse = column_lse - weights
            row_lse = -several.to_rows(weights[local] - row_lse, -torch.inf).logsumexp(1)  # [b]
        query_gradient, columns_gradient = torch.empty_like(query), torch.zeros_like(columns)
        for chunk in chunks_of(query, context):
            rows = chunk.rows
            cosines = query[rows] @ columns.T
            to_target, to_query = _logits(cosines, chunk, find_masks(cosines, chunk, positives, context), context)
            # Without masks both share memory, so the softmax of the other direction comes before the change in place.
            other = None if to_query is None else (to_query - column_lse).exp_()
            slope = to_target.sub_(row_lse[rows, None]).exp_()  # [n, C] d loss / d logit: the softmax of the negatives
            if other is not None:
                slope[:, : context.num_targets] += other
            slope[chunk.own] = -positive_slope[chunk.targets]
            query_gradient[rows] = slope @ columns
            columns_gradient.addmm_(slope.T, query[rows])
        # Hardness is detached, so the derivative of a logit with respect to its cosine is 1 / temperature.
        scale = gradient * context.scale / temperature
        targets_gradient, hard_gradient = columns_gradient.mul_(scale).split(
            [context.num_targets, sum(context.hard_counts)]
        )
        query_gradient.mul_(scale)
        # A logit is cosine / temperature and what is detached, so this gradient is that of the cosines times minus the
        # cosines, which the queries sum up over the columns.
        of_temperature = -(query * query_gradient).sum() if ctx.needs_input_grad[3] else None
        return (
            query_gradient,
            reduce_scatter_rows(targets_gradient, context.target_counts, context.group),
            reduce_scatter_rows(hard_gradient, context.hard_counts, context.group),
            of_temperature,
            None,
        )


def _hardest(cosines: Tensor, chunk: Chunk, masks: Masks) -> Tensor:
    """[n] largest cosine of a negative; -inf for a row without negatives."""
    if masks.to_target is not None:
        cosines = cosines.masked_fill(masks.to_target, -torch.inf)
    of_positives = cosines[chunk.own]
    cosines[chunk.own] = -torch.inf
    hardest = cosines.amax(1)
    cosines[chunk.own] = of_positives
    return hardest


def spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Effective number of negatives [n] and share of the hardest 1 % [n], from the softmax; 0 without negatives."""
    count = (logits > -torch.inf).sum(1, keepdim=True)  # [n, 1]
    weights = logits.softmax(1).masked_fill(count == 0, 0.0)  # [n, C]
    hardest = (count // 100).clamp_min(1)
    top = weights.topk(max(1, logits.shape[1] // 100), dim=1).values
    top = top.masked_fill(torch.arange(top.shape[1], device=top.device) >= hardest, 0.0)
    return weights.sum(1).square() / weights.square().sum(1).clamp_min(1e-30), top.sum(1)


def log_sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log-sum-exp of each value over the ranks, by two reductions: a gather would need memory for all ranks' values."""
    if group is None or group.size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    largest = largest.clamp_min(torch.finfo(values.dtype).min)  # a column without any negative has -inf
    total = (values - largest).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(largest)

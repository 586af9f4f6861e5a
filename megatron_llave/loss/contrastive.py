"""Hardness-weighted contrastive loss (LLaVE section 3.2).

No [B, B] matrix is ever held. The rows are processed in chunks: the logits of a chunk are computed, folded into running
log-sum-exps, and computed again in the backward pass. Every rank multiplies its own queries with all targets once per
pass, and both directions of the symmetric loss come from that one product.

Shapes: b rows of this rank, B rows of all ranks, m and M explicit hard negatives of this rank and of all ranks,
C = B + M columns, n rows of a chunk, d width of the embedding.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.batch import PairEmbeddings, PairIds
from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed.collectives import all_gather_rows, reduce_scatter_rows, row_counts

CHUNK = 256
"""Rows whose logits are held at a time."""


@dataclass
class SimilarityStatistics:
    """Similarities that the loss has computed, without a gradient.

    The first two cover the b queries of this rank, the last two only its first chunk of n queries.
    """

    positive: Tensor
    """[b] cosine of each query and its own target."""
    hardest_negative: Tensor
    """[b] largest cosine of each query and a negative that is not masked; -inf for a query without negatives."""
    effective_negatives: Tensor
    """[n] number of equally weighted negatives with the same spread: (sum w)^2 / sum w^2 of their softmax w."""
    hardest_share: Tensor
    """[n] part of the softmax over the negatives that falls on the hardest 1 % of them, at least on one."""


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

    Args:
        embeddings: unit vectors of this rank. Row i of the targets is the positive of row i of the queries; all other
            targets and all hard negatives of all ranks are negatives of every query.
        ids: needed by config.mask_same_target. A hard negative whose id equals that of a query's target is masked for
            that query. If they do not know the numbers of rows of all ranks, the ranks exchange them here.
        reward: embeddings of the same inputs by the reward model, whose cosines are the hardness; None: `embeddings`
            themselves, as in the paper.
        config: temperature, alpha (0 is plain InfoNCE), mask_same_target, mask_margin, hardness and directions; the
            other fields are not used here.
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
        ValueError: queries and targets differ in shape, or config.mask_same_target lacks ids of some rows.
    """
    query, target = embeddings.query, embeddings.target
    if query.shape != target.shape:
        raise ValueError(f"query {tuple(query.shape)} and target {tuple(target.shape)} must have one shape")
    precise = torch.promote_types(query.dtype, torch.float32)
    query, target, hard = (x.to(precise) for x in (query, target, embeddings.hard_negatives))
    is_known = group is not None and ids is not None and ids.of_ranks is not None
    counts, hard_counts = ids.of_ranks if is_known else row_counts(group, query, hard)
    context = _Context(config, group, chunk, counts, hard_counts)
    if config.mask_same_target:
        rows = [len(query), len(target), len(hard)]
        if ids is None or [len(ids.query), len(ids.target), len(ids.hard_negatives)] != rows:
            raise ValueError("mask_same_target needs the ids of all queries, targets and hard negatives")
        context.ids = PairIds(
            all_gather_rows(ids.query, counts, group),
            all_gather_rows(ids.target, counts, group),
            all_gather_rows(ids.hard_negatives, hard_counts, group),
        )
    if reward is not None:
        context.reward_query = reward.query.to(precise)
        context.reward_columns = _gather_columns(reward.target.to(precise), reward.hard_negatives.to(precise), context)
    loss, *statistics = _ContrastiveLoss.apply(query, target, hard, log_temperature, context)
    return loss, SimilarityStatistics(*statistics)


@dataclass
class _Context:
    """Everything that the computation needs besides the embeddings."""

    config: LossConfig
    group: dist.ProcessGroup | None
    chunk: int
    counts: list[int]
    """Rows of each rank."""
    hard_counts: list[int]
    """Hard negatives of each rank."""
    ids: PairIds | None = None
    """Ids of the pairs and hard negatives of all ranks, [B], [B] and [M]; None without mask_same_target."""
    reward_query: Tensor | None = None
    """[b, d] by the reward model; None: the model judges hardness itself."""
    reward_columns: Tensor | None = None
    """[C, d] by the reward model."""

    @property
    def num_rows(self) -> int:
        """B, the number of rows of all ranks."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Column of this rank's first positive."""
        return sum(self.counts[: 0 if self.group is None else self.group.rank()])

    @property
    def is_symmetric(self) -> bool:
        """Whether targets are compared with queries too."""
        return self.config.directions == "symmetric"

    @property
    def scale(self) -> float:
        """Factor of the sum over this rank's rows that makes the mean over ranks the mean over rows and directions."""
        return len(self.counts) / max(1, self.num_rows) / (2 if self.is_symmetric else 1)


def _gather_columns(target: Tensor, hard_negatives: Tensor, context: _Context) -> Tensor:
    """[C, d] targets of all ranks, followed by the hard negatives of all ranks."""
    targets = all_gather_rows(target, context.counts, context.group)
    if not any(context.hard_counts):
        return targets
    return torch.cat([targets, all_gather_rows(hard_negatives, context.hard_counts, context.group)])


@dataclass
class _Masks:
    """Which columns are masked, that is, are not negatives of the rows of a chunk."""

    positive: Tensor
    """[n, 1] column of each row's positive."""
    to_target: Tensor | None
    """[n, C] True where the column is masked for the row's query; False at the positives. None: no column is masked."""
    to_query: Tensor | None
    """[n, B] True where the row's query is masked for the column's target; False at the positives. None as above."""


def _masks(cosines: Tensor, rows: slice, positives: Tensor, context: _Context) -> _Masks:
    """Masks of a chunk's cosines [n, C]; `positives` [B] are the cosines of all pairs."""
    config, ids, num_rows = context.config, context.ids, context.num_rows
    column = torch.arange(rows.start, rows.stop, device=cosines.device)[:, None] + context.first
    if not config.mask_same_target and config.mask_margin is None:
        return _Masks(column, None, None)
    to_target = torch.zeros_like(cosines, dtype=torch.bool)
    if config.mask_same_target:
        to_target[:, :num_rows] = ids.target[column] == ids.target
        to_target[:, :num_rows] |= ids.query[column] == ids.query
        to_target[:, num_rows:] = ids.target[column] == ids.hard_negatives
    to_query = to_target[:, :num_rows].clone()
    if config.mask_margin is not None:
        # Tolerate a few roundings, or chance would decide whether a copy of the positive is above it.
        margin = config.mask_margin + 8 * torch.finfo(cosines.dtype).eps
        # Compare with the positive of the row's query, and in the other direction with that of the column's target.
        to_target |= cosines > positives[column] + margin
        to_query |= cosines[:, :num_rows] > positives + margin
    return _Masks(column, to_target.scatter_(1, column, False), to_query.scatter_(1, column, False))


def _logits(cosines: Tensor, rows: slice, masks: _Masks, context: _Context) -> tuple[Tensor, Tensor | None]:
    """Weighted logits of a chunk's negatives.

    The first is [n, C], of each query against all columns. The second is [n, B], of each target against this chunk's
    queries; it is None unless the loss is symmetric. Positives and masked pairs are -inf. `cosines` [n, C] is
    overwritten.
    """
    config, num_rows = context.config, context.num_rows
    in_batch = config.alpha if config.hardness != "hard_negatives" else 0.0
    explicit = config.alpha if config.hardness != "in_batch" else 0.0
    weights = (slice(None, num_rows), in_batch), (slice(num_rows, None), explicit)
    if context.reward_query is None:
        for columns, alpha in weights:
            cosines[:, columns] *= 1 / config.temperature + alpha
    else:
        hardness = context.reward_query[rows] @ context.reward_columns.T  # [n, C]
        cosines *= 1 / config.temperature
        for columns, alpha in weights:
            cosines[:, columns] += hardness[:, columns].mul_(alpha)
    logits = cosines.scatter_(1, masks.positive, -torch.inf)
    to_query = logits[:, :num_rows] if context.is_symmetric else None
    if masks.to_target is not None:
        to_query = None if to_query is None else to_query.masked_fill(masks.to_query, -torch.inf)
        logits = logits.masked_fill_(masks.to_target, -torch.inf)
    return logits, to_query


class _ContrastiveLoss(torch.autograd.Function):
    """The loss in chunks of rows. The backward pass computes the logits of each chunk again."""

    @staticmethod
    def forward(
        ctx, query: Tensor, target: Tensor, hard: Tensor, log_temperature: Tensor | None, context: _Context
    ) -> tuple[Tensor, ...]:
        columns = _gather_columns(target, hard, context)  # [C, d]
        local_positives = (query * target).sum(1)  # [b]
        positives = all_gather_rows(local_positives, context.counts, context.group)  # [B]
        hardest = torch.empty_like(local_positives)
        # Log-sum-exp of the negatives alone. Its difference from the positive's logit, the log odds that a negative is
        # taken for the positive, gives the loss and its gradient without cancellation.
        row_lse, column_lse = torch.empty_like(local_positives), query.new_full((context.num_rows,), -torch.inf)
        spread = (query.new_zeros(0), query.new_zeros(0))
        for start in range(0, len(query), context.chunk):
            rows = slice(start, min(start + context.chunk, len(query)))
            cosines = query[rows] @ columns.T  # [n, C]
            masks = _masks(cosines, rows, positives, context)
            hardest[rows] = _hardest(cosines, masks)
            to_target, to_query = _logits(cosines, rows, masks, context)
            row_lse[rows] = to_target.logsumexp(1)
            if to_query is not None:
                column_lse = torch.logaddexp(column_lse, to_query.logsumexp(0))
            if start == 0:
                spread = _spread(to_target)
        column_log_odds = _log_sum_over_ranks(column_lse, context) - positives / context.config.temperature  # [B]
        row_log_odds = row_lse - local_positives / context.config.temperature  # [b]
        local = slice(context.first, context.first + len(query))
        losses = -F.logsigmoid(-row_log_odds)  # log(1 + negatives / positive)
        if context.is_symmetric:
            losses = losses - F.logsigmoid(-column_log_odds[local])
        ctx.context = context
        ctx.save_for_backward(query, columns, positives, row_log_odds, column_log_odds)
        statistics = local_positives.clone(), hardest, *spread
        ctx.mark_non_differentiable(*statistics)
        return losses.sum() * context.scale, *statistics

    @staticmethod
    def backward(ctx, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        query, columns, positives, row_log_odds, column_log_odds = ctx.saved_tensors
        context: _Context = ctx.context
        temperature = context.config.temperature
        local = slice(context.first, context.first + len(query))
        column_lse = positives / temperature - F.logsigmoid(-column_log_odds)  # [B] positive and negatives
        row_lse = positives[local] / temperature - F.logsigmoid(-row_log_odds)  # [b]
        positive_slope = torch.sigmoid(row_log_odds)  # [b] one minus the softmax of the positive
        if context.is_symmetric:
            positive_slope = positive_slope + torch.sigmoid(column_log_odds[local])
        query_gradient, columns_gradient = torch.empty_like(query), torch.zeros_like(columns)
        for start in range(0, len(query), context.chunk):
            rows = slice(start, min(start + context.chunk, len(query)))
            cosines = query[rows] @ columns.T
            to_target, to_query = _logits(cosines, rows, _masks(cosines, rows, positives, context), context)
            # Without masks both share memory, so the softmax of the other direction comes before the change in place.
            other = None if to_query is None else (to_query - column_lse).exp_()
            slope = to_target.sub_(row_lse[rows, None]).exp_()  # [n, C] d loss / d logit: the softmax of the negatives
            if other is not None:
                slope[:, : context.num_rows] += other
            slope.diagonal(context.first + start).copy_(-positive_slope[rows])
            query_gradient[rows] = slope @ columns
            columns_gradient.addmm_(slope.T, query[rows])
        # Hardness is detached, so the derivative of a logit with respect to its cosine is 1 / temperature.
        scale = gradient * context.scale / temperature
        targets_gradient, hard_gradient = columns_gradient.mul_(scale).split(
            [context.num_rows, sum(context.hard_counts)]
        )
        query_gradient.mul_(scale)
        # A logit is cosine / temperature and what is detached, so this gradient is that of the cosines times minus the
        # cosines, which the queries sum up over the columns.
        of_temperature = -(query * query_gradient).sum() if ctx.needs_input_grad[3] else None
        return (
            query_gradient,
            reduce_scatter_rows(targets_gradient, context.counts, context.group),
            reduce_scatter_rows(hard_gradient, context.hard_counts, context.group),
            of_temperature,
            None,
        )


def _hardest(cosines: Tensor, masks: _Masks) -> Tensor:
    """[n] largest cosine of a negative; -inf for a row without negatives."""
    if masks.to_target is not None:
        return cosines.masked_fill(masks.to_target, -torch.inf).scatter_(1, masks.positive, -torch.inf).amax(1)
    positive_cosines = cosines.gather(1, masks.positive)
    hardest = cosines.scatter_(1, masks.positive, -torch.inf).amax(1)
    cosines.scatter_(1, masks.positive, positive_cosines)
    return hardest


def _spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Effective number of negatives [n] and share of the hardest 1 % [n], from the softmax; 0 without negatives."""
    count = (logits > -torch.inf).sum(1, keepdim=True)  # [n, 1]
    weights = logits.softmax(1).masked_fill(count == 0, 0.0)  # [n, C]
    hardest = (count // 100).clamp_min(1)
    top = weights.topk(max(1, logits.shape[1] // 100), dim=1).values
    top = top.masked_fill(torch.arange(top.shape[1], device=top.device) >= hardest, 0.0)
    return weights.sum(1).square() / weights.square().sum(1).clamp_min(1e-30), top.sum(1)


def _log_sum_over_ranks(values: Tensor, context: _Context) -> Tensor:
    """[B] log-sum-exp over the ranks, by two reductions: a gather would need memory for ranks times B numbers."""
    if context.group is None or context.group.size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=context.group)
    largest = largest.clamp_min(torch.finfo(values.dtype).min)  # a column without any negative has -inf
    total = (values - largest).exp_()
    dist.all_reduce(total, group=context.group)
    return total.log_().add_(largest)

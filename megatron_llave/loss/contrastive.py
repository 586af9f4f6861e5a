"""Hardness-weighted contrastive loss (LLaVE section 3.2): pure functions of embeddings and a process group.

No [B, B] matrix is ever held: rows are taken in chunks, each chunk's logits are made, folded into running log-sum-exps,
and made again in the backward. Every rank multiplies its own queries with all targets once per pass; both directions
of the symmetric loss come from that one product.

Shapes: b local rows, B rows of all ranks, M explicit hard negatives of all ranks, C = B + M columns, n rows of a chunk,
d embedding.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.batch import PairEmbeddings
from megatron_llave.config.schema import DIRECTIONS, HARDNESS
from megatron_llave.distributed.collectives import all_gather_rows, reduce_scatter_rows, row_counts

CHUNK = 256
"""Rows whose logits are held at a time."""


@dataclass(frozen=True)
class NegativeRules:
    """What counts as a negative, and which negatives are weighted by their hardness."""

    mask_same_target: bool = False
    """Pairs with equal target ids or equal query ids are not each other's negatives, in neither direction: each one's
    target is as right for the other's query as its own."""
    mask_margin: float | None = None
    """A negative more similar than the positive plus this is taken for a false one and left out; None: none is."""
    hardness: str = "all"
    """Weighted negatives: in_batch, hard_negatives or all."""
    directions: str = "symmetric"
    """symmetric, or query_to_target alone."""

    def __post_init__(self) -> None:
        """Raise ValueError for a word that means nothing."""
        for name, allowed in (("hardness", HARDNESS), ("directions", DIRECTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")


@dataclass
class SimilarityStatistics:
    """What the loss saw, detached; over this rank's b queries, the last two over its first chunk of them."""

    positive: Tensor
    """[b] cosine of each query and its own target."""
    hardest_negative: Tensor
    """[b] largest cosine of each query and a negative that is not masked; -inf where there is none."""
    effective_negatives: Tensor
    """[n] number of equally weighted negatives that would spread as widely: (sum w)^2 / sum w^2 of their softmax."""
    hardest_share: Tensor
    """[n] share of the negatives' softmax that lies on the hardest 1 % of them, at least one."""


LossShare = tuple[Tensor, SimilarityStatistics]
"""This rank's share of the loss, a scalar, and what it saw."""


def hardness_weighted_contrastive_loss(
    query: Tensor,
    target: Tensor,
    temperature: float,
    alpha: float,
    group: dist.ProcessGroup | None = None,
    hard_negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    reward: PairEmbeddings | None = None,
    rules: NegativeRules = NegativeRules(),
    chunk: int = CHUNK,
) -> LossShare:
    """Symmetric InfoNCE in which a negative's logit is raised by alpha times its own, detached, cosine.

    The released code adds log(exp(alpha * cos)), which is alpha * cos, in bfloat16, which is off by up to 0.065.

    Args:
        query: [b, d] unit vectors; row i belongs with target row i.
        target: [b, d] unit vectors.
        temperature: divisor of the cosines.
        alpha: hardness weight; 0 is plain symmetric InfoNCE.
        group: ranks whose rows are each other's negatives: the data-parallel group, never a model-parallel one. The
            numbers of rows may differ.
        hard_negatives: [m, d] further targets that are nobody's positive; negatives of every query of every rank.
        query_ids: [b] int64, needed by rules.mask_same_target.
        target_ids: [b] int64, likewise.
        hard_negative_ids: [m] int64, likewise; a hard negative equal to a query's target is masked for it.
        reward: the same rows from the reward model, whose cosines are the hardness; None: `query` and `target`
            themselves, detached, as in the paper.
        rules: which pairs are negatives and which are weighted.
        chunk: rows whose logits are held at a time.

    Returns:
        This rank's share of the loss, a scalar of at least float32: the mean of the ranks' values is the mean over all
        B rows and both directions, and averaging parameter gradients over the ranks gives its exact gradient. Then the
        similarities it saw.

    Raises:
        ValueError: query and target differ in shape, or rules.mask_same_target without ids.
    """
    if query.shape != target.shape:
        raise ValueError(f"query {tuple(query.shape)} and target {tuple(target.shape)} must have one shape")
    precise = torch.promote_types(query.dtype, torch.float32)
    query, target = query.to(precise), target.to(precise)
    if hard_negatives is None:
        hard_negatives = query.new_zeros(0, query.shape[1])
        hard_negative_ids = torch.zeros(0, dtype=torch.int64, device=query.device)
    hard_negatives = hard_negatives.to(precise)
    terms = _Terms(temperature, alpha, rules, group, chunk, *row_counts(group, query, hard_negatives))
    if rules.mask_same_target:
        terms = _gather_ids(query_ids, target_ids, hard_negative_ids, terms)
    if reward is not None:
        columns = _gather_columns(reward.target.to(precise), reward.hard_negatives.to(precise), terms)
        terms = replace(terms, reward_query=reward.query.to(precise), reward_columns=columns)
    loss, *statistics = _ContrastiveLoss.apply(query, target, hard_negatives, terms)
    return loss, SimilarityStatistics(*statistics)


@dataclass(frozen=True)
class _Terms:
    """Everything but the embeddings."""

    temperature: float
    alpha: float
    rules: NegativeRules
    group: dist.ProcessGroup | None
    chunk: int
    counts: list[int]
    hard_counts: list[int]
    query_ids: Tensor | None = None
    """[B]."""
    target_ids: Tensor | None = None
    """[B]."""
    hard_negative_ids: Tensor | None = None
    """[M]."""
    reward_query: Tensor | None = None
    """[b, d] of the reward model; None: the model is its own."""
    reward_columns: Tensor | None = None
    """[C, d] of the reward model."""

    @property
    def num_rows(self) -> int:
        """B."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Column of this rank's first positive."""
        return sum(self.counts[: 0 if self.group is None else self.group.rank()])

    @property
    def share(self) -> float:
        """Ranks / B, halved for two directions: the mean over ranks becomes the mean over rows."""
        directions = 2 if self.rules.directions == "symmetric" else 1
        return len(self.counts) / max(1, self.num_rows) / directions


def _gather_columns(target: Tensor, hard_negatives: Tensor, terms: _Terms) -> Tensor:
    """[C, d] targets of all ranks, then their hard negatives."""
    targets = all_gather_rows(target, terms.counts, terms.group)
    if not any(terms.hard_counts):
        return targets
    return torch.cat([targets, all_gather_rows(hard_negatives, terms.hard_counts, terms.group)])


def _gather_ids(query: Tensor | None, target: Tensor | None, hard: Tensor | None, terms: _Terms) -> _Terms:
    """The terms with the ids of all ranks."""
    if query is None or target is None or hard is None:
        raise ValueError("mask_same_target needs query_ids, target_ids, and hard_negative_ids of hard negatives")
    return replace(
        terms,
        query_ids=all_gather_rows(query, terms.counts, terms.group),
        target_ids=all_gather_rows(target, terms.counts, terms.group),
        hard_negative_ids=all_gather_rows(hard, terms.hard_counts, terms.group),
    )


@dataclass
class _Masks:
    """Which pairs of a chunk's rows and all columns are no negatives."""

    own: Tensor
    """[n, 1] column of each row's positive."""
    to_target: Tensor | None
    """[n, C] True: not among the negatives of the row's query; False at the positives. None: all are negatives."""
    to_query: Tensor | None
    """[n, B] True: not among the negatives of the column's target."""


def _masks(cosines: Tensor, rows: slice, positives: Tensor, terms: _Terms) -> _Masks:
    """Masks of a chunk's cosines [n, C]; positives [B] are the cosines of all pairs."""
    rules, rows_all = terms.rules, terms.num_rows
    own = torch.arange(rows.start, rows.stop, device=cosines.device)[:, None] + terms.first
    if not rules.mask_same_target and rules.mask_margin is None:
        return _Masks(own, None, None)
    to_target = torch.zeros_like(cosines, dtype=torch.bool)
    if rules.mask_same_target:
        to_target[:, :rows_all] = terms.target_ids[own] == terms.target_ids
        to_target[:, :rows_all] |= terms.query_ids[own] == terms.query_ids
        to_target[:, rows_all:] = terms.target_ids[own] == terms.hard_negative_ids
    to_query = to_target[:, :rows_all].clone()
    if rules.mask_margin is not None:
        # A few roundings more, or a copy of the positive would be above it or not by chance.
        margin = rules.mask_margin + 8 * torch.finfo(cosines.dtype).eps
        # A row's own positive; in the other direction the positive of the column's target.
        to_target |= cosines > positives[own] + margin
        to_query |= cosines[:, :rows_all] > positives + margin
    return _Masks(own, to_target.scatter_(1, own, False), to_query.scatter_(1, own, False))


def _logits(cosines: Tensor, rows: slice, masks: _Masks, terms: _Terms) -> tuple[Tensor, Tensor | None]:
    """Weighted logits of a chunk's negatives: [n, C] towards the targets, [n, B] towards the queries (None: unwanted).

    Positives and masked pairs are -inf. `cosines` [n, C] are overwritten.
    """
    rules, rows_all = terms.rules, terms.num_rows
    in_batch = terms.alpha if rules.hardness != "hard_negatives" else 0.0
    explicit = terms.alpha if rules.hardness != "in_batch" else 0.0
    parts = (slice(None, rows_all), in_batch), (slice(rows_all, None), explicit)
    if terms.reward_query is None:
        for columns, alpha in parts:
            cosines[:, columns] *= 1 / terms.temperature + alpha
    else:
        hardness = terms.reward_query[rows] @ terms.reward_columns.T  # [n, C]
        cosines *= 1 / terms.temperature
        for columns, alpha in parts:
            cosines[:, columns] += hardness[:, columns].mul_(alpha)
    logits = cosines.scatter_(1, masks.own, -torch.inf)
    to_query = logits[:, :rows_all] if rules.directions == "symmetric" else None
    if masks.to_target is not None:
        to_query = None if to_query is None else to_query.masked_fill(masks.to_query, -torch.inf)
        logits = logits.masked_fill_(masks.to_target, -torch.inf)
    return logits, to_query


class _ContrastiveLoss(torch.autograd.Function):
    """The loss in chunks of rows; the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, query: Tensor, target: Tensor, hard: Tensor, terms: _Terms) -> tuple[Tensor, ...]:
        columns = _gather_columns(target, hard, terms)  # [C, d]
        own_positives = (query * target).sum(1)  # [b]
        positives = all_gather_rows(own_positives, terms.counts, terms.group)  # [B]
        hardest = torch.empty_like(own_positives)
        # Negatives alone: set against the positive's logit they give loss and gradient without cancellation.
        of_rows, of_columns = torch.empty_like(own_positives), query.new_full((terms.num_rows,), -torch.inf)
        spread = (query.new_zeros(0), query.new_zeros(0))
        for start in range(0, len(query), terms.chunk):
            rows = slice(start, min(start + terms.chunk, len(query)))
            cosines = query[rows] @ columns.T  # [n, C]
            masks = _masks(cosines, rows, positives, terms)
            hardest[rows] = _hardest(cosines, masks)
            to_target, to_query = _logits(cosines, rows, masks, terms)
            of_rows[rows] = to_target.logsumexp(1)
            if to_query is not None:
                of_columns = torch.logaddexp(of_columns, to_query.logsumexp(0))
            if start == 0:
                spread = _spread(to_target)
        of_columns = _log_sum_over_ranks(of_columns, terms) - positives / terms.temperature
        of_rows = of_rows - own_positives / terms.temperature
        own = slice(terms.first, terms.first + len(query))
        losses = -F.logsigmoid(-of_rows)  # log(1 + negatives / positive)
        if terms.rules.directions == "symmetric":
            losses = losses - F.logsigmoid(-of_columns[own])
        ctx.terms = terms
        ctx.save_for_backward(query, columns, positives, of_rows, of_columns)
        statistics = own_positives.clone(), hardest, *spread
        ctx.mark_non_differentiable(*statistics)
        return losses.sum() * terms.share, *statistics

    @staticmethod
    def backward(ctx, gradient: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, columns, positives, of_rows, of_columns = ctx.saved_tensors
        terms: _Terms = ctx.terms
        own = slice(terms.first, terms.first + len(query))
        column_lse = positives / terms.temperature - F.logsigmoid(-of_columns)  # [B] positive and negatives together
        row_lse = positives[own] / terms.temperature - F.logsigmoid(-of_rows)  # [b]
        of_positives = torch.sigmoid(of_rows)  # [b] one minus the softmax of the positive
        if terms.rules.directions == "symmetric":
            of_positives = of_positives + torch.sigmoid(of_columns[own])
        query_gradient, columns_gradient = torch.empty_like(query), torch.zeros_like(columns)
        for start in range(0, len(query), terms.chunk):
            rows = slice(start, min(start + terms.chunk, len(query)))
            cosines = query[rows] @ columns.T
            to_target, to_query = _logits(cosines, rows, _masks(cosines, rows, positives, terms), terms)
            # Without masks both are the same logits, so the other direction's softmax comes first.
            other = None if to_query is None else (to_query - column_lse).exp_()
            slope = to_target.sub_(row_lse[rows, None]).exp_()  # [n, C] d loss / d logit: the softmax of the negatives
            if other is not None:
                slope[:, : terms.num_rows] += other
            slope.diagonal(terms.first + start).copy_(-of_positives[rows])
            query_gradient[rows] = slope @ columns
            columns_gradient.addmm_(slope.T, query[rows])
        # Hardness is detached, so a logit depends on its cosine through the temperature alone.
        scale = gradient * terms.share / terms.temperature
        targets_gradient, hard_gradient = columns_gradient.mul_(scale).split([terms.num_rows, sum(terms.hard_counts)])
        return (
            query_gradient.mul_(scale),
            reduce_scatter_rows(targets_gradient, terms.counts, terms.group),
            reduce_scatter_rows(hard_gradient, terms.hard_counts, terms.group),
            None,
        )


def _hardest(cosines: Tensor, masks: _Masks) -> Tensor:
    """[n] largest cosine of a negative; -inf without one."""
    if masks.to_target is not None:
        return cosines.masked_fill(masks.to_target, -torch.inf).scatter_(1, masks.own, -torch.inf).amax(1)
    own_cosines = cosines.gather(1, masks.own)
    hardest = cosines.scatter_(1, masks.own, -torch.inf).amax(1)
    cosines.scatter_(1, masks.own, own_cosines)
    return hardest


def _spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[n] effective number of negatives and share of the hardest 1 %, from their softmax; 0 without negatives."""
    count = (logits > -torch.inf).sum(1, keepdim=True)  # [n, 1]
    weights = logits.softmax(1).masked_fill(count == 0, 0.0)  # [n, C]
    hardest = (count // 100).clamp_min(1)
    top = weights.topk(max(1, logits.shape[1] // 100), dim=1).values
    top = top.masked_fill(torch.arange(top.shape[1], device=top.device) >= hardest, 0.0)
    return weights.sum(1).square() / weights.square().sum(1).clamp_min(1e-30), top.sum(1)


def _log_sum_over_ranks(values: Tensor, terms: _Terms) -> Tensor:
    """[B] log-sum-exp over the ranks' own parts; two reductions, since a gather would grow with ranks times B."""
    if terms.group is None or terms.group.size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=terms.group)
    largest = largest.clamp_min(torch.finfo(values.dtype).min)  # of a column without any negative
    total = (values - largest).exp_()
    dist.all_reduce(total, group=terms.group)
    return total.log_().add_(largest)

"""The loss of rows whose only negatives are their own hard negatives (`loss.negatives: own`).

This is the rule of Qwen3-VL-Embedding (arXiv 2601.04720) for classification, where the targets of other rows are right
answers too often to be negatives. Nothing is gathered.

Shapes: b rows of this rank, a targets, m hard negatives, k the most hard negatives of a row.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.loss.contrastive import LossShare, SimilarityStatistics, spread
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.negatives import is_above, rows_of_group, share_of_mean
from megatron_llave.loss.schedules import current_temperature


def own_negatives_loss(
    embeddings: PairEmbeddings,
    ids: PairIds | None = None,
    reward: PairEmbeddings | None = None,
    *,
    config: LossConfig,
    group: dist.ProcessGroup | None = None,
    log_temperature: Tensor | None = None,
) -> LossShare:
    """-log(e^{s+ / tau} / (e^{s+ / tau} + sum of e^{s- / tau + alpha s-} over the row's own hard negatives)).

    It goes from query to target alone, since a hard negative has no other query. A row with several targets has the
    mean of their losses; a row without hard negatives has none.

    Args:
        embeddings: unit vectors of this rank, with `hard_rows` if there are hard negatives.
        ids: needed by config.mask_same_target, and for the numbers of rows of all ranks, as in
            `hardness_weighted_contrastive_loss`.
        reward: as there, and with the same `target_rows` and `hard_rows`.
        config: temperature, alpha, mask_same_target, mask_margin and hardness; the other fields are not used here.
        group: the ranks over which the loss is a mean; they may have different numbers of rows. None: this rank alone.
        log_temperature: as there.

    Returns:
        This rank's share of the loss: the mean of the shares over the ranks is the mean of the loss over all rows. The
        statistics have only own hard negatives.

    Raises:
        ValueError: it is not known whose the hard negatives are.
    """
    positives, cosines = own_cosines(embeddings)  # [a] and [m]
    mean_positive = embeddings.mean_of_targets(positives.detach())  # [b]
    hardness = cosines.detach() if reward is None else own_cosines(reward)[1]
    alpha = 0.0 if config.hardness == "in_batch" else config.alpha
    masked = _masked(cosines.detach(), mean_positive, embeddings, ids, config)
    temperature = current_temperature(config, log_temperature)
    logits = (cosines / temperature + alpha * hardness).masked_fill(masked, -torch.inf)
    logits = embeddings.pad_hard(logits, -torch.inf)  # [b, k]
    odds = logits[embeddings.rows_of_targets] - (positives / temperature)[:, None]  # [a, k]
    losses = torch.cat([odds.new_zeros(len(odds), 1), odds], 1).logsumexp(1)  # [a]
    loss = share_of_mean(embeddings.mean_of_targets(losses).sum(), rows_of_group(embeddings, ids, group).pairs)
    hardest = embeddings.pad_hard(cosines.detach().masked_fill(masked, -torch.inf), -torch.inf).amax(1)
    return loss, SimilarityStatistics(mean_positive, hardest, *spread(logits.detach()))


def own_cosines(embeddings: PairEmbeddings) -> tuple[Tensor, Tensor]:
    """Cosines [a] of the targets and [m] of the hard negatives with the query that they belong to, at least float32.

    Raises:
        ValueError: there are hard negatives without `hard_rows`.
    """
    precise = torch.promote_types(embeddings.query.dtype, torch.float32)
    query, target, hard = (x.to(precise) for x in (embeddings.query, embeddings.target, embeddings.hard_negatives))
    return (query[embeddings.rows_of_targets] * target).sum(1), (query[embeddings.rows_of_hard] * hard).sum(1)


def _masked(
    cosines: Tensor, mean_positive: Tensor, embeddings: PairEmbeddings, ids: PairIds | None, config: LossConfig
) -> Tensor:
    """[m] whether a hard negative is masked, that is, no negative of its row."""
    rows = embeddings.rows_of_hard
    masked = torch.zeros_like(cosines, dtype=torch.bool)
    if config.mask_same_target:
        if ids is None:
            raise ValueError("mask_same_target needs the ids of all queries, targets and hard negatives")
        same = embeddings.pad_targets(ids.target, 0)[rows] == ids.hard_negatives[:, None]  # [m, most targets of a row]
        is_target = embeddings.pad_targets(torch.ones_like(ids.target, dtype=torch.bool), False)[rows]
        masked |= (same & is_target).any(1)
    if config.mask_margin is not None:
        masked |= is_above(cosines, mean_positive[rows], config.mask_margin)
    return masked

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
from megatron_llave.loss.negatives import rows_of_group
from megatron_llave.loss.ragged import mean_of_rows, pad_rows


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
        embeddings: unit vectors of this rank, with `hard_rows`.
        ids: needed by config.mask_same_target, and for the numbers of rows of all ranks, as in
            `hardness_weighted_contrastive_loss`.
        reward: as there.
        config: temperature, alpha, mask_same_target, mask_margin and hardness; the other fields are not used here.
        group: the ranks over which the loss is a mean; they may have different numbers of rows. None: this rank alone.
        log_temperature: as there.

    Returns:
        This rank's share of the loss: the mean of the shares over the ranks is the mean of the loss over all rows. The
        statistics have only own hard negatives.

    Raises:
        ValueError: it is not known whose the hard negatives are.
    """
    rows, hard_rows = rows_of_targets(embeddings), embeddings.hard_rows
    if hard_rows is None:
        raise ValueError("own negatives need hard_rows, which say whose the hard negatives are")
    num_rows = len(embeddings.query)
    positives, cosines = own_cosines(embeddings)  # [a] and [m]
    mean_positive = mean_of_rows(positives.detach(), rows, num_rows)  # [b]
    hardness = cosines.detach() if reward is None else own_cosines(reward, rows, hard_rows)[1]
    alpha = 0.0 if config.hardness == "in_batch" else config.alpha
    masked = _masked(cosines.detach(), mean_positive, embeddings, ids, config)
    temperature = config.temperature if log_temperature is None else log_temperature.exp()
    logits = (cosines / temperature + alpha * hardness).masked_fill(masked, -torch.inf)
    logits = pad_rows(logits, hard_rows, num_rows, -torch.inf)  # [b, k]
    odds = logits[rows] - (positives / temperature)[:, None]  # [a, k]
    losses = torch.cat([odds.new_zeros(len(odds), 1), odds], 1).logsumexp(1)  # [a]
    counts = rows_of_group(embeddings, ids, group).pairs
    loss = mean_of_rows(losses, rows, num_rows).sum() * len(counts) / max(1, sum(counts))
    hardest = pad_rows(cosines.detach().masked_fill(masked, -torch.inf), hard_rows, num_rows, -torch.inf).amax(1)
    return loss, SimilarityStatistics(mean_positive, hardest, *spread(logits.detach()))


def rows_of_targets(embeddings: PairEmbeddings) -> Tensor:
    """[a] row of each target, also where every query has one."""
    if embeddings.target_rows is not None:
        return embeddings.target_rows
    return torch.arange(len(embeddings.query), device=embeddings.query.device)


def own_cosines(
    embeddings: PairEmbeddings, rows: Tensor | None = None, hard_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines [a] of the targets and [m] of the hard negatives with the query that they belong to, at least float32."""
    precise = torch.promote_types(embeddings.query.dtype, torch.float32)
    query, target, hard = (x.to(precise) for x in (embeddings.query, embeddings.target, embeddings.hard_negatives))
    rows = rows_of_targets(embeddings) if rows is None else rows
    hard_rows = embeddings.hard_rows if hard_rows is None else hard_rows
    return (query[rows] * target).sum(1), (query[hard_rows] * hard).sum(1)


def _masked(
    cosines: Tensor, mean_positive: Tensor, embeddings: PairEmbeddings, ids: PairIds | None, config: LossConfig
) -> Tensor:
    """[m] whether a hard negative is masked, that is, no negative of its row."""
    hard_rows = embeddings.hard_rows
    masked = torch.zeros_like(cosines, dtype=torch.bool)
    if config.mask_same_target:
        if ids is None:
            raise ValueError("mask_same_target needs the ids of all queries, targets and hard negatives")
        same = ids.hard_negatives[:, None] == ids.target  # [m, a]
        masked |= (same & (hard_rows[:, None] == rows_of_targets(embeddings))).any(1)
    if config.mask_margin is not None:
        margin = config.mask_margin + 8 * torch.finfo(cosines.dtype).eps
        masked |= cosines > mean_positive[hard_rows] + margin
    return masked

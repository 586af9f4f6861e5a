"""The loss against soft labels: how a teacher weighs the targets and hard negatives of a query against each other.

The teacher is a reranker, a judge, or another embedding model. All that is compared lies on one rank, so nothing is
gathered.

Shapes: b rows of this rank, a targets, m hard negatives, k the most targets and hard negatives of a row.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.negatives import rows_of_group, share_of_mean
from megatron_llave.loss.own_negatives import own_cosines
from megatron_llave.loss.schedules import current_temperature


def soft_label_loss(
    embeddings: PairEmbeddings, teacher: Tensor, config: LossConfig, log_temperature: Tensor | None = None
) -> Tensor:
    """Divergence of the model's softmax over each row's targets and own hard negatives from the teacher's.

    With `config.soft_label_loss: cross_entropy` it is -sum P_teacher log P_model (Qwen3-VL-Embedding, arXiv 2601.04720,
    equation 3), with `symmetric_kl` half the sum of the two Kullback-Leibler divergences (UniME-V2, arXiv 2510.13515).

    Args:
        embeddings: unit vectors of this rank, with `hard_rows` if there are hard negatives.
        teacher: [a + m] scores of the targets, then of the hard negatives. Those that are NaN are left out.
        config: soft_label_loss, soft_label_temperature of the teacher, and soft_label_student_temperature.
        log_temperature: the logarithm of config.temperature, which gets its gradient if it is that of the soft labels
            too; None: it is not learned.

    Returns:
        [b] loss of each row, of at least float32. It is NaN, without a gradient, where fewer than two scores are known.

    Raises:
        ValueError: there is not one score for each, or it is not known whose the hard negatives are.
    """
    num_targets, num_hard = len(embeddings.target), len(embeddings.hard_negatives)
    if len(teacher) != num_targets + num_hard:
        raise ValueError(f"{len(teacher)} scores for {num_targets} targets and {num_hard} hard negatives")
    temperature = config.soft_label_student_temperature or current_temperature(config, log_temperature)
    cosines = own_cosines(embeddings)

    def beside(of_targets: Tensor, of_hard: Tensor, fill: float) -> Tensor:
        """[b, k] the values of each row's targets and hard negatives."""
        return torch.cat([embeddings.pad_targets(of_targets, fill), embeddings.pad_hard(of_hard, fill)], 1)

    scores = beside(*teacher.to(cosines[0].dtype).split([num_targets, num_hard]), torch.nan)
    is_known = ~scores.isnan()
    is_used = is_known & (is_known.sum(1, keepdim=True) > 1)  # a softmax of one is 1
    # Unknown scores take part as the lowest logit there is, whose softmax is 0; -inf would give NaN gradients.
    lowest = torch.finfo(scores.dtype).min
    labels = (scores / config.soft_label_temperature).masked_fill(~is_used, lowest).log_softmax(1)
    model = (beside(*cosines, 0.0) / temperature).masked_fill(~is_used, lowest).log_softmax(1)
    if config.soft_label_loss == "cross_entropy":
        terms = -labels.exp() * model
    else:
        terms = 0.5 * (labels.exp() - model.exp()) * (labels - model)
    losses = torch.where(is_used, terms, 0.0).sum(1)
    return losses.masked_fill(~is_used.any(1), torch.nan)


def with_soft_labels(
    embeddings: PairEmbeddings,
    ids: PairIds | None = None,
    reward: PairEmbeddings | None = None,
    *,
    loss: Callable[..., LossShare],
    config: LossConfig,
    group: dist.ProcessGroup | None = None,
    log_temperature: Tensor | None = None,
) -> LossShare:
    """Another loss times `config.contrastive_weight`, plus that against the soft labels times `soft_label_weight`.

    A row without soft labels adds nothing to the second one, which like the first is a mean over all rows. So a row's
    loss does not depend on how many other rows have soft labels.
    """
    share, statistics = loss(embeddings, ids, reward, config=config, group=group, log_temperature=log_temperature)
    counts = rows_of_group(embeddings, ids, group).pairs
    scores = None if ids is None else ids.scores
    if scores is None:
        soft_label = torch.full_like(statistics.positive, torch.nan)
        return share * config.contrastive_weight, replace(statistics, soft_label=soft_label)
    losses = soft_label_loss(embeddings, scores, config, log_temperature)
    soft_share = share_of_mean(losses.nansum(), counts)
    total = config.contrastive_weight * share + config.soft_label_weight * soft_share
    return total, replace(statistics, soft_label=losses.detach())

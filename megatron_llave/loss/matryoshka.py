"""A loss over prefixes of the embedding (Matryoshka, arXiv 2205.13147)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.loss.contrastive import LossShare, hardness_weighted_contrastive_loss
from megatron_llave.loss.inputs import PairEmbeddings, PairIds


def matryoshka_loss(
    embeddings: PairEmbeddings,
    ids: PairIds | None = None,
    reward: PairEmbeddings | None = None,
    *,
    loss: Callable[..., LossShare] = hardness_weighted_contrastive_loss,
    config: LossConfig,
    group: dist.ProcessGroup | None = None,
    log_temperature: Tensor | None = None,
) -> LossShare:
    """Mean of a loss over prefixes of the embedding, each renormalised to unit length.

    The lengths of the prefixes are `config.matryoshka_dims`, in rising order. `loss` is a function like
    `hardness_weighted_contrastive_loss`, and the other arguments are its arguments; the hardness of a prefix comes from
    the prefix of `reward` of the same length, but with config.reward=stored from the complete vectors, whose width is
    that of another model.

    Returns:
        This rank's share of the loss, and the similarity statistics of the longest prefix; losses against soft labels
        are means over the prefixes.

    Raises:
        ValueError: a prefix is longer than the embedding, or `loss` refuses an argument.
    """
    dims, width = config.matryoshka_dims, embeddings.query.shape[1]
    if max(dims) > width:
        raise ValueError(f"dims={dims} go beyond the embedding's {width}")
    losses, soft_labels = [], []
    for dim in dims:
        prefix = partial(_prefix, dim=dim)
        is_whole = reward is None or config.reward == "stored"
        reward_prefix = reward if is_whole else reward.map(prefix)
        share, statistics = loss(
            embeddings.map(prefix), ids, reward_prefix, config=config, group=group, log_temperature=log_temperature
        )
        losses.append(share)
        soft_labels.append(statistics.soft_label)
    if statistics.soft_label is not None:
        statistics = replace(statistics, soft_label=torch.stack(soft_labels).mean(0))
    return torch.stack(losses).mean(), statistics


def _prefix(embeddings: Tensor, dim: int) -> Tensor:
    """[rows, dim] first components, renormalised in at least float32."""
    return F.normalize(embeddings[:, :dim].to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)

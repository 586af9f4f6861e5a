"""The contrastive loss over prefixes of the embedding (Matryoshka, arXiv 2205.13147)."""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.batch import PairEmbeddings
from megatron_llave.loss.contrastive import LossShare, hardness_weighted_contrastive_loss


def matryoshka_loss(
    query: Tensor,
    target: Tensor,
    *,
    dims: list[int],
    hard_negatives: Tensor | None = None,
    reward: PairEmbeddings | None = None,
    **settings: object,
) -> LossShare:
    """Mean of the loss over prefixes of the embedding, each renormalised (arXiv 2205.13147); statistics of the longest.

    Args:
        query: [b, d].
        target: [b, d].
        dims: lengths of the prefixes, rising.
        hard_negatives: [m, d].
        reward: hardness comes from prefixes of these, of the same length.
        settings: temperature, alpha, and the further arguments of `hardness_weighted_contrastive_loss`.

    Raises:
        ValueError: a prefix is longer than the embedding, or what `hardness_weighted_contrastive_loss` refuses.
    """
    if max(dims) > query.shape[1]:
        raise ValueError(f"dims={dims} go beyond the embedding's {query.shape[1]}")
    losses = []
    for dim in dims:
        hard = None if hard_negatives is None else _prefix(hard_negatives, dim)
        reward_prefix = None
        if reward is not None:
            reward_prefix = PairEmbeddings(*(_prefix(getattr(reward, f.name), dim) for f in fields(reward)))
        loss, statistics = hardness_weighted_contrastive_loss(
            _prefix(query, dim), _prefix(target, dim), hard_negatives=hard, reward=reward_prefix, **settings
        )
        losses.append(loss)
    return torch.stack(losses).mean(), statistics


def _prefix(embeddings: Tensor, dim: int) -> Tensor:
    return F.normalize(embeddings[:, :dim].to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)

"""Hardness-weighted contrastive loss (LLaVE section 3.2): pure functions of embeddings and a process group.

Shapes: b local rows, B rows of all ranks, d embedding.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.config import LossConfig
from megatron_llave.parallel import all_gather_rows, row_counts


@dataclass
class SimilarityStatistics:
    """What the loss saw, detached; each over this rank's b queries."""

    positive: Tensor
    """[b] cosine of each query and its own target."""
    hardest_negative: Tensor
    """[b] largest cosine of each query and another pair's target; -1 where the batch holds no other pair."""


def temperature_at(config: LossConfig, step: int) -> float:
    """Temperature of a step: from temperature_start to temperature, geometrically."""
    if config.temperature_start is None or step >= config.temperature_warmup_steps:
        return config.temperature
    done = step / config.temperature_warmup_steps
    return config.temperature_start ** (1 - done) * config.temperature**done


def alpha_at(config: LossConfig, step: int) -> float:
    """Hardness weight of a step: linearly from 0 to alpha."""
    return config.alpha * min(1.0, step / config.alpha_warmup_steps) if config.alpha_warmup_steps else config.alpha


def hardness_weighted_contrastive_loss(
    query: Tensor,
    target: Tensor,
    temperature: float,
    alpha: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, SimilarityStatistics]:
    """Symmetric InfoNCE in which a negative's logit is raised by alpha times its own, detached, cosine.

    The released code adds log(exp(alpha * cos)), which is alpha * cos, in bfloat16, which is off by up to 0.065.

    Args:
        query: [b, d] unit vectors; row i belongs with target row i.
        target: [b, d] unit vectors.
        temperature: divisor of the cosines.
        alpha: hardness weight; 0 is plain symmetric InfoNCE.
        group: ranks whose rows are each other's negatives: the data-parallel group, never a model-parallel one. The
            numbers of rows may differ.

    Returns:
        This rank's share of the loss, a scalar of at least float32: the mean of the ranks' values is the mean over all
        B rows and both directions, and averaging parameter gradients over the ranks gives its exact gradient.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    query, target = query.to(precise), target.to(precise)
    counts = row_counts(query, group)
    rank = 0 if group is None else group.rank()
    first = sum(counts[:rank])
    all_queries = all_gather_rows(query, counts, group)  # [B, d]
    all_targets = all_gather_rows(target, counts, group)
    own = torch.arange(first, first + len(query), device=query.device)  # [b] columns of the positives

    cosines = query @ all_targets.T  # [b, B]
    to_target = _row_losses(cosines, own, temperature, alpha)
    to_query = _row_losses(target @ all_queries.T, own, temperature, alpha)
    share = len(counts) / max(1, sum(counts))  # ranks / B: the mean over ranks becomes the mean over rows
    loss = (to_target.sum() + to_query.sum()) * (0.5 * share)
    return loss, _statistics(cosines.detach(), own)


def _row_losses(cosines: Tensor, own: Tensor, temperature: float, alpha: float) -> Tensor:
    """[b, B] cosines and [b] columns of the positives -> [b] losses."""
    hardness = alpha * cosines.detach()
    hardness = hardness.scatter(1, own[:, None], 0.0)  # the positive is not weighted
    return F.cross_entropy(cosines / temperature + hardness, own, reduction="none")


def _statistics(cosines: Tensor, own: Tensor) -> SimilarityStatistics:
    positive = cosines.gather(1, own[:, None]).squeeze(1)
    negatives = cosines.scatter(1, own[:, None], -1.0)
    return SimilarityStatistics(positive, negatives.amax(dim=1) if len(own) else positive)

"""The contrastive loss: pure functions of embeddings, a LossConfig and a process group.

A further loss goes into a file of its own in this folder and is chosen in `build_loss`.
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.loss.contrastive import LossShare, hardness_weighted_contrastive_loss
from megatron_llave.loss.cosent import cosent_loss
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.matryoshka import matryoshka_loss
from megatron_llave.loss.own_negatives import own_negatives_loss
from megatron_llave.loss.soft_labels import with_soft_labels

Compare = Callable[[PairEmbeddings, PairIds, PairEmbeddings | None], LossShare]
"""Takes this rank's embeddings, their ids, and the reward model's embeddings of the same inputs, of any width (None:
the model judges hardness itself). Returns this rank's share of the loss and the similarity statistics."""


def build_loss(
    config: LossConfig, data_parallel: dist.ProcessGroup | None, log_temperature: Tensor | None = None
) -> Compare:
    """The loss of a step.

    Args:
        config: the section `loss` for the step's subset, with the temperature and alpha of the step (see
            `schedules.at_step`).
        data_parallel: the ranks whose pairs are negatives of this rank's, unless `config.negatives` is own_micro_batch.
        log_temperature: the logarithm of config.temperature, which gets its gradient; None: it is not learned.
    """
    group = None if config.negatives == "own_micro_batch" else data_parallel
    loss = own_negatives_loss if config.negatives == "own" else hardness_weighted_contrastive_loss
    if config.objective == "cosent":
        loss = cosent_loss
    elif config.soft_labels is not None:
        loss = partial(with_soft_labels, loss=loss)
    if config.matryoshka_dims:
        loss = partial(matryoshka_loss, loss=loss)
    return partial(loss, config=config, group=group, log_temperature=log_temperature)

"""The contrastive loss: pure functions of embeddings, a LossConfig and a process group.

A further loss goes into a file of its own in this folder and is chosen in `build_loss`.
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import PairEmbeddings, PairIds
from megatron_llave.config.loss import LossConfig
from megatron_llave.loss.contrastive import LossShare, hardness_weighted_contrastive_loss
from megatron_llave.loss.matryoshka import matryoshka_loss

Compare = Callable[[PairEmbeddings, PairIds, PairEmbeddings | None], LossShare]
"""Takes this rank's embeddings, their ids, and the reward model's embeddings of the same inputs, of any width (None:
the model judges hardness itself). Returns this rank's share of the loss and the similarity statistics."""


def build_loss(
    config: LossConfig, data_parallel: dist.ProcessGroup | None, log_temperature: Tensor | None = None
) -> Compare:
    """The loss of a step.

    Args:
        config: the section `loss`, with the temperature and alpha of the step (see `schedules.at_step`).
        data_parallel: the ranks whose pairs are negatives of this rank's, unless `config.negatives` is own_micro_batch.
        log_temperature: the logarithm of config.temperature, which gets its gradient; None: it is not learned.
    """
    group = None if config.negatives == "own_micro_batch" else data_parallel
    loss = matryoshka_loss if config.matryoshka_dims else hardness_weighted_contrastive_loss
    return partial(loss, config=config, group=group, log_temperature=log_temperature)

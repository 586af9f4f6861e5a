"""Gradients of a contrastive loss over several micro batches, through megatron-core's own pipeline schedules.

`global_batch`: the negatives of a pair are all other pairs of the step, whatever the micro-batch size:
  1. embed pass: forward only over all micro batches; the last stage keeps the embeddings [2b + m, d] of each;
  2. loss on all of them, gathered over the data-parallel ranks, and its gradient with respect to the local ones;
  3. replay pass: forward and backward over the same micro batches with the surrogate sum(embeddings * gradient).
The parameters' gradient is that of one process with the whole batch at once (GradCache, arXiv 2101.06983). The price is
one more forward, without the tower when that is frozen: its features are kept from the first pass for the second.

`micro_batch`: one pass; the negatives of a pair are those of its own micro batch on all data-parallel ranks, as in the
released code. With one micro batch per step both are the same, and the single pass is taken. `own_micro_batch` is the
same, but for a loss that does not look beyond this rank.

A reward model other than the model itself embeds all micro batches once more, before anything else.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import PairBatch, PairEmbeddings
from megatron_llave.distributed.schedule import run_schedule
from megatron_llave.loss.contrastive import LossShare

Compare = Callable[..., LossShare]
"""(embeddings: PairEmbeddings, reward: PairEmbeddings | None, query_ids [b], target_ids [b], hard_negative_ids [m]) ->
this rank's share of the loss and what it saw."""

RewardModel = Callable[[], AbstractContextManager]
"""A context in which the chunks are the reward model."""


def forward_backward(
    chunks: list[Module],
    batches: list[PairBatch],
    compare: Compare,
    negatives: str,
    reward_model: RewardModel | None = None,
) -> list[LossShare]:
    """Leave the gradient of the step's loss in the chunks' gradient buffers.

    Args:
        chunks: this rank's model chunks, wrapped for data parallel.
        batches: this rank's micro batches, on its device.
        compare: the loss.
        negatives: global_batch, or micro_batch or own_micro_batch, between which `compare` tells.
        reward_model: whose cosines are the hardness; None: the model's own.

    Returns:
        What the loss saw, once per loss computed; on the last pipeline stage, elsewhere nothing. The step's loss is the
        mean over them and over the data-parallel ranks.
    """
    nothing: list[None] = [None] * len(batches)  # what stages before the last have of embeddings and gradients
    rewards = nothing
    if reward_model is not None:
        with reward_model():
            rewards = _embed(chunks, batches) or nothing
    if negatives != "global_batch" or len(batches) == 1:
        return run_schedule(chunks, list(zip(batches, rewards)), partial(_compare_step, compare=compare))
    states = _RandomStates(chunks)
    embeddings = _embed(chunks, batches, states)
    gradients, shares = nothing, []
    if embeddings:
        gradients, share = _loss_gradients(embeddings, rewards, batches, compare)
        shares = [share]
    after = states.current()
    replay = partial(_replay_step, schedule_divisor=len(batches), states=states)
    run_schedule(chunks, list(zip(range(len(batches)), batches, gradients)), replay)
    states.restore(after)
    return shares


class _RandomStates:
    """Random states of the embed pass, so that dropout drops the same channels in the replay pass.

    Kept per micro batch and chunk: the schedules run the two passes in different orders.
    """

    def __init__(self, chunks: list[Module]) -> None:
        config = get_model_config(chunks[0])
        self.needed = config.hidden_dropout > 0 or config.attention_dropout > 0
        self._states: dict[tuple[int, int], tuple] = {}

    def current(self) -> tuple | None:
        if not self.needed:
            return None
        return torch.get_rng_state(), torch.cuda.get_rng_state(), get_cuda_rng_tracker().get_states()

    def keep(self, micro_batch: int, chunk: Module) -> None:
        self._states[micro_batch, id(chunk)] = self.current()

    def replay(self, micro_batch: int, chunk: Module) -> None:
        self.restore(self._states[micro_batch, id(chunk)])

    def restore(self, state: tuple | None) -> None:
        if state is not None:
            torch.set_rng_state(state[0])
            torch.cuda.set_rng_state(state[1])
            get_cuda_rng_tracker().set_states(state[2])


def _embed(chunks: list[Module], batches: list[PairBatch], states: _RandomStates | None = None) -> list[Tensor]:
    """Embeddings [2b + m, d] of every micro batch, on the last pipeline stage; elsewhere nothing."""
    return run_schedule(chunks, list(enumerate(batches)), partial(_embed_step, states=states), forward_only=True)


def _embed_step(
    items: Iterator[tuple[int, PairBatch]], chunk: Module, states: _RandomStates | None
) -> tuple[Tensor, Callable]:
    micro_batch, batch = next(items)
    if states is not None:
        states.keep(micro_batch, chunk)
    return chunk(batch.sequences), lambda embeddings, non_loss_data: embeddings


def _compare_step(
    items: Iterator[tuple[PairBatch, Tensor | None]], chunk: Module, compare: Compare
) -> tuple[Tensor, Callable]:
    batch, reward = next(items)

    def loss_of(embeddings: Tensor) -> tuple[Tensor, LossShare]:
        if not embeddings.requires_grad:
            # All that made them is frozen, as for texts with only the projector trained. The schedule would skip this
            # backward, in which other ranks wait for the gradients of this rank's rows.
            embeddings = embeddings.detach().requires_grad_()
        loss, statistics = _loss_over([embeddings], [reward], [batch], compare)
        # A copy, because the schedule divides the loss in place. It divides by the number of micro batches, and the
        # data-parallel wrapper averages over ranks: just the means that the step's loss is.
        return loss, (loss.detach().clone(), statistics)

    return _last_forward(chunk, batch), loss_of


def _loss_over(
    embeddings: list[Tensor], rewards: list[Tensor | None], batches: list[PairBatch], compare: Compare
) -> LossShare:
    """The loss over the pairs of these micro batches, and over the other ranks'."""
    pairs = PairEmbeddings.concatenate([PairEmbeddings.of(*item) for item in zip(embeddings, batches)])
    reward = None
    if rewards[0] is not None:
        reward = PairEmbeddings.concatenate([PairEmbeddings.of(*item) for item in zip(rewards, batches)])
    names = ("query_ids", "target_ids", "hard_negative_ids")
    ids = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return compare(pairs, reward, **ids)


def _loss_gradients(
    embeddings: list[Tensor], rewards: list[Tensor | None], batches: list[PairBatch], compare: Compare
) -> tuple[list[Tensor], LossShare]:
    """Gradient [2b + m, d] of this rank's share of the loss with respect to each micro batch's embeddings."""
    leaves = [x.detach().requires_grad_() for x in embeddings]
    loss, statistics = _loss_over(leaves, rewards, batches, compare)
    loss.backward()
    return [leaf.grad for leaf in leaves], (loss.detach(), statistics)


def _replay_step(
    items: Iterator[tuple[int, PairBatch, Tensor | None]], chunk: Module, schedule_divisor: int, states: _RandomStates
) -> tuple[Tensor, Callable]:
    micro_batch, batch, gradient = next(items)
    states.replay(micro_batch, chunk)

    def surrogate(embeddings: Tensor) -> tuple[Tensor, None]:
        # The schedule divides by the number of micro batches, but the gradients are those of the whole step's loss.
        # The average over data-parallel ranks stays: the loss is a rank's share, whose mean over ranks is the loss.
        return (embeddings * gradient).sum() * schedule_divisor, None

    return _last_forward(chunk, batch), surrogate


def _last_forward(chunk: Module, batch: PairBatch) -> Tensor:
    """The forward after which a frozen tower's features are not needed any more, but for the graph."""
    output = chunk(batch.sequences)
    batch.sequences.features = None
    return output

"""Gradients of a contrastive loss over several micro batches, through megatron-core's own pipeline schedules.

With `global_batch` the negatives of a pair are all other pairs of the step, whatever the micro-batch size:
  1. Embed pass: a forward pass over all micro batches; the last stage keeps the embeddings [b + a + m, d] of each.
  2. The loss over all of them, gathered over the data-parallel ranks, and its gradient with respect to the local ones.
  3. Replay pass: forward and backward over the same micro batches with the surrogate sum(embeddings * gradient).
The gradient of the parameters is that of one process with the whole batch at once (GradCache, arXiv 2101.06983). It
costs one more forward pass, in which a frozen vision encoder does not take part: its features are kept from pass 1,
unless micro batches come one after the other (micro_batches.py), of which nothing is kept.

With `micro_batch` one pass is enough: the negatives of a pair are those of its own micro batch on all data-parallel
ranks, as in the official LLaVE repository. With one micro batch per step both are the same, and the single pass is
taken. `own_micro_batch` differs only in the loss, which does not look beyond this rank.

A reward model other than the model itself embeds all micro batches once more, before anything else; stored embeddings
of one come with the micro batches.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import PairBatch
from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed.schedule import run_schedule
from megatron_llave.loss import Compare
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.models.lora import draws_random_numbers
from megatron_llave.training.micro_batches import MicroBatches, kept_of, longest_row

RewardModel = Callable[[], AbstractContextManager]
"""A context in which the chunks are the reward model."""


def forward_backward(
    chunks: list[Module],
    batches: list[PairBatch] | MicroBatches,
    compare: Compare,
    config: LossConfig,
    reward_model: RewardModel | None = None,
) -> list[LossShare]:
    """Compute the gradient of the step's loss and leave it in the gradient buffers of the chunks.

    Args:
        chunks: this rank's model chunks, wrapped for data parallel.
        batches: this rank's micro batches, on its device.
        compare: the loss, from `build_loss`.
        config: what `compare` was built from, which says how many passes are made and who judges hardness.
        reward_model: the model whose cosines are the hardness; None: the trained model itself, or the one of the
            stored embeddings.

    Returns:
        The result of each call of the loss, on the last pipeline stage; an empty list on the other stages. The step's
        loss is the mean over these results and over the data-parallel ranks.
    """
    is_stored = config.reward == "stored"
    nothing: list[None] = [None] * len(batches)  # stages before the last have neither embeddings nor gradients
    rewards, sizes = nothing, (len(batches), longest_row(batches))
    if reward_model is not None:
        with reward_model():
            rewards = _embed(chunks, batches) or nothing
    if config.takes_one_pass(len(batches)):
        step = partial(_compare_step, compare=compare, is_stored=is_stored)
        return run_schedule(chunks, zip(batches, rewards), *sizes, step)
    states = _RandomStates(chunks)
    embeddings = _embed(chunks, batches, states)
    gradients, shares, rows = nothing, [], kept_of(batches)
    if embeddings:
        rewards = [batch.stored for batch in rows] if is_stored else rewards
        gradients, share = _loss_gradients(embeddings, rewards, rows, compare)
        shares = [share]
    after = states.current()
    replay = partial(_replay_step, schedule_divisor=len(batches), states=states)
    run_schedule(chunks, zip(itertools.count(), batches, gradients), *sizes, replay)
    states.restore(after)
    return shares


class _RandomStates:
    """Random states of the embed pass, with which dropout drops the same channels in the replay pass.

    There is one per micro batch and chunk, because the schedules run the two passes in different orders.
    """

    def __init__(self, chunks: list[Module]) -> None:
        self.needed = draws_random_numbers(chunks[0])
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


def _embed(
    chunks: list[Module], batches: list[PairBatch] | MicroBatches, states: _RandomStates | None = None
) -> list[Tensor]:
    """Embeddings [b + a + m, d] of every micro batch on the last pipeline stage; an empty list on the other stages."""
    step = partial(_embed_step, states=states)
    return run_schedule(chunks, enumerate(batches), len(batches), longest_row(batches), step, forward_only=True)


def _embed_step(
    items: Iterator[tuple[int, PairBatch]], chunk: Module, states: _RandomStates | None
) -> tuple[Tensor, Callable]:
    micro_batch, batch = next(items)
    if states is not None:
        states.keep(micro_batch, chunk)
    return chunk(batch.sequences), lambda embeddings, non_loss_data: embeddings


def _compare_step(
    items: Iterator[tuple[PairBatch, Tensor | None]], chunk: Module, compare: Compare, is_stored: bool
) -> tuple[Tensor, Callable]:
    batch, reward = next(items)
    reward = batch.stored if is_stored else reward

    def loss_of(embeddings: Tensor) -> tuple[Tensor, LossShare]:
        if not embeddings.requires_grad:
            # Everything that made them is frozen, as for texts with only the projector trained. The schedule would skip
            # this backward pass, in which other ranks wait for the gradients of this rank's rows.
            embeddings = embeddings.detach().requires_grad_()
        loss, statistics = _loss_over([embeddings], [reward], [batch], compare)
        # Return a copy, because the schedule divides the loss in place. It divides by the number of micro batches, and
        # the data-parallel wrapper averages over the ranks: the same two means that define the step's loss.
        return loss, (loss.detach().clone(), statistics)

    return _last_forward(chunk, batch), loss_of


def _loss_over(
    embeddings: list[Tensor], rewards: list[Tensor | None], batches: list[PairBatch], compare: Compare
) -> LossShare:
    """The loss over the pairs of these micro batches, compared with those of the other ranks too."""
    reward = None if rewards[0] is None else PairEmbeddings.of(rewards, batches)
    return compare(PairEmbeddings.of(embeddings, batches), PairIds.of(batches), reward)


def _loss_gradients(
    embeddings: list[Tensor], rewards: list[Tensor | None], batches: list[PairBatch], compare: Compare
) -> tuple[list[Tensor], LossShare]:
    """Gradient [b + a + m, d] of this rank's share of the loss with respect to each micro batch's embeddings."""
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
        # Undo the schedule's division by the number of micro batches: the gradients are those of the whole step's loss.
        # The average over the data-parallel ranks is right, because the loss is the mean of the ranks' shares.
        return (embeddings * gradient).sum() * schedule_divisor, None

    return _last_forward(chunk, batch), surrogate


def _last_forward(chunk: Module, batch: PairBatch) -> Tensor:
    """The last forward pass of a micro batch in a step: it frees the kept features of a frozen vision encoder."""
    output = chunk(batch.sequences)
    batch.sequences.features = None
    return output

"""Gradients of a contrastive loss over several micro batches, through megatron-core's own pipeline schedules.

`global_batch`: the negatives of a pair are all other pairs of the step, whatever the micro-batch size:
  1. embed pass: forward only over all micro batches; the last stage keeps the embeddings [2b, d] of each;
  2. loss on all of them, gathered over the data-parallel ranks, and its gradient with respect to the local ones;
  3. replay pass: forward and backward over the same micro batches with the surrogate sum(embeddings * gradient).
The parameters' gradient is that of one process with the whole batch at once (GradCache, arXiv 2101.06983). The price is
one more forward, without the tower when that is frozen: its features are kept from the first pass for the second.

`micro_batch`: one pass; the negatives of a pair are those of its own micro batch on all data-parallel ranks, as in the
released code. With one micro batch per step both are the same, and the single pass is taken.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_llave.batch import PairBatch
from megatron_llave.loss import SimilarityStatistics

Compare = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, SimilarityStatistics]]
"""(query [b, d], target [b, d], query_ids [b], target_ids [b]) -> this rank's share of the loss, what it saw."""

Seen = tuple[Tensor, SimilarityStatistics]
"""Detached share of the loss, and the statistics."""


def forward_backward(chunks: list[Module], batches: list[PairBatch], compare: Compare, negatives: str) -> list[Seen]:
    """Leave the gradient of the step's loss in the chunks' gradient buffers.

    Args:
        chunks: this rank's model chunks, wrapped for data parallel.
        batches: this rank's micro batches, on its device.
        compare: the loss.
        negatives: global_batch or micro_batch.

    Returns:
        What the loss saw, once per loss computed; on the last pipeline stage, elsewhere nothing. The step's loss is the
        mean over them and over the data-parallel ranks.
    """
    if negatives == "micro_batch" or len(batches) == 1:
        return _run(chunks, batches, partial(_compare_step, compare=compare))
    with torch.no_grad():  # megatron-core's forward_only alone would keep every graph
        embeddings = _run(chunks, batches, _embed_step, forward_only=True)
    is_last_stage = len(embeddings) > 0
    gradients, seen = _loss_gradients(embeddings, batches, compare) if is_last_stage else ([None] * len(batches), [])
    _run(chunks, list(zip(batches, gradients)), partial(_replay_step, num_micro_batches=len(batches)))
    return seen


def _run(chunks: list[Module], items: list, step: Callable, forward_only: bool = False) -> list:
    """All micro batches through megatron-core's schedule for this layout: no pipelining, 1F1B or interleaved."""
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(items) for _ in chunks] if len(chunks) > 1 else iter(items),
        model=chunks,
        num_microbatches=len(items),
        seq_length=1,  # unused, as is the next: every micro batch sends its own shape along
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _embed_step(items: Iterator[PairBatch], chunk: Module) -> tuple[Tensor, Callable]:
    return chunk(next(items).sequences), lambda embeddings, non_loss_data: embeddings


def _compare_step(items: Iterator[PairBatch], chunk: Module, compare: Compare) -> tuple[Tensor, Callable]:
    batch = next(items)

    def loss_of(embeddings: Tensor) -> tuple[Tensor, Seen]:
        query, target = embeddings.split([batch.num_pairs, batch.num_pairs])
        loss, statistics = compare(query, target, batch.query_ids, batch.target_ids)
        # A copy, because the schedule divides the loss in place. It divides by the number of micro batches, and the
        # data-parallel wrapper averages over ranks: just the means that the step's loss is.
        return loss, (loss.detach().clone(), statistics)

    return chunk(batch.sequences), loss_of


def _loss_gradients(
    embeddings: list[Tensor], batches: list[PairBatch], compare: Compare
) -> tuple[list[Tensor], list[Seen]]:
    """Gradient [2b, d] of this rank's share of the loss with respect to each micro batch's embeddings."""
    leaves = [x.detach().requires_grad_() for x in embeddings]
    halves = [leaf.split([batch.num_pairs, batch.num_pairs]) for leaf, batch in zip(leaves, batches)]
    query, target = (torch.cat(side) for side in zip(*halves))  # [all local b, d]
    ids = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("query_ids", "target_ids"))
    loss, statistics = compare(query, target, *ids)
    loss.backward()
    return [leaf.grad for leaf in leaves], [(loss.detach(), statistics)]


def _replay_step(
    items: Iterator[tuple[PairBatch, Tensor | None]], chunk: Module, num_micro_batches: int
) -> tuple[Tensor, Callable]:
    batch, gradient = next(items)

    def surrogate(embeddings: Tensor) -> tuple[Tensor, None]:
        # The schedule divides by the number of micro batches, but the gradients are those of the whole step's loss.
        # The average over data-parallel ranks stays: the loss is a rank's share, whose mean over ranks is the loss.
        return (embeddings * gradient).sum() * num_micro_batches, None

    return chunk(batch.sequences), surrogate

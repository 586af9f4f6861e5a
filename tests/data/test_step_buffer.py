"""A step in one buffer: every field comes back, on views of the buffer."""

from dataclasses import fields, is_dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_llave.batch import PackedSequences, PairBatch, StepBatches
from megatron_llave.data.step_buffer import ALIGNMENT, pack_step, unpack_step


def batch(tokens, tiles, blended):
    """A micro batch with every dtype, empty tensors, and fields that may be None."""
    sequences = PackedSequences(
        tokens=torch.arange(tokens),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        lengths=[tokens],
        num_sequences=1,
        tiles=torch.randint(0, 256, (tiles, 3, 5, 5), dtype=torch.uint8),
        num_tiles=tiles,
        visual_source=torch.from_numpy(np.arange(3 * tiles)),
        visual_position=torch.arange(3 * tiles),
        last_token=torch.tensor([tokens - 1]),
        blank=torch.tensor([True] * tiles) if tiles else None,
        blend_source=torch.randint(0, 9, (2, 4)) if blended else None,
        blend_weights=torch.rand(2, 4) if blended else None,
    )
    ids = torch.tensor([-(2**63), 2**63 - 1])
    stored = torch.rand(4, 3) if blended else None
    hard = torch.zeros(0, dtype=torch.int64)
    return PairBatch(sequences, ids, ids + 1, hard, "v\u00f6gel", ["a", "b"], 1, 2, stored=stored)


def require_equal(one, other):
    for field in fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.equal(theirs), field.name
        elif is_dataclass(ours):
            require_equal(ours, theirs)
        else:
            assert ours == theirs, field.name


def test_everything_comes_back():
    batches = [batch(7, 1, True), batch(5, 0, False), batch(1, 3, False)]
    position = {"step": 4, "subsets": {"v\u00f6gel": {"weight": 0.1 + 0.2, "taken": 12}}}
    flat = pack_step(StepBatches(batches, position))
    step = unpack_step(flat)
    assert step.position == position and len(step.batches) == 3
    for ours, theirs in zip(batches, step.batches):
        require_equal(ours, theirs)
    start, end = flat.payload.data_ptr(), flat.payload.data_ptr() + flat.payload.nbytes
    for restored in step.batches:
        for tensor in (restored.query_ids, restored.sequences.tokens, restored.sequences.cu_seqlens):
            assert start <= tensor.data_ptr() < end and (tensor.data_ptr() - start) % ALIGNMENT == 0


def test_a_step_without_micro_batches():
    step = unpack_step(pack_step(StepBatches([], {"step": 0})))
    assert step == StepBatches([], {"step": 0})

"""megatron-core's pipeline schedules, called in one place."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn import Module


def run_schedule(chunks: list[Module], items: list, step: Callable, forward_only: bool = False) -> list:
    """Micro batches through megatron-core's schedule for this layout: no pipelining, 1F1B or interleaved.

    Args:
        chunks: this rank's model chunks.
        items: one per micro batch; each chunk walks through all of them.
        step: megatron-core's forward step, (iterator of items, chunk) -> (output, what to do with the last stage's).
        forward_only: without gradients; `step` then returns a function of (output, True) whose results are collected.

    Returns:
        What the last stage's outputs gave, one per item; on other stages nothing.
    """
    # megatron-core's forward_only alone would keep every graph.
    with torch.no_grad() if forward_only else nullcontext():
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

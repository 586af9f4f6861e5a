"""megatron-core's pipeline schedules, called in one place."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.nn import Module


def run_schedule(chunks: list[Module], items: list, step: Callable, forward_only: bool = False) -> list:
    """Run the micro batches through megatron-core's schedule for this layout: no pipelining, 1F1B or interleaved.

    Args:
        chunks: this rank's model chunks.
        items: one per micro batch; each chunk iterates over all of them.
        step: megatron-core's forward step. It takes an iterator of items and a chunk, and returns the chunk's output
            and a function that the last stage calls with it.
        forward_only: do not compute gradients; the function that `step` returns is then called with (output, True).

    Returns:
        The results of that function on the last stage, one per item; an empty list on other stages.
    """
    # With forward_only alone, megatron-core would keep every autograd graph.
    with torch.no_grad() if forward_only else nullcontext():
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(items) for _ in chunks] if len(chunks) > 1 else iter(items),
            model=chunks,
            num_microbatches=len(items),
            seq_length=1,  # unused, like micro_batch_size: every micro batch sends its own shape along
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

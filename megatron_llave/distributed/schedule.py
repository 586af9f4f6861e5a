"""megatron-core's pipeline schedules, called in one place."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import tee

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor
from torch.nn import Module


def run_schedule(
    chunks: list[Module], items: Iterable, count: int, longest: int, step: Callable, forward_only: bool = False
) -> list:
    """Run the micro batches through megatron-core's schedule for this layout: no pipelining, 1F1B or interleaved.

    Pipeline stages send tensors of one shape, padded to the longest row: hidden states, and what a LanguageModel sends
    on beside them (`sent_rows`). If they exchanged the shape before every send, the host would wait each time.

    Args:
        chunks: this rank's model chunks, which leave out the rows of their input that are padding.
        items: one per micro batch; each chunk iterates over all of them, and an item is made when it is needed.
        count: number of items.
        longest: tokens of the longest packed row, the same on all pipeline stages and context ranks.
        step: megatron-core's forward step. It takes an iterator of items and a chunk, and returns the chunk's output
            and a function that the last stage calls with it.
        forward_only: do not compute gradients; the function that `step` returns is then called with (output, True).

    Returns:
        The results of that function on the last stage, one per item; an empty list on other stages.
    """
    language = get_attr_wrapped_model(chunks[0], "language")
    longest *= getattr(language, "sent_rows", 1)

    def padded_step(data: Iterator, chunk: Module) -> tuple[Tensor, Callable]:
        output, function = step(data, chunk)
        return _padded(output, longest, chunk), function

    # With forward_only alone, megatron-core would keep every autograd graph.
    with torch.no_grad() if forward_only else nullcontext():
        return get_forward_backward_func()(
            forward_step_func=padded_step,
            data_iterator=list(tee(items, len(chunks))) if len(chunks) > 1 else iter(items),
            model=chunks,
            num_microbatches=count,
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _padded(output: Tensor, longest: int, chunk: Module) -> Tensor:
    """Return what a chunk sends on, hidden states [t, 1, h], with as many rows as its part of the longest row has."""
    if get_attr_wrapped_model(chunk, "post_process"):
        return output
    config = get_model_config(chunk)
    parts = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    missing = longest // parts - len(output)
    return F.pad(output, (0, 0, 0, 0, 0, missing)) if missing else output

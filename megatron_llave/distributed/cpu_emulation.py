"""Lets megatron-core run on a CPU over gloo by replacing the few functions of torch that it calls for a GPU.

Entry points and tests call `enable()` before they build anything. It does nothing where CUDA is available, so that a
GPU is never hidden. Replacing the attributes once is enough, because megatron-core looks them up at every call. A torch
function mode would slow down every operation (measured: +24 % of the step of a tiny model).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU = torch.device("cpu")

# megatron-core builds these with device="cuda", or with the integer of torch.cuda.current_device().
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip


def enable() -> bool:
    """Install the replacements unless CUDA is available or they are installed already.

    Returns:
        Whether megatron-core runs on the CPU from now on.
    """
    if torch.cuda.is_available():
        return False
    if not getattr(torch.cuda.current_device, "is_cpu_emulation", False):
        _replace_factories()
        _replace_tensor_methods()
        _replace_cuda_functions()
        _replace_rng_functions()
        _wait_for_overlapped_collectives()
    return True


def _names_cuda(device: Any) -> bool:
    is_index = isinstance(device, int) and not isinstance(device, bool)
    return is_index or str(device).startswith("cuda")


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and _names_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapper


def _replace_factories() -> None:
    # `with torch.device(...)` looks the factories up at its first use, and must find torch's own ones.
    with CPU:
        torch.empty(0)
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        # The optimizer groups parameters by names such as 'torch.cuda.FloatTensor' and refuses other names.
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


class _Stream:
    """A stream that does nothing, for megatron-core 0.19, whose param_and_grad_buffer.py asks for the current one."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once: work on a CPU is complete when its call returns."""

    def synchronize(self) -> None:
        """Return at once: work on a CPU is complete when its call returns."""

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: Any) -> None:
        return None


def _replace_cuda_functions() -> None:
    def current_device() -> torch.device:
        return CPU

    current_device.is_cpu_emulation = True
    stream = _Stream()
    torch.cuda.current_device = current_device
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: stream
    torch.cuda.stream = lambda wanted: stream


def _replace_rng_functions() -> None:
    from megatron.core.tensor_parallel import random

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = random._get_cuda_rng_state = get_rng_state
    torch.cuda.set_rng_state = random._set_cuda_rng_state = set_rng_state


def _wait_for_overlapped_collectives() -> None:
    """Let the data-parallel wrapper wait for each collective of parallel.overlap where it starts it.

    With several under way at once gloo sometimes frees a record of a buffer twice (a control block of
    gloo::ShareableNonOwningPtr), and the process ends with "malloc(): unaligned tcache chunk detected": about one in 60
    runs of some hundred collectives on a loaded machine (torch 2.13).
    """
    from megatron.core.distributed import param_and_grad_buffer

    coalescing_manager = param_and_grad_buffer._coalescing_manager

    @contextmanager
    def waiting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with coalescing_manager(*args, **kwargs) as manager:
            yield manager
        manager.wait()
        manager.works.clear()  # the wrapper waits too

    param_and_grad_buffer._coalescing_manager = waiting

"""Lets megatron-core run on CPU over gloo: stand-ins for the few torch.cuda calls it makes. Nothing else is patched.

Entry points and tests call `enable()` before they build anything; importing the package does no more than
`keep_compiler_unloaded()`. Where CUDA is available both do nothing, so that a real GPU is never hidden. megatron-core
looks everything up when it calls it, so attributes are replaced once; a torch function mode would cost every operation
(measured: +24 % of a tiny model's step).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")

# megatron-core builds these with device="cuda", or with the integer of torch.cuda.current_device().
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "linspace", "ones", "ones_like",
    "rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip


def keep_compiler_unloaded() -> None:
    """Let megatron-core's decorators leave its functions as they are, which are not called on a CPU.

    At its import it hands fusions to torch.compile, and that loads the whole compiler: 4 of the 9 seconds in which a
    process starts. Others get torch's own.
    """
    if torch.cuda.is_available() or hasattr(torch.compile, "original"):
        return
    original = torch.compile

    @functools.wraps(original)
    def compile(model: Callable | None = None, **options: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return model if model is not None else lambda function: function
        return original(model, **options)

    compile.original = original
    torch.compile = compile


def enable() -> bool:
    """Install the stand-ins unless CUDA is available or they are in place already.

    Returns:
        True when megatron-core now runs on the CPU.
    """
    if torch.cuda.is_available():
        return False
    if not getattr(torch.cuda.current_device, "is_cpu_emulation", False):
        _replace_factories()
        _replace_tensor_methods()
        _replace_cuda_functions()
        _replace_rng_functions()
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
    # `with torch.device(...)` looks the factories up at its first use; it must find torch's own, which ours end in.
    with CPU:
        torch.empty(0)
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        # The optimizer sorts parameters by names such as 'torch.cuda.FloatTensor' and refuses others.
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


class _Stream:
    """A stream that does nothing, for megatron-core 0.19 (param_and_grad_buffer.py asks for the current one)."""

    def wait_stream(self, stream: Any) -> None:
        """CPU work is done when the call returns."""

    def synchronize(self) -> None:
        """CPU work is done when the call returns."""

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

"""Lets the Python code of Transformer Engine run on a CPU, over torch in place of its compiled extension.

That code is the package's own, from the wheel `transformer_engine` on PyPI, which holds no compiled code: its checks,
FP8 scales, caches of weights, fused weight gradients, recomputation and state dicts are those of a GPU. What is not
seen: limits of the kernels other than those that extension.py checks, their speed, NCCL, and streams.

`enable` must be called before megatron-core is imported, which looks for Transformer Engine once, at its import. So it
needs a process of its own; check_engine.py is one.
"""

import functools
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from engine import extension
from engine.context import GatheringAttention

FOLDER = Path(sys.prefix) / "transformer_engine"
"""Where `make test` unpacks the wheel: not among the site-packages, since the package refuses to be imported alone."""

CHANGES = {
    "transformer_engine.common": [
        # The extension is a module of these tests, and not a library beside the package.
        ('assert framework in ("jax", "torch"), f"Unsupported framework {framework}"\n\n', "return\n\n"),
    ],
    "transformer_engine.pytorch.module.base": [
        ("if not torch.cuda.is_available():", "if False:"),
        ("if not inp.is_cuda:", "if False:"),
    ],
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention": [
        ("query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda", "True"),
    ],
    "transformer_engine.pytorch.attention.dot_product_attention.backends": [
        ("query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda", "True"),
    ],
}
"""Text that is replaced in modules of Transformer Engine: where it insists on a GPU."""
gpu: Any = None
"""The LogicalGpu whose kernels the double is, while one is entered."""
UNUSED = ("transformer_engine.pytorch.triton", "transformer_engine.pytorch.onnx_extensions")
"""Modules that need further packages, and whose functions no dense transformer layer calls."""


class _Finder(MetaPathFinder):
    """Finds the modules of Transformer Engine that are changed, and empty ones for those that are not needed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name.startswith(UNUSED):
            return importlib.util.spec_from_loader(name, _Empty(), is_package=True)
        if name not in CHANGES:
            return None
        spec = PathFinder.find_spec(name, path)
        spec.loader = _Changed(name, spec.loader.path)
        return spec


class _Changed(SourceFileLoader):
    """Loads a module whose source is changed as CHANGES says."""

    def get_code(self, name: str) -> types.CodeType:
        source = Path(self.path).read_text()
        for old, new in CHANGES[name]:
            assert old in source, f"{name} of this version of Transformer Engine has no {old!r}"
            source = source.replace(old, new)
        return compile(source, self.path, "exec")


class _Empty:
    def create_module(self, spec: ModuleSpec) -> MagicMock:
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: MagicMock) -> None:
        pass


def enable(folder: Path = FOLDER) -> None:
    """Make `import transformer_engine` succeed in this process.

    Raises:
        FileNotFoundError: the wheel has not been unpacked into `folder`.
    """
    assert "megatron.core" not in sys.modules, "megatron-core has looked for Transformer Engine already"
    if not (folder / "transformer_engine").is_dir():
        raise FileNotFoundError(folder / "transformer_engine")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # then its import does not look for libraries of CUDA
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    sys.path.append(str(folder))
    sys.meta_path.insert(0, _Finder())
    sys.modules["transformer_engine_torch"] = extension
    for name, function in vars(extension).copy().items():
        if inspect.isfunction(function) and not name.startswith("_"):
            setattr(extension, name, _kernel(function))
    _pretend_hopper()


def _kernel(function: Callable) -> Callable:
    @functools.wraps(function)
    def kernel(*args: object, **kwargs: object) -> object:
        return (function if gpu is None else gpu.kernel(function))(*args, **kwargs)

    return kernel


def _pretend_hopper() -> None:
    """Answer what Transformer Engine asks of torch.cuda as an H100 would."""
    hopper = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, name="double")
    torch.cuda.get_device_properties = lambda *args: hopper
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = "13.0"
    tensor_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        args = tuple("cpu" if str(arg).startswith("cuda") else arg for arg in args)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return tensor_to(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.cuda.Stream = types.SimpleNamespace
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    context_parallel.AttnFuncWithCPAndKVP2P = GatheringAttention
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

"""The kernels that compute a run: those of torch, Transformer Engine or apex. A run logs them when it starts.

megatron-core chooses those of the optimizer itself (megatron/core/optimizer/__init__.py): the fused AdamW of
Transformer Engine, else of apex, else torch's.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from megatron_llave.config.model import ModelConfig

APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
"""The extension of apex that megatron-core's own linear layers use."""


def fuses_weight_gradients(kernels: str) -> bool:
    """Whether the backward pass adds weight gradients directly to the float32 buffer.

    Transformer Engine's layers do so; torch's do with the extension of apex, on a GPU.
    """
    if kernels == "transformer_engine":
        return True
    return torch.cuda.is_available() and find_spec(APEX_WEIGHT_GRADIENT) is not None


def describe_kernels(model: ModelConfig, optimizer: str) -> str:
    """Return a line for the log: device, layers, precision, weight gradients, optimizer, and what to improve.

    Args:
        model: the `model` section of the run.
        optimizer: the code that updates the weights, such as "FusedAdam of apex".
    """
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    layers = f"torch {torch.__version__}"
    if model.kernels == "transformer_engine":
        layers = f"Transformer Engine {_version('transformer-engine')}"
    precision = f"fp8 ({model.fp8_recipe})" if model.precision == "fp8" else model.precision
    parts = [f"kernels on {device}: {layers}", precision, f"recompute {model.recompute}"]
    parts.append("fused weight gradients" if fuses_weight_gradients(model.kernels) else "weight gradients not fused")
    line = ", ".join([*parts, optimizer])
    if find_spec("apex") is not None and not _has_apex_optimizers():
        line += "; the package apex here is not NVIDIA's and of no use (pip uninstall apex)"
    elif on_gpu and model.kernels == "local":
        line += "; model.kernels=transformer_engine is faster on a GPU"
    return line


def _has_apex_optimizers() -> bool:
    try:
        return find_spec("apex.optimizers") is not None
    except ImportError:  # find_spec imports the package, and the web framework of that name needs further packages
        return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # built from source without metadata
        return "of unknown version"

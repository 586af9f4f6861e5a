"""The kernels that compute a run: those of torch, Transformer Engine or apex. A run logs them when it starts.

megatron-core chooses those of the optimizer itself (megatron/core/optimizer/__init__.py): the fused AdamW of
Transformer Engine, else of apex, else torch's.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from math import lcm
from typing import Any

import torch

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig

APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
"""The extension of apex that megatron-core's own linear layers use."""
ROW_STEP = 128
"""On a GPU the length of a packed row is a multiple of this many tokens."""
VARIABLE_LENGTH_ATTENTION = "torch.nn.attention.varlen"
"""The module of torch's attention over packed sequences, since torch 2.10."""
VARIABLE_LENGTH_SINCE = (8, 0)
"""The lowest compute capability that it runs on."""
CAUSAL = ("window_size", "is_causal")
"""Its arguments that make it causal, in newer and in older versions of torch."""
LARGEST_HEAD = 256
"""The most channels of a head that it has kernels for; their number must be a multiple of 8."""


def fuses_weight_gradients(kernels: str) -> bool:
    """Whether the backward pass adds weight gradients directly to the float32 buffer.

    Transformer Engine's layers do so; torch's do with the extension of apex, on a GPU.
    """
    if kernels == "transformer_engine":
        return True
    return torch.cuda.is_available() and find_spec(APEX_WEIGHT_GRADIENT) is not None


def fuses_activations() -> bool:
    """Whether activations are computed in one kernel with the bias before them and the product after them.

    megatron-core compiles these kernels with torch.compile, which needs a GPU, Triton and a C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return torch.cuda.is_available() and find_spec("triton") is not None and compiler is not None


def attention_kernel(model: ModelConfig, head_size: int | None = None) -> str:
    """Return what the decoder, or another part with heads of `head_size` channels, attends to a packed row with.

    This is transformer_engine; or with local kernels variable_length, torch's FlashAttention, which takes the row as it
    is, on a GPU; or else buckets of sequences of similar lengths.
    """
    if model.kernels == "transformer_engine":
        return model.kernels
    if torch.cuda.is_available() and takes_variable_length(model, head_size):
        return "variable_length" if torch.cuda.get_device_capability() >= VARIABLE_LENGTH_SINCE else "buckets"
    return "buckets"


def takes_variable_length(model: ModelConfig, head_size: int | None = None) -> bool:
    """Whether local kernels attend to a packed row as it is on a GPU that is new enough.

    They do in bf16, with heads that torch's FlashAttention has kernels for (None: those of the decoder), and if the
    installed torch has it.
    """
    head_size = head_size or model.language.head_channels
    fits = model.precision != "fp32" and head_size % 8 == 0 and head_size <= LARGEST_HEAD
    return fits and find_spec(VARIABLE_LENGTH_ATTENTION) is not None


@cache
def variable_length_attention() -> tuple[Callable, dict[str, Any]]:
    """Return torch's causal attention over packed sequences, and the keyword arguments with which it is causal.

    It is loaded when it is first used, because it loads torch's compiler. Fewer heads of keys than of queries have to
    be named since torch 2.12 (enable_gqa), and the mask is a window since torch 2.11.
    """
    attention = import_module(VARIABLE_LENGTH_ATTENTION).varlen_attn
    known = signature(attention).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return attention, causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def row_multiple(model: ModelConfig, layout: ParallelConfig) -> int:
    """Return the number of tokens that the length of a packed row is a multiple of.

    FP8 needs blocks of tokens, and sequence parallel splits the row. Context parallel splits it first, into two chunks
    of every sequence for each rank. On a GPU lengths are rounded up, so that they repeat: work that libraries do once
    per shape, such as choosing a kernel, is then done once and not at every step.
    """
    block = {"mxfp8": 32, "blockwise": 128}.get(model.fp8_recipe, 16) if model.precision == "fp8" else 1
    needed = block * (layout.tensor if layout.sequence else 1)
    own = lcm(needed, ROW_STEP) if torch.cuda.is_available() else needed
    return own if layout.context == 1 else layout.context * lcm(own, 2)


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
    if on_gpu:
        parts.append(f"attention {attention_kernel(model)}")
        parts.append("fused activations" if fuses_activations() else "no Triton or C compiler to fuse activations with")
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

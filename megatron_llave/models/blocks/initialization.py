"""Random initial weights, the same at every parallel layout: each parameter's generator is seeded by its global name.

megatron-core's own initialisation cuts the matrix of a gated MLP without regard to its two halves, and starts every
pipeline stage from the same random state, so that equal seeds give different models at different layouts.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter


def mark_gated(decoder: Module) -> None:
    """Mark the [gate; up] parameters of a TransformerBlock: each tensor-parallel rank holds its part of both halves."""
    if decoder.config.gated_linear_unit:
        for layer in decoder.layers:
            for parameter in (layer.mlp.linear_fc1.weight, layer.mlp.linear_fc1.bias):
                if parameter is not None:
                    parameter.is_gated = True


def global_names(chunk: Module) -> Callable[[str], str]:
    """Return a function from names in a pipeline chunk to those in the complete model (layers counted over stages)."""
    layers = chunk.language.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    prefix = "language.decoder.layers."

    def to_global(name: str) -> str:
        index, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(index) + offset}{dot}{rest}" if name.startswith(prefix) else name

    return to_global


def named_global_parameters(chunk: Module) -> Iterator[tuple[str, Parameter]]:
    """Yield the parameters of a pipeline chunk under their names in the complete model."""
    to_global = global_names(chunk)
    for name, parameter in chunk.named_parameters():
        yield to_global(name), parameter


def initialize_parameters(chunks: list[Module], tensor_group: dist.ProcessGroup, seed: int) -> None:
    """Fill every parameter in place.

    Matrices, embeddings and image_newline are normal with standard deviation 1/sqrt(inputs). Norm weights are 1 and
    biases 0. The numbers are drawn on the parameter's device, which takes a GPU seconds where a CPU needs a minute for
    7b; with the same seed, a GPU draws other numbers than a CPU.
    """
    for chunk in chunks:
        for name, parameter in named_global_parameters(chunk):
            device = parameter.device if parameter.is_cuda else torch.device("cpu")
            full = _draw(name, full_shape(parameter, tensor_group.size()), seed, device)
            part = tensor_parallel_part(full, parameter, tensor_group.rank(), tensor_group.size())
            with torch.no_grad():
                parameter.copy_(part)


def full_shape(parameter: Parameter, tensor: int) -> list[int]:
    """Return the shape of the parameter before it was split over `tensor` tensor-parallel ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tensor
    return shape


def tensor_parallel_part(full: Tensor, parameter: Parameter, rank: int, tensor: int) -> Tensor:
    """Return the part of a full parameter that tensor-parallel rank `rank` of `tensor` holds."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    if getattr(parameter, "is_gated", False):
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(tensor)[rank], up.chunk(tensor)[rank]])
    return full.chunk(tensor, parameter.partition_dim)[rank]


def _draw(name: str, shape: list[int], seed: int, device: torch.device) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1 and name != "image_newline":
        return torch.ones(shape, device=device)
    generator = named_generator(name, seed, device)
    inputs = shape[0] if len(shape) == 1 else torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator, device=device).mul_(inputs**-0.5)


def named_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """Return the generator that draws the parameter of this name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)

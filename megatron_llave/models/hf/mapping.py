"""Rules that make one parameter of ours out of tensors of a Hugging Face folder, and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How one parameter of ours is made of their tensors, and taken apart into them again."""

    names: list[str]
    """Canonical names."""
    join: Callable[[list[Tensor]], Tensor]
    """Their tensors, in the order of `names` -> ours."""
    split: Callable[[Tensor], list[Tensor]]
    """Ours -> theirs, bit for bit."""

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of their tensors, by canonical name, when ours has this one."""
        parts = self.split(torch.empty(shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.names, parts)}


def join_qkv(parts: list[Tensor], groups: int) -> Tensor:
    """Query [n * d, ...], key and value [groups * d, ...] -> [(n + 2 * groups) * d, ...].

    megatron-core's order: for each key/value head its query heads, then the key head, then the value head.
    """
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def split_qkv(joined: Tensor, heads: int, groups: int) -> list[Tensor]:
    """The inverse of join_qkv, for `heads` query heads."""
    grouped = joined.unflatten(0, (groups, heads // groups + 2, -1))  # [groups, n / groups + 2, d, ...]
    return [part.flatten(0, 2) for part in grouped.split([heads // groups, 1, 1], dim=1)]


def local_kernel_name(name: str) -> str:
    """The name that local kernels give a norm which Transformer Engine fuses into the layer after it."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Rows of zeros at the end, up to `rows`: the token embedding's, which no token id refers to."""
    missing = rows - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

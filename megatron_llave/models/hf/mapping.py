"""Rules that make one parameter of ours out of tensors of a Hugging Face folder, and take it apart again.

A family's table gives one Rule per parameter. Both directions copy values bit for bit. Knows no model family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How one parameter of ours is made of the folder's tensors. Made by the functions below."""

    kind: str
    """copied, padded, qkv, stacked_qkv, gated or flattened."""
    names: tuple[str, ...]
    """Canonical names of the folder's tensors (see HfFormat)."""
    heads: int = 1
    """Query heads, for kinds qkv and stacked_qkv."""
    groups: int = 1
    """Key/value heads, for kinds qkv and stacked_qkv."""
    rows: int = 0
    """Rows that the folder's tensor has, for kind padded."""
    columns: tuple[int, ...] = ()
    """Sizes of the folder's tensor after the first, for kind flattened."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """The folder's tensors, in the order of `names`, as one parameter of ours (not padded yet, see pad_rows)."""
        if self.kind == "qkv":
            return join_qkv(parts, self.groups)
        if self.kind == "stacked_qkv":
            each = [len(parts[0]) * part // (self.heads + 2 * self.groups) for part in (self.heads, self.groups)]
            return join_qkv(list(parts[0].split([*each, each[1]])), self.groups)
        if self.kind == "flattened":
            return parts[0].flatten(1)
        return torch.cat(parts) if self.kind == "gated" else parts[0]

    def split(self, ours: Tensor) -> list[Tensor]:
        """The inverse of `join`; rows of padding are left out."""
        if self.kind == "qkv":
            return split_qkv(ours, self.heads, self.groups)
        if self.kind == "stacked_qkv":
            return [torch.cat(split_qkv(ours, self.heads, self.groups))]
        if self.kind == "flattened":
            return [ours.unflatten(1, self.columns)]
        if self.kind == "gated":
            return list(ours.chunk(2))
        return [ours[: self.rows] if self.kind == "padded" else ours]

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the folder's tensors by canonical name, for a parameter of ours of this shape."""
        parts = self.split(torch.empty(shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.names, parts)}


def copied(name: str) -> Rule:
    """The parameter is the tensor."""
    return Rule("copied", (name,))


def padded(name: str, rows: int) -> Rule:
    """The parameter is the tensor of `rows` rows and some rows of zeros after them.

    How many depends on the tensor-parallel size.
    """
    return Rule("padded", (name,), rows=rows)


def qkv(query: str, key: str, value: str) -> Rule:
    """The parameter interleaves the projections to queries, keys and values (join_qkv); layer_rules adds the heads."""
    return Rule("qkv", (query, key, value))


def stacked_qkv(name: str) -> Rule:
    """The parameter interleaves what the tensor stacks: queries, keys and values; layer_rules adds the heads."""
    return Rule("stacked_qkv", (name,))


def flattened(name: str, columns: tuple[int, ...]) -> Rule:
    """The parameter is the tensor [h, *columns], such as the kernel of a convolution, as a matrix of h rows."""
    return Rule("flattened", (name,), columns=columns)


def gated(gate: str, up: str) -> Rule:
    """The parameter stacks the gate and the other half of a gated MLP's first matrix, [gate; up]."""
    return Rule("gated", (gate, up))


def layer_rules(
    layer: Mapping[str, Rule], ours: str, theirs: str, num_layers: int, heads: int, groups: int
) -> dict[str, Rule]:
    """Rules of all layers of a stack.

    Args:
        layer: rules of one layer; the names on both sides are relative to the layer.
        ours: prefix of the layer's number in our names, such as "language.decoder.layers.".
        theirs: the same in the canonical names.
        num_layers: of the stack.
        heads: query heads of a layer.
        groups: key/value heads of a layer.
    """
    return {
        f"{ours}{index}.{name}": replace(
            rule, names=tuple(f"{theirs}{index}.{part}" for part in rule.names), heads=heads, groups=groups
        )
        for index in range(num_layers)
        for name, rule in layer.items()
    }


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
    """The tensor with rows of zeros added at its end, up to `rows` rows; no token id refers to them."""
    missing = rows - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def hf_shapes(shapes: Mapping[str, tuple[int, ...]], rules: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the folder's tensors that make up parameters of ours with these full shapes."""
    return {theirs: part for name, shape in shapes.items() for theirs, part in rules[name].shapes(shape).items()}

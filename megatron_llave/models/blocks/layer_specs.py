"""The modules of a transformer layer: torch's own (model.kernels=local) or those of Transformer Engine.

Shapes: s sequence, t packed tokens, b batch, h hidden, n heads, d head dimension; megatron-core order [s, b, h].
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_llave.batch import to_device
from megatron_llave.data.context import RowPart, part_of
from megatron_llave.errors import import_optional
from megatron_llave.models.blocks.kernels import CAUSAL, variable_length_attention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that works with sequence parallel, as megatron-core's torch norm does not."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # megatron-core sums gradients so marked over the tensor-parallel ranks, each of which saw its own tokens.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Layer norm with the same interface as RMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(hidden, (hidden.shape[-1],), self.weight, self.bias, self.eps)


@dataclass
class PackedRow(PackedSeqParams):
    """How sequences lie in a packed row: megatron-core's record for the attention, with what the local attention needs.

    It is made once per micro batch. megatron-core's own fields are set for Transformer Engine alone.
    """

    cu_seqlens: Tensor | None = None
    """[n + 1] int32 boundaries of the sequences, on the device; the padding counts as a sequence."""
    lengths: list[int] = field(default_factory=list)
    """n lengths in tokens, which the host knows without waiting for the device."""
    bucket_rows: list[Tensor] = field(default_factory=list)
    """For each bucket of similar lengths [sequences, longest] int64: positions in the packed row. A shorter sequence
    repeats its last position. Empty where the attention takes the row as it is."""
    from_buckets: Tensor | None = None
    """[t] int64: index of each packed token in the concatenation of the flattened buckets."""
    positions: Tensor | None = None
    """[t] int64 position of each token in its own sequence."""
    key_rows: list[Tensor] = field(default_factory=list)
    """If context ranks share the row: the places of the keys in the whole row, for each bucket [sequences, most keys]
    int64, or for all sequences end to end. Empty if this rank has the row: then keys lie as the queries do."""
    masks: list[Tensor] = field(default_factory=list)
    """For each bucket with key_rows [sequences, 1, longest, most keys] bool: whether a query sees a key."""
    query_ends: Tensor | None = None
    """Boundaries int32 of the queries for an attention that takes the row as it is: cu_seqlens, or those of chunks."""
    key_ends: Tensor | None = None
    """Boundaries int32 of their keys."""
    longest: tuple[int, int] = (0, 0)
    """Most queries and most keys between these boundaries."""
    thd: PackedSeqParams | None = None
    """What Transformer Engine's attention gets where each token's position is given: the rotary embedding then takes
    the row as one sequence ("sbhd"), and only the attention knows the boundaries."""

    @property
    def max_seqlen(self) -> int:
        """Return the length of the longest sequence in tokens."""
        return max(self.lengths)


LENGTH_STEP = 512
"""On a GPU, Transformer Engine is told that the longest sequence has a multiple of this many tokens: a bound, which
repeats, so that it chooses a kernel less often."""


def length_bucket(length: int) -> int:
    """Return the bucket of a sequence of `length` tokens: bucket b holds the lengths above 2**(b-1), up to 2**b."""
    return (length - 1).bit_length()


def packed_row(
    cu_seqlens: Tensor,
    lengths: list[int],
    attention: str,
    context: dist.ProcessGroup | None = None,
    positions: Tensor | None = None,
    causal: bool = True,
) -> PackedRow:
    """Describe a packed row for the attention, without waiting for the device.

    Transformer Engine takes "thd" with cu_seqlens, those of the whole row if context ranks share it. Buckets batch
    sequences whose lengths lie between the same powers of two: a few large calls instead of one per sequence, with at
    most four times the attention arithmetic.

    Args:
        cu_seqlens: [n + 1] int32 boundaries of the sequences end to end, on the device.
        lengths: their n differences.
        attention: see kernels.attention_kernel.
        context: the ranks that share the row; None: this rank has all of it.
        positions: [t] or [3, t] int64 of the tokens that this rank has; None: they are counted in each sequence.
        causal: whether a token attends to the tokens before it alone, or to its whole sequence. Without a mask a bucket
            has sequences of one length.
    """
    row = PackedRow(qkv_format="sbhd", cu_seqlens=cu_seqlens, lengths=lengths)
    total, device = sum(lengths), cu_seqlens.device
    if attention == "transformer_engine":
        step = LENGTH_STEP if device.type == "cuda" else 1
        longest = -(-row.max_seqlen // step) * step
        known = dict(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
        known |= dict(max_seqlen_q=longest, max_seqlen_kv=longest)
        if positions is None:  # it counts them itself
            return PackedRow(**known, cu_seqlens=cu_seqlens, lengths=lengths)
        row.thd = PackedSeqParams(**known)
        row.positions = positions
        return row
    if context is not None and context.size() > 1:
        _set_part(row, part_of(lengths, context.rank(), context.size()), attention)
        row.positions = row.positions if positions is None else positions
        return row
    row.query_ends = row.key_ends = cu_seqlens
    row.longest = (row.max_seqlen, row.max_seqlen)
    if attention == "buckets":
        shapes, places = _buckets(lengths, [length_bucket(length) if causal else length for length in lengths])
        # One copy to the device for all of them.
        sizes = [rows * longest for rows, longest in shapes]
        *buckets, row.from_buckets = to_device(places, device).split([*sizes, total])
        row.bucket_rows = [bucket.view(shape) for bucket, shape in zip(buckets, shapes)]
    if positions is not None:
        row.positions = positions
        return row
    starts = cu_seqlens.long()
    first = torch.repeat_interleave(starts[:-1], starts.diff(), output_size=total)
    row.positions = torch.arange(total, device=device) - first
    return row


def _set_part(row: PackedRow, part: RowPart, attention: str) -> None:
    """Set what the attention needs for a context rank's part of a row, whose keys are those of all ranks."""
    device = row.cu_seqlens.device
    if attention == "variable_length":
        vectors = [part.positions, part.bounds, part.key_bounds, part.keys]
        row.positions, bounds, key_bounds, keys = _to_device(vectors, device)
        row.query_ends, row.key_ends, row.key_rows = bounds.int(), key_bounds.int(), [keys]
        row.longest = (int(part.bounds.diff().max()), int(part.key_bounds.diff().max()))
        return
    lengths = part.bounds.diff().tolist()
    shapes, places = _buckets(lengths, [(length_bucket(length), index % 2) for index, length in enumerate(lengths)])
    *buckets, from_buckets = places.split([*(rows * longest for rows, longest in shapes), len(part.positions)])
    keys = [_keys_of(part, bucket.view(shape)) for bucket, shape in zip(buckets, shapes)]
    moved = _to_device([part.positions, from_buckets, *buckets, *(x.flatten() for x in keys)], device)
    row.positions, row.from_buckets, *moved = moved
    row.bucket_rows = [bucket.view(shape) for bucket, shape in zip(moved, shapes)]
    row.key_rows = [vector.view(x.shape) for vector, x in zip(moved[len(shapes) :], keys)]
    for rows, key_rows in zip(row.bucket_rows, row.key_rows):
        steps = torch.arange(key_rows.shape[1], device=device)
        row.masks.append((steps <= row.positions[rows][:, :, None])[:, None])


def _keys_of(part: RowPart, bucket: Tensor) -> Tensor:
    """[chunks, longest] places in the part -> [chunks, most keys] places of the chunks' keys in the whole row.

    A chunk with fewer keys repeats its last one.
    """
    first_place = bucket[:, :1].contiguous()  # [chunks, 1]
    chunk = torch.searchsorted(part.bounds, first_place, right=True) - 1  # [chunks, 1]
    first, counts = part.key_bounds[chunk], part.key_bounds.diff()[chunk]  # [chunks, 1] each
    steps = torch.arange(int(counts.max()))  # [most keys]
    return part.keys[first + torch.minimum(steps, counts - 1)]


def _to_device(vectors: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Copy vectors of one dtype to the device, all at once."""
    return to_device(torch.cat(vectors), device).split([len(vector) for vector in vectors])


def _buckets(lengths: list[int], bucket_of: list[Hashable]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the shape of each bucket, and bucket_rows and from_buckets of a PackedRow flattened into one tensor."""
    starts = list(accumulate(lengths, initial=0))
    buckets: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(bucket_of):
        buckets.setdefault(bucket, []).append(index)
    rows, from_buckets, offset = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for members in buckets.values():
        start = torch.tensor([starts[i] for i in members])[:, None]  # [sequences, 1]
        length = torch.tensor([lengths[i] for i in members])[:, None]
        steps = torch.arange(max(lengths[i] for i in members))[None]  # [1, longest]
        rows.append(start + torch.minimum(steps, length - 1))  # [sequences, longest]
        places = torch.arange(rows[-1].numel()).view_as(rows[-1]) + offset
        is_token = steps < length
        from_buckets[rows[-1][is_token]] = places[is_token]
        offset += rows[-1].numel()
    return [tuple(row.shape) for row in rows], torch.cat([*(row.flatten() for row in rows), from_buckets])


class LocalAttention(MegatronModule):
    """Core attention of torch: scaled_dot_product_attention for sequences of equal length or the buckets of a packed
    row, and FlashAttention for a packed row as it is."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.context = None if pg_collection is None else pg_collection.cp
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.num_heads_per_group = config.num_attention_heads // config.num_query_groups

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, groups, d] -> [s, b, n * d]; packed: s = t, b = 1."""
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if packed_seq_params is None:
            inputs = (x.transpose(0, 1) for x in (query, key, value))  # [b, s, n, d]
            return self._attend(*inputs, causal).transpose(0, 1).flatten(2)
        query, key, value = (x.squeeze(1) for x in (query, key, value))  # [t, n, d]
        if packed_seq_params.key_rows:
            # One all-gather in forward, reduce-scatter in backward: [t, groups, d] of the rank -> of the whole row.
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.context)
            key, value = both.chunk(2, dim=-1)
        if packed_seq_params.bucket_rows:
            output = self._attend_buckets(query, key, value, packed_seq_params, causal)  # [t, n, d]
        else:
            output = self._attend_variable_length(query, key, value, packed_seq_params, causal)  # [t, n, d]
        return output.flatten(1).unsqueeze(1)  # [t, 1, n * d]

    def _attend_variable_length(
        self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, causal: bool
    ) -> Tensor:
        """[t, n, d], keys and values with their own numbers of heads and tokens -> [t, n, d].

        Where there are more keys than queries, the last query sees all of them.
        """
        attention, settings = variable_length_attention()
        if not causal:
            settings = {key: value for key, value in settings.items() if key not in CAUSAL}
        scale = {} if self.softmax_scale is None else {"scale": self.softmax_scale}
        key, value = (x.index_select(0, row.key_rows[0]) if row.key_rows else x for x in (key, value))
        return attention(query, key, value, row.query_ends, row.key_ends, *row.longest, **scale, **settings)

    def _attend_buckets(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRow, causal: bool) -> Tensor:
        """[t, n, d], keys and values with their own numbers of heads and tokens -> [t, n, d].

        A short sequence is padded at its end, and a causal mask keeps later keys from every real token.
        """
        outputs, masks = [], row.masks or [None] * len(row.bucket_rows)
        for rows, key_rows, mask in zip(row.bucket_rows, row.key_rows or row.bucket_rows, masks):
            of_each = zip((query, key, value), (rows, key_rows, key_rows))
            bucket = (x.index_select(0, places.flatten()).unflatten(0, places.shape) for x, places in of_each)
            outputs.append(self._attend(*bucket, causal=causal and mask is None, mask=mask).flatten(0, 1))
        return torch.cat(outputs).index_select(0, row.from_buckets)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        """[b, s, n, d], keys and values with their own numbers of heads and tokens -> [b, s, n, d].

        A mask [b, 1, s, keys] bool says which keys a query sees.
        """
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [b, n, s, d]
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads_per_group > 1,
        )
        return output.transpose(1, 2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Return nothing, since there are no parameters."""
        return {}


def layer_spec(kernels: str, norm: type, mask: AttnMaskType, qk_norm: bool = False) -> ModuleSpec:
    """Return megatron-core's spec of a pre-norm layer; local layers get the norms and the attention of this file.

    `norm` is RMSNorm or LayerNorm; Transformer Engine fuses its own norm of that kind into the next layer. Checkpoints
    of both kernels have the same keys, those of Transformer Engine, since extra states of layers are not saved.
    With `qk_norm` each head's queries and keys are normalised as well.
    """
    if kernels == "transformer_engine":
        core_attention = packed_te_attention()  # first, since megatron-core's own error would not name the key
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        spec.submodules.self_attention.submodules.core_attention = core_attention
    else:
        spec = get_gpt_layer_local_spec()
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = LocalAttention
        attention.q_layernorm = attention.k_layernorm = norm if qk_norm else IdentityOp
    spec.submodules.self_attention.params["attn_mask_type"] = mask
    return spec


@cache
def packed_te_attention() -> type:
    """Return Transformer Engine's attention, which also takes a row whose tokens' positions are given."""

    class PackedAttention(transformer_engine().TEDotProductAttention):
        """[t, 1, n, d] -> [t, 1, n * d] for such a row."""

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """See TEDotProductAttention."""
            row = kwargs.get("packed_seq_params")
            if row is None or row.qkv_format == "thd":
                return super().forward(query, key, value, *args, **kwargs)
            parts = (x.squeeze(1) for x in (query, key, value))
            output = super().forward(*parts, *args, **{**kwargs, "packed_seq_params": row.thd})
            return output.reshape(len(query), 1, -1)

    return PackedAttention


def transformer_engine() -> Any:
    """Return megatron-core's wrappers of Transformer Engine.

    Raises:
        ConfigError: Transformer Engine is not installed.
    """
    needs = "model.kernels=transformer_engine needs Transformer Engine, the package"
    install = "pip install --no-build-isolation -e '.[gpu]' beside the CUDA build of torch, or set model.kernels=local"
    import_optional("transformer_engine", needs, install)  # megatron-core's wrappers exist without it, as broken stubs
    return import_optional("megatron.core.extensions.transformer_engine", needs, install, "transformer_engine")


def mlp_submodules(kernels: str) -> MLPSubmodules:
    """Return the linear layers of an MLP without a norm before it, such as the projector."""
    if kernels == "transformer_engine":
        te = transformer_engine()
        return MLPSubmodules(linear_fc1=te.TEColumnParallelLinear, linear_fc2=te.TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def final_norm(kernels: str, norm: type) -> type:
    """Return the norm after the last layer."""
    return transformer_engine().TENorm if kernels == "transformer_engine" else norm

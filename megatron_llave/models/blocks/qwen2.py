"""Qwen2 or Qwen3 decoder up to its final norm, without the vocabulary projection; one chunk of the pipeline.

It is a MegatronModule and not a GPTModel, which would allocate the vocabulary projection and fail to save without it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_llave.config.model import LanguageConfig, ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.initialization import mark_gated
from megatron_llave.models.blocks.kernels import fuses_activations
from megatron_llave.models.blocks.layer_specs import PackedRow, RMSNorm, final_norm, layer_spec
from megatron_llave.models.blocks.settings import DTYPES, common_config


@dataclass(frozen=True)
class DecoderKind:
    """What tells the decoders of the model families apart, beside their sizes."""

    qkv_bias: bool = True
    """Whether the projections to queries, keys and values have a bias (Qwen2), or not (Qwen3)."""
    qk_norm: bool = False
    """Whether queries and keys of each head are normalised (Qwen3)."""
    interleaved_mrope: bool = False
    """Whether temporal, vertical and horizontal channels alternate (Qwen3-VL) or lie in blocks (Qwen2-VL)."""


VOCAB_MULTIPLE = 128
"""Rows of the token embedding are padded to a multiple of this times the tensor-parallel size, as Megatron-LM does."""


def padded_vocab_size(language: LanguageConfig, tensor: int) -> int:
    """Return the rows of the token embedding over all tensor-parallel ranks, padding included."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-language.vocab_size // multiple) * multiple


def language_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, kind: DecoderKind = DecoderKind()
) -> TransformerConfig:
    """Return the configuration of the layers (HF Qwen2Model: only q/k/v biases, gated SiLU) and of the pipeline."""
    language, interleaved = model.language, parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        kv_channels=language.head_channels,
        ffn_hidden_size=language.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=kind.qkv_bias,
        qk_layernorm=kind.qk_norm,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        pipeline_dtype=DTYPES[model.precision],
        # megatron-core silently computes wrong gradients if two interleaved stages use batched sends.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # megatron-core guards against a race in batched sends that torch 1.13 has removed (pytorch pull request 82450).
        batch_p2p_sync=False,
        # gloo keeps a tensor until it is sent, but not its storage: if that is freed early, rubbish is sent.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        # Dropout is not fused: compiled with a gradient and without one, it might not drop the same channels.
        **{**common_config(model), "hidden_dropout": model.dropout, "bias_activation_fusion": fuses_activations()},
        **_recompute_settings(model),
        **_fp8_settings(model),
    )


def _recompute_settings(model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    return {}


def _fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """Return settings of the decoder alone: vision encoder and projector stay in bfloat16, and so do all weights."""
    if model.precision != "fp8":
        return {}
    return {"fp8": "hybrid", "fp8_recipe": model.fp8_recipe}  # e4m3 forward, e5m2 gradients


class RotaryEmbedding(torch.nn.Module):
    """Rotary angles of every packed token, in the form that megatron-core takes.

    Sources: HF Qwen2RotaryEmbedding, Qwen2VLRotaryEmbedding, Qwen3VLTextRotaryEmbedding, VisionRotaryEmbedding.
    """

    def __init__(self, head_dim: int, theta: float, axes: list[int] | None = None, repeats: int = 1) -> None:
        """Args:
        head_dim: d, the channels of a head.
        theta: the base.
        axes: for each of the d / 2 pairs of channels the row of the positions that turns it; None: there is one row.
        repeats: how often the frequencies are repeated over the pairs.
        """
        super().__init__()
        self.block, self.theta, self.repeats = head_dim // repeats, theta, repeats
        self.register_buffer("axes", None if axes is None else torch.tensor(axes), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [s], which are the same on all axes, or [axes, s], int64 -> angles [s, 1, 1, d] float32."""
        channels = torch.arange(0, self.block, 2, dtype=torch.float32, device=positions.device)
        frequencies = (self.theta ** -(channels / self.block)).repeat(self.repeats)  # [d / 2]
        of_pairs = positions[:, None] if positions.dim() == 1 else positions.index_select(0, self.axes).T
        angles = of_pairs.float() * frequencies  # [s, d / 2]
        return torch.cat([angles, angles], dim=-1)[:, None, None]


def mrope_axes(section: list[int], interleaved: bool) -> list[int] | None:
    """Return the axis of each pair of channels: 0 temporal, 1 vertical, 2 horizontal; None without sections.

    In blocks the sections follow each other. Interleaved, pairs 1, 4, 7, ... are vertical and 2, 5, 8, ... horizontal,
    as many as their sections say, and all others are temporal.
    """
    if not section:
        return None
    if not interleaved:
        return [axis for axis, pairs in enumerate(section) for _ in range(pairs)]
    return [pair % 3 if pair < 3 * section[pair % 3] else 0 for pair in range(sum(section))]


class DeepstackLayer(TransformerLayer):
    """A layer after which visual features are added to the hidden states (deepstack of Qwen3-VL).

    They come as megatron-core's `context`, [d * t, 1, h]: the rows for this layer and for the d - 1 layers after it.
    The layer hands on the others, so that the first d layers add and the rest does not.
    """

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """See TransformerLayer."""
        hidden, _ = super().forward(*args, **kwargs)
        if context is None:
            return hidden, None
        others = context[len(hidden) :]
        return hidden + context[: len(hidden)], others if len(others) else None


class LanguageModel(MegatronModule):
    """Token embedding (first chunk), decoder layers, final norm (last chunk)."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        groups: ProcessGroupCollection,
        is_first: bool,
        is_last: bool,
        chunk: int | None,
        kind: DecoderKind = DecoderKind(),
    ) -> None:
        config = language_transformer_config(model, parallel, kind)
        super().__init__(config=config)
        self.is_first, self.is_last = is_first, is_last
        self.num_parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
        if is_first:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocab_size(model.language, parallel.tensor),
                max_sequence_length=0,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,
                tp_group=groups.tp,
            )
        axes = mrope_axes(model.language.mrope_section, kind.interleaved_mrope)
        self.rotary = RotaryEmbedding(config.kv_channels, model.language.rope_theta, axes)
        num_layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=groups.pp.rank())
        layer = layer_spec(model.kernels, RMSNorm, AttnMaskType.causal, kind.qk_norm)
        num_deepstack = len(model.vision.deepstack_layers)
        if num_deepstack:
            layer.module = DeepstackLayer
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(
                layer_specs=[layer] * num_layers, layer_norm=final_norm(model.kernels, RMSNorm)
            ),
            pre_process=is_first,
            post_process=is_last,
            pg_collection=groups,
            vp_stage=chunk,
        )
        mark_gated(self.decoder)
        layers_before = self.decoder.layers[0].layer_number - 1 if num_layers else 0
        of_first_chunk = get_num_layers_to_build(config, vp_stage=None if chunk is None else 0, pp_rank=0)
        self.deepstack_received = max(0, num_deepstack - layers_before)
        """Number of layers from this chunk on that add visual features."""
        self.sent_rows = 1 + max(0, num_deepstack - of_first_chunk)
        """Rows per token that chunks send on: the hidden states, and features for later chunks."""

    def forward(self, hidden: Tensor | None, packed: PackedRow, deepstack: Tensor | None = None) -> Tensor:
        """hidden [t, 1, h] on the first chunk, None on others (the schedule sets it, padded) -> [t, 1, h].

        t are the tokens of the row, or of this context rank's part of it. With sequence parallel the output holds this
        tensor-parallel rank's t / tp tokens. `deepstack` [d * t, 1, h] is what the first d layers add, on the first
        chunk; features for layers of later chunks are sent on after the hidden states.
        """
        # Transformer Engine counts the positions of each sequence itself, from cu_seqlens.
        positions = packed.positions
        if positions is None:
            positions = torch.arange(packed.max_seqlen, device=packed.cu_seqlens.device)
        tokens = sum(packed.lengths) // self.num_parts
        if not self.is_first:
            received = self.decoder.input_tensor[: tokens * self.sent_rows]
            self.decoder.set_input_tensor(received[:tokens])
            deepstack = received[tokens : tokens * (1 + self.deepstack_received)] if self.deepstack_received else None
        elif self.config.recompute_granularity and torch.is_grad_enabled() and self._is_trained():
            # A recomputed layer has gradients only if its input has one, which a frozen embedding does not give it.
            hidden.requires_grad_()
        output = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=deepstack,
            rotary_pos_emb=self.rotary(positions),
            packed_seq_params=packed,
        )
        num_layers = len(self.decoder.layers)
        if self.is_last or deepstack is None or self.deepstack_received <= num_layers:
            return output
        return torch.cat([output, deepstack[tokens * num_layers :]])

    def _is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.decoder.parameters())

"""Qwen2 decoder up to its final norm, without the vocabulary projection; one chunk of the pipeline.

It is a MegatronModule and not a GPTModel, which would allocate the vocabulary projection and fail to save without it.
"""

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
from torch import Tensor

from megatron_llave.config.model import LanguageConfig, ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.kernels import fuses_activations
from megatron_llave.models.blocks.layer_specs import PackedRow, RMSNorm, final_norm, layer_spec
from megatron_llave.models.blocks.settings import DTYPES, common_config

VOCAB_MULTIPLE = 128
"""Rows of the token embedding are padded to a multiple of this times the tensor-parallel size, as Megatron-LM does."""


def padded_vocab_size(language: LanguageConfig, tensor: int) -> int:
    """Return the rows of the token embedding over all tensor-parallel ranks, padding included."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-language.vocab_size // multiple) * multiple


def language_transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Return the configuration of Qwen2's layers (HF Qwen2Model: only q/k/v biases, gated SiLU) and of the pipeline."""
    language, interleaved = model.language, parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        ffn_hidden_size=language.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=True,
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
    """Rotary angles of every packed token (HF Qwen2RotaryEmbedding), in the form that megatron-core takes."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Tensor) -> Tensor:
        """positions [s] int64 -> angles [s, 1, 1, d] float32."""
        channels = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        frequencies = self.theta ** -(channels / self.head_dim)  # [d / 2]
        angles = positions.float()[:, None] * frequencies  # [s, d / 2]
        return torch.cat([angles, angles], dim=-1)[:, None, None]


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
    ) -> None:
        config = language_transformer_config(model, parallel)
        super().__init__(config=config)
        self.is_first = is_first
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
        self.rotary = RotaryEmbedding(config.kv_channels, model.language.rope_theta)
        num_layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=groups.pp.rank())
        layers = [layer_spec(model.kernels, RMSNorm, AttnMaskType.causal)] * num_layers
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm(model.kernels, RMSNorm)),
            pre_process=is_first,
            post_process=is_last,
            pg_collection=groups,
            vp_stage=chunk,
        )

    def forward(self, hidden: Tensor | None, packed: PackedRow) -> Tensor:
        """hidden [t, 1, h] on the first chunk, None on others (the schedule sets it, padded) -> [t, 1, h].

        t are the tokens of the row, or of this context rank's part of it. With sequence parallel the output holds this
        tensor-parallel rank's t / tp tokens.
        """
        # Transformer Engine counts the positions of each sequence itself, from cu_seqlens.
        positions = packed.positions
        if positions is None:
            positions = torch.arange(packed.max_seqlen, device=packed.cu_seqlens.device)
        if not self.is_first:
            self.decoder.set_input_tensor(self.decoder.input_tensor[: sum(packed.lengths) // self.num_parts])
        return self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self.rotary(positions),
            packed_seq_params=packed,
        )

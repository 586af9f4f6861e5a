"""The TransformerConfig settings that vision encoder, projector and decoder have in common."""

from typing import Any

import torch
from torch import Tensor

from megatron_llave.config.model import ModelConfig
from megatron_llave.models.blocks.kernels import fuses_weight_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Dtype of parameters and activations, by model.precision."""


def _leave_unfilled(weight: Tensor) -> Tensor:
    return weight


def common_config(model: ModelConfig) -> dict[str, Any]:
    """Return keyword arguments of TransformerConfig: precision, kernels that exist on this machine, no dropout.

    Each part of the model says itself what `fuses_activations` may fuse in it.
    """
    fused = model.kernels == "transformer_engine"
    return dict(
        params_dtype=DTYPES[model.precision],
        bf16=DTYPES[model.precision] == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are filled by initialization.py or from a checkpoint, so modules are built on the CPU and then moved.
        # megatron-core marks parameters as split over tensor-parallel ranks only while it initialises them.
        use_cpu_initialization=True,
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        embedding_init_method=_leave_unfilled,
        gradient_accumulation_fusion=fuses_weight_gradients(model.kernels),
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused,
        persist_layer_norm=fused,
    )

"""The projector: a two-layer MLP from the vision encoder's width to the decoder's.

It is mlp2x_gelu of the official repository: Linear, GELU, Linear, with biases.
"""

import torch.nn.functional as F
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.layer_specs import mlp_submodules
from megatron_llave.models.blocks.settings import common_config


def build_projector(
    model: ModelConfig, parallel: ParallelConfig, groups: ProcessGroupCollection
) -> MultimodalProjector:
    """Features [n, vision hidden] -> [n, language hidden]; the inner layer is split over the tensor-parallel ranks."""
    hidden = model.language.hidden_size
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=1 if parallel.tensor == 1 else parallel.tensor,
        kv_channels=1,
        ffn_hidden_size=hidden,
        activation_func=F.gelu,
        add_bias_linear=True,
        tensor_model_parallel_size=parallel.tensor,
        **common_config(model),
    )
    return MultimodalProjector(
        config, mlp_submodules(model.kernels), "mlp", model.vision.hidden_size, tp_group=groups.tp
    )

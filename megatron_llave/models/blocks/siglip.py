"""SigLIP vision encoder: from uint8 tiles to the patch features of the last layer, without the post-layernorm.

The official LLaVE repository leaves the post-layernorm out as well.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.kernels import fuses_activations
from megatron_llave.models.blocks.layer_specs import LayerNorm, layer_spec
from megatron_llave.models.blocks.settings import common_config


def vision_transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Return the configuration of SigLIP's layers: layer norm, biases everywhere, tanh GELU (HF SiglipVisionModel)."""
    vision, fuses = model.vision, fuses_activations()
    # The fused kernel that megatron-core takes for F.gelu is the tanh approximation, too.
    gelu = F.gelu if fuses else partial(F.gelu, approximate="tanh")
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        activation_func=gelu,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=parallel.tensor,
        **{**common_config(model), "bias_activation_fusion": fuses, "bias_dropout_fusion": fuses},
    )


class VisionEncoder(MegatronModule):
    """megatron-core's CLIPViTModel in its SigLIP form, applied to the tiles that the data pipeline cuts."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, groups: ProcessGroupCollection) -> None:
        config = vision_transformer_config(model, parallel)
        super().__init__(config=config)
        layer = layer_spec(model.kernels, LayerNorm, AttnMaskType.no_mask)
        self.seen_pixels = model.vision.patches_per_side * model.vision.patch_size
        self.encoder = CLIPViTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers),
            ln_post_impl=IdentityOp,
            add_class_token=False,
            class_token_len=0,
            patch_dim=model.vision.patch_size,
            img_h=self.seen_pixels,
            img_w=self.seen_pixels,
            model_subtype="siglip",
            pg_collection=groups,
        )

    def forward(self, tiles: Tensor, blank: Tensor | None = None) -> Tensor:
        """tiles [k, 3, size, size] uint8 -> features [k, p, h]; pixels of tiles marked in blank [k] bool are zeros."""
        pixels = normalise(tiles[:, :, : self.seen_pixels, : self.seen_pixels])
        if blank is not None:
            pixels = pixels.masked_fill(blank[:, None, None, None], 0)
        return self.encoder(pixels.to(self.config.params_dtype))


def normalise(tiles: Tensor) -> Tensor:
    """Map uint8 pixels to [-1, 1] float32, bitwise equal to SigLipImageProcessor of LLaVE (1/255 is a float64)."""
    return ((tiles.double() * (1 / 255)).to(torch.float32) - 0.5) / 0.5

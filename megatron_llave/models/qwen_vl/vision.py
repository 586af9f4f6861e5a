"""The vision encoder of the Qwen-VL families: uint8 patches of images of any shape -> features of every patch.

Shapes: k blocks of four patches, s = 4k patches, H width, P side of a patch in pixels.

Sources: transformers' modeling_qwen2_vl.py, modeling_qwen2_5_vl.py and modeling_qwen3_vl.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_llave.batch import to_device
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.models.blocks.initialization import mark_gated
from megatron_llave.models.blocks.kernels import attention_kernel, fuses_activations
from megatron_llave.models.blocks.layer_specs import LayerNorm, PackedRow, RMSNorm, layer_spec, packed_row
from megatron_llave.models.blocks.qwen2 import RotaryEmbedding
from megatron_llave.models.blocks.settings import common_config
from megatron_llave.models.qwen_vl.patches import frame_lengths, patch_positions, position_corners, window_order
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED, normalise

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP, which Qwen2-VL and Qwen2.5-VL normalise images with."""
ROPE_THETA = 10000.0
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class TowerKind:
    """What tells the vision encoders of the families apart, beside their sizes."""

    activation: Callable[[Tensor], Tensor]
    """Of the MLP."""
    fused_activation: Callable[[Tensor], Tensor] | None
    """What megatron-core's fused kernel calls the same activation; None: there is no such kernel."""
    norm: type = LayerNorm
    """LayerNorm or RMSNorm."""
    gated: bool = False
    """Whether the MLP is gated."""
    patch_bias: bool = False
    """Whether the embedding of patches has a bias."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of red, green and blue, from 0 to 1, that pixels are normalised with."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Their standard deviation."""


def tower_transformer_config(model: ModelConfig, parallel: ParallelConfig, kind: TowerKind) -> TransformerConfig:
    """Return the configuration of the layers, which have biases everywhere."""
    vision, compiles = model.vision, fuses_activations()
    fuses = compiles and kind.fused_activation is not None
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        gated_linear_unit=kind.gated,
        activation_func=kind.fused_activation if fuses else kind.activation,
        normalization="RMSNorm" if kind.norm is RMSNorm else "LayerNorm",
        layernorm_epsilon=NORM_EPSILON,
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=parallel.tensor,
        **{**common_config(model), "bias_activation_fusion": fuses, "bias_dropout_fusion": compiles},
    )


class VisionTower(MegatronModule):
    """Embedded patches, transformer layers, and no norm after them."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, groups: ProcessGroupCollection, kind: TowerKind
    ) -> None:
        config = tower_transformer_config(model, parallel, kind)
        super().__init__(config=config)
        self.kind, self.sizes = kind, model.vision
        head = config.kv_channels
        self.attention = attention_kernel(model, head)
        inputs = 3 * FRAMES * model.vision.patch_size**2
        self.patch_embed = torch.nn.Linear(inputs, config.hidden_size, kind.patch_bias, dtype=config.params_dtype)
        if model.vision.num_positions:
            self.position_embedding = torch.nn.Embedding(
                model.vision.num_positions, config.hidden_size, dtype=config.params_dtype
            )
        axes = [axis for axis in (0, 1) for _ in range(head // 4)]
        self.rotary = RotaryEmbedding(head, ROPE_THETA, axes, repeats=2)
        layer = layer_spec(model.kernels, kind.norm, AttnMaskType.no_mask)
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers),
            pre_process=True,
            post_process=False,
            pg_collection=groups,
        )
        mark_gated(self.decoder)

    def forward(self, tiles: Tensor, grids: list[list[int]]) -> Tensor:
        """Encode images.

        Args:
            tiles: [k, 4, 3, 1 or 2, P, P] uint8, the blocks of all images, one frame if none of them is a video;
                [k, 4, 3, 2, P, P] float32 if they are normalised already.
            grids: frames, rows and columns of patches of each image.

        Returns:
            [1 + d, s, H]: the output of the last layer, and of the d layers in model.vision.deepstack_layers.
        """
        device, of_windows, positions = tiles.device, None, torch.from_numpy(patch_positions(grids))  # [2, s]
        full_layers = self.sizes.full_attention_layers if self.sizes.window_size else range(self.config.num_layers)
        if self.sizes.window_size:
            # The patches of a window follow each other in every layer, which leaves them within their frame.
            order, lengths = window_order(grids, self.sizes.window_size // self.sizes.patch_size // MERGED)
            order = torch.from_numpy(order)
            positions = positions.unflatten(1, (-1, MERGED**2))[:, order].flatten(1)
            order, back = to_device(order, device), to_device(torch.argsort(order), device)
            tiles, of_windows = tiles.index_select(0, order), self._row(lengths, device)
        angles = self.rotary(to_device(positions, device))
        of_frames = self._row(frame_lengths(grids), device)
        hidden = self._embed(tiles, grids)[:, None]  # [s, 1, H]
        kept = []
        for index, layer in enumerate(self.decoder.layers):
            row = of_frames if index in full_layers else of_windows
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=row)
            if index in self.sizes.deepstack_layers:
                kept.append(hidden)
        features = torch.stack([of_layer[:, 0] for of_layer in (hidden, *kept)])  # [1 + d, s, H]
        if self.sizes.window_size:
            features = features.unflatten(1, (-1, MERGED**2)).index_select(1, back).flatten(1, 2)
        return features

    def _embed(self, tiles: Tensor, grids: list[list[int]]) -> Tensor:
        """[k, 4, 3, 1 or 2, P, P] uint8 -> [s, H]: one matrix product, and the learned positions of Qwen3-VL."""
        mean, std = (to_device(torch.tensor(values), tiles.device) for values in (self.kind.mean, self.kind.std))
        pixels = normalise(tiles, mean, std) if tiles.dtype == torch.uint8 else tiles
        embedded = self.patch_embed(pixels.to(self.config.params_dtype).flatten(0, 1).flatten(1))  # [s, H]
        if not self.sizes.num_positions:
            return embedded
        corners, weights = position_corners(grids, isqrt(self.sizes.num_positions))
        corners, weights = (to_device(torch.from_numpy(x), tiles.device) for x in (corners, weights))
        blended = sum(self.position_embedding(rows) * share[:, None] for rows, share in zip(corners, weights))
        return embedded + blended.to(embedded.dtype)

    def _row(self, lengths: list[int], device: torch.device) -> PackedRow:
        bounds = to_device(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), device)
        return packed_row(bounds, lengths, self.attention, positions=bounds, causal=False)

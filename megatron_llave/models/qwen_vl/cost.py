"""Costs of the Qwen-VL vision encoders and mergers, by formula; tests compare them with the models and real steps.

Shapes: H width of the vision encoder, F inner width of its MLP, h width of the decoder, k tiles (visual tokens),
s = 4k patches, d layers whose features deepstack adds.
"""

from collections.abc import Sequence
from math import isqrt

from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.models.blocks.layer_specs import RMSNorm
from megatron_llave.models.qwen_vl.embedder import QwenVlEmbedder
from megatron_llave.models.qwen_vl.patches import frame_lengths
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED, pixel_budget
from megatron_llave.models.vision_cost import (
    FLOAT,
    Products,
    VisionCost,
    element,
    has_buckets,
    rms_norm_activations,
)

BLOCK = MERGED**2
"""Patches of a tile."""
LAYER_NORM_STATISTICS = 2 * FLOAT
"""Bytes of mean and deviation of a row."""


class QwenVlCost(VisionCost):
    """See VisionCost: a tile is one visual token, and patches attend within their frame or window."""

    splits_tiles = False

    def __init__(self, embedder: type[QwenVlEmbedder], has_time_stamps: bool) -> None:
        """Take the family's kinds of vision encoder and decoder, and of videos (QwenVlInputs)."""
        self.tower, self.decoder, self.has_time_stamps = embedder.tower_kind, embedder.decoder_kind, has_time_stamps

    def parameters(self, model: ModelConfig, tensor: int) -> dict[str, list[int]]:
        """See VisionCost."""
        vision, h, tp = model.vision, model.language.hidden_size, tensor
        H, gated = vision.hidden_size, 2 if self.tower.gated else 1
        F, wide, in_norm = vision.ffn_hidden_size, BLOCK * H, 1 if self.tower.norm is RMSNorm else 2
        stem = [
            _pixels_of_patch(model) * H,
            *[H] * self.tower.patch_bias,
            *[vision.num_positions * H][: vision.num_positions],
        ]
        attention = [3 * H * H // tp, 3 * H // tp, H * H // tp, H]
        mlp = [gated * F * H // tp, gated * F // tp, F * H // tp, H]
        mergers = [[width] * in_norm for width in (H, *[wide] * len(vision.deepstack_layers))]
        merger_mlp = [wide * wide // tp, wide // tp, h * wide // tp, h]
        return {
            "vision": stem + (attention + mlp + [H] * 2 * in_norm) * vision.num_layers,
            "projector": [size for norm in mergers for size in norm + merger_mlp],
        }

    def products(self, model: ModelConfig, tiles: int, patch_pairs: int) -> list[Products]:
        """See VisionCost."""
        vision, h, s = model.vision, model.language.hidden_size, BLOCK * tiles
        H, F, mergers = vision.hidden_size, vision.ffn_hidden_size, 1 + len(vision.deepstack_layers)
        layer = 2 * s * H * (4 * H + (3 if self.tower.gated else 2) * F)
        before = ("vision", "projector")  # a merger begins with a norm of its own
        return [
            Products("vision", 2 * s * _pixels_of_patch(model) * H),  # the embedding of patches
            Products("vision", vision.num_layers * layer + 4 * H * patch_pairs, after=("vision",)),
            Products("projector", mergers * 2 * tiles * (BLOCK * H) ** 2, after=before),
            Products("projector", mergers * 2 * tiles * BLOCK * H * h, after=before),
        ]

    def patch_pairs(self, model: ModelConfig, grids: Sequence[Sequence[int]]) -> int:
        """See VisionCost."""
        vision = model.vision
        full = sum(length**2 for length in frame_lengths(grids))
        if not vision.window_size:
            return vision.num_layers * full
        side = vision.window_size // vision.patch_size
        windows = sum(f * _squares(rows, side) * _squares(columns, side) for f, rows, columns in grids)
        number = len(vision.full_attention_layers)
        return number * full + (vision.num_layers - number) * windows

    def image_pairs(self, width: int, height: int, data: DataConfig, model: ModelConfig) -> int:
        """See VisionCost."""
        return self.patch_pairs(model, [pixel_budget(data, model.vision.patch_size).image_grid(width, height)])

    def video_pairs(self, num_frames: int, width: int, height: int, data: DataConfig, model: ModelConfig) -> int:
        """See VisionCost."""
        budget = pixel_budget(data, model.vision.patch_size, self.has_time_stamps)
        return self.patch_pairs(model, [budget.video_grid(num_frames, width, height)])

    def of_tiles(self, model: ModelConfig, tiles: int) -> tuple[int, int]:
        """See VisionCost."""
        side = max(1, isqrt(tiles))
        return tiles, self.patch_pairs(model, [(1, MERGED * side, MERGED * (tiles // side))])

    def encoder_activations(self, model: ModelConfig, tensor: int, tiles: int, on_gpu: bool) -> int:
        """See VisionCost."""
        vision, e, tp = model.vision, element(model), tensor
        H, F, head = vision.hidden_size, vision.ffn_hidden_size, vision.hidden_size // vision.num_heads
        fused = model.kernels == "transformer_engine"
        # Queries, keys, values, and the output of the attention; copied into buckets and back, or before and after the
        # rotary embedding.
        attention = (5 if has_buckets(model, on_gpu, head) else 6) * H * e + FLOAT * vision.num_heads
        rotary = 0 if fused else 4 * head * e
        layer = (attention + self._inner(on_gpu) * F * e) // tp + rotary + 2 * (H * e + self._norm(model, H, on_gpu))
        outputs = (1 + len(vision.deepstack_layers)) * H * e
        places = 16 * (2 if vision.window_size else 1) * has_buckets(model, on_gpu, head)  # of patches in the buckets
        places += 48 * bool(vision.num_positions)  # rows of the table of positions, and their weights
        return BLOCK * tiles * (vision.num_layers * layer + outputs + places + _pixels_of_patch(model) * e)

    def projector_activations(self, model: ModelConfig, tensor: int, tiles: int, visual: int, on_gpu: bool) -> int:
        """See VisionCost."""
        H, h, e = model.vision.hidden_size, model.language.hidden_size, element(model)
        of_patch = self._norm(model, H, on_gpu) + 2 * H * e // tensor
        return (1 + len(model.vision.deepstack_layers)) * (BLOCK * tiles * of_patch + visual * h * e)

    def feature_bytes(self, model: ModelConfig, tiles: int) -> int:
        """See VisionCost."""
        return (1 + len(model.vision.deepstack_layers)) * BLOCK * tiles * model.vision.hidden_size * element(model)

    def pixel_bytes(self, model: ModelConfig, tiles: int, videos: int) -> int:
        """See VisionCost."""
        return BLOCK * tiles * _pixels_of_patch(model) // (1 if videos else FRAMES)

    def temporary_bytes(
        self, model: ModelConfig, tensor: int, tiles: int, videos: int, context: int, on_gpu: bool
    ) -> int:
        """See VisionCost."""
        vision, s, e = model.vision, BLOCK * tiles, element(model)
        H, head, pixels = vision.hidden_size, vision.hidden_size // vision.num_heads, _pixels_of_patch(model)
        # Queries, keys and values, before and after the rotary embedding and perhaps in buckets, and the output.
        inner = max((9 if has_buckets(model, on_gpu, head) else 6) * H, self._inner(on_gpu) * vision.ffn_hidden_size)
        # In a layer, if the vision encoder is frozen: its input and a norm's output, what deepstack takes, the angles.
        in_layer = s * (((2 + len(vision.deepstack_layers)) * H + inner // tensor) * e + FLOAT * head)
        packed = self.pixel_bytes(model, tiles, videos)
        in_order = packed if vision.window_size else 0  # of the windows
        # Pixels while they are normalised, or afterwards, beside both frames of all patches.
        return in_order + max(in_layer, 2 * FLOAT * packed, FLOAT * packed + s * pixels * e)

    def _norm(self, model: ModelConfig, width: int, on_gpu: bool) -> int:
        """Bytes per row that a norm keeps, without its input."""
        if self.tower.norm is RMSNorm:
            return rms_norm_activations(model, width, on_gpu) - width * element(model)
        return width * element(model) + LAYER_NORM_STATISTICS

    def _inner(self, on_gpu: bool) -> int:
        """How many tensors of the MLP's inner width are kept; more where its activation is not one kernel."""
        if self.tower.gated:
            return 3 if on_gpu else 5
        return 3 if self.tower.fused_activation is None else 2


def _pixels_of_patch(model: ModelConfig) -> int:
    return 3 * FRAMES * model.vision.patch_size**2


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the lengths that parts of `side`, and what is left, have."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2

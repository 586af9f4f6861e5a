"""Costs of SigLIP and the two-layer projector, by formula; tests compare them with the model and with real steps.

Shapes: H width, F inner width of the MLP, p patches per tile; h width of the decoder.
"""

from megatron_llave.config.model import ModelConfig
from megatron_llave.models.vision_cost import FLOAT, Products, VisionCost, element


class LlaveCost(VisionCost):
    """See VisionCost: tiles are square and of one size."""

    def parameters(self, model: ModelConfig, tensor: int) -> dict[str, list[int]]:
        """See VisionCost."""
        vision, h = model.vision, model.language.hidden_size
        H, F, tp = vision.hidden_size, vision.ffn_hidden_size, tensor
        block = [3 * H * H // tp, 3 * H // tp, H * H // tp, H, F * H // tp, F // tp, F * H // tp, H, *[H] * 4]
        stem = [3 * vision.patch_size**2 * H, H, _patches(model) * H]  # convolution, its bias, positions
        return {
            "vision": stem + block * vision.num_layers,
            "projector": [H * h // tp, h // tp, h * h // tp, h, h],  # the last is image_newline
        }

    def products(self, model: ModelConfig, tiles: int, patch_pairs: int) -> list[Products]:
        """See VisionCost."""
        vision, p, h = model.vision, _patches(model), model.language.hidden_size
        H, F = vision.hidden_size, vision.ffn_hidden_size
        layer = 2 * p * H * (4 * H + 2 * F) + 4 * p * p * H
        return [
            Products("vision", 2 * p * 3 * vision.patch_size**2 * H * tiles),  # the convolution of patches
            Products("vision", vision.num_layers * layer * tiles, after=("vision",)),
            Products("projector", 2 * p * H * h * tiles, after=("vision",)),
            Products("projector", 2 * p * h * h * tiles, after=("vision", "projector")),
        ]

    def of_tiles(self, model: ModelConfig, tiles: int) -> tuple[int, int]:
        """See VisionCost."""
        return tiles * _patches(model), 0

    def encoder_activations(self, model: ModelConfig, tensor: int, tiles: int, on_gpu: bool) -> int:
        """See VisionCost."""
        vision, e, p = model.vision, element(model), _patches(model)
        H, F = vision.hidden_size, vision.ffn_hidden_size
        split = 4 * H + 2 * F  # queries, keys, values and the attention's output; the MLP before and after its GELU
        layer = p * (e * (4 * H + split // tensor) + FLOAT * (vision.num_heads // tensor + 4))
        pixels = 3 * (vision.patches_per_side * vision.patch_size) ** 2
        return tiles * (vision.num_layers * layer + p * H * e + pixels * e)

    def projector_activations(self, model: ModelConfig, tensor: int, tiles: int, visual: int, on_gpu: bool) -> int:
        """See VisionCost."""
        h, e = model.language.hidden_size, element(model)
        return 2 * tiles * _patches(model) * h * e // tensor + visual * h * e

    def feature_bytes(self, model: ModelConfig, tiles: int) -> int:
        """See VisionCost."""
        return tiles * _patches(model) * model.vision.hidden_size * element(model)

    def pixel_bytes(self, model: ModelConfig, tiles: int, videos: int) -> int:
        """See VisionCost."""
        return 3 * model.vision.image_size**2 * tiles

    def temporary_bytes(
        self, model: ModelConfig, tensor: int, tiles: int, videos: int, context: int, on_gpu: bool
    ) -> int:
        """See VisionCost."""
        vision, patches, e = model.vision, tiles * _patches(model), element(model)
        inner = max(5 * vision.hidden_size, 3 * vision.ffn_hidden_size) // tensor
        return max(
            patches * (2 * vision.hidden_size + inner) * e,  # in the vision encoder, if it is frozen
            self.pixel_bytes(model, tiles, videos) * 20,  # in float64, twice, and in float32
            3 * context * patches * model.language.hidden_size * e * (context > 1),  # features of all ranks
        )


def _patches(model: ModelConfig) -> int:
    return model.vision.patches_per_side**2

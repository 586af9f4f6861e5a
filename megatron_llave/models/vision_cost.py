"""What stands before the decoder of a family costs, by formula: for planning, and for the TFLOP/s and MFU of a run.

Counts are those of config.model.PARTS `vision` and `projector`. planning/ has the formulas of everything else.
Shapes: k tiles, v visual tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.models.blocks.kernels import takes_variable_length
from megatron_llave.models.blocks.qwen2 import DecoderKind
from megatron_llave.models.blocks.settings import DTYPES

FLOAT = 4
"""Bytes of a float32."""


def element(model: ModelConfig) -> int:
    """Return the bytes of a weight or activation."""
    return DTYPES[model.precision].itemsize


def has_buckets(model: ModelConfig, on_gpu: bool, head_size: int | None = None) -> bool:
    """Whether the attention copies sequences into buckets, with the torch that is installed here.

    `head_size` is that of the decoder if it is None.
    """
    return model.kernels == "local" and not (on_gpu and takes_variable_length(model, head_size))


def rms_norm_activations(model: ModelConfig, width: int, on_gpu: bool) -> int:
    """Return bytes per row of a norm: its input, its output, and what torch keeps between if it is not one kernel."""
    e = element(model)
    between_and_input = width * e if on_gpu or model.kernels == "transformer_engine" else 2 * width * FLOAT
    return between_and_input + width * e + FLOAT


@dataclass(frozen=True)
class Products:
    """Matrix products of the forward pass, for which the backward pass needs the same two more, or one, or none."""

    part: str
    """The part whose weights are multiplied, or whose activations with each other."""
    flops: int
    """FLOPs of the forward pass."""
    after: tuple[str, ...] = ()
    """The parts that the input depends on: it gets a gradient if one of them is trained."""

    def with_backward(self, freeze: Collection[str]) -> int:
        """Return FLOPs of forward and backward, given the parts that are not trained."""
        gradients = (self.part not in freeze) + any(part not in freeze for part in self.after)
        return (1 + gradients) * self.flops


class VisionCost:
    """The costs of a family; this one has no images. A family overrides what it has."""

    decoder = DecoderKind()
    """The decoder, whose costs planning/ computes."""
    splits_tiles = True
    """Whether context ranks share the tiles of a row; otherwise each has all of them."""

    def parameters(self, model: ModelConfig, tensor: int) -> dict[str, list[int]]:
        """Return the elements of each parameter on one of `tensor` tensor-parallel ranks, by part."""
        return {"vision": [], "projector": []}

    def products(self, model: ModelConfig, tiles: int, patch_pairs: int) -> list[Products]:
        """Return the matrix products of the forward pass of so many tiles; `patch_pairs` as in the method below."""
        return []

    def patch_pairs(self, model: ModelConfig, grids: Sequence[Sequence[int]]) -> int:
        """Return for how many pairs of patches, over all layers, one attends to the other.

        Args:
            model: the `model` section of the run.
            grids: frames, rows and columns of patches of each image, as in PackedSequences.

        Returns:
            0 for a family whose tiles all are of one size.
        """
        return 0

    def image_pairs(self, width: int, height: int, data: DataConfig, model: ModelConfig) -> int:
        """Return `patch_pairs` of an image, from its size in pixels."""
        return 0

    def video_pairs(self, num_frames: int, width: int, height: int, data: DataConfig, model: ModelConfig) -> int:
        """Return `patch_pairs` of a video, from the number and the size in pixels of its frames."""
        return 0

    def of_tiles(self, model: ModelConfig, tiles: int) -> tuple[int, int]:
        """Return the visual tokens of so many tiles, if none is left out, and `patch_pairs` of them as one image."""
        return 0, 0

    def encoder_activations(self, model: ModelConfig, tensor: int, tiles: int, on_gpu: bool) -> int:
        """Return the bytes that a trained vision encoder keeps of its tiles for the backward."""
        return 0

    def projector_activations(self, model: ModelConfig, tensor: int, tiles: int, visual: int, on_gpu: bool) -> int:
        """Return the bytes that is kept after the vision encoder if it or the projector is trained, without features.

        `visual` is the number of visual tokens. A frozen vision encoder's features are counted apart.
        """
        return 0

    def feature_bytes(self, model: ModelConfig, tiles: int) -> int:
        """Return the bytes of the features of `tiles` tiles."""
        return 0

    def pixel_bytes(self, model: ModelConfig, tiles: int, videos: int) -> int:
        """Return the bytes of the pixels of `tiles` tiles, of which some are of `videos` videos, as they are packed."""
        return 0

    def temporary_bytes(
        self, model: ModelConfig, tensor: int, tiles: int, videos: int, context: int, on_gpu: bool
    ) -> int:
        """Return the bytes of the largest tensors that exist for a moment, of `context` context ranks' tiles each."""
        return 0

"""The `model` section of the configuration: sizes of tower and decoder, precision, kernels, frozen parts.

Beside it the checks that every section makes of its own values; schema.py has the other sections and the whole.
"""

from dataclasses import dataclass, field

from megatron_llave.errors import at_least, one_of, require

PARTS = ("vision", "projector", "language")
PRECISIONS = ("fp32", "bf16", "fp8")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
RECOMPUTE = ("none", "selective", "full")


@dataclass
class VisionConfig:
    """SigLIP vision tower."""

    hidden_size: int = 0
    """Width of the tower."""
    num_layers: int = 0
    """Layers that are run; for so400m 26 of the 27 pretrained ones."""
    num_heads: int = 0
    """Attention heads; divisible by parallel.tensor."""
    ffn_hidden_size: int = 0
    """Width of the tower's MLP."""
    image_size: int = 0
    """Side of one square tile, pixels."""
    patch_size: int = 14
    """Side of one patch, pixels. A rest of image_size / patch_size is not seen by the convolution."""

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass
class LanguageConfig:
    """Qwen2 decoder up to its final norm."""

    hidden_size: int = 0
    """Width of the decoder, and size of the embedding."""
    num_layers: int = 0
    """Decoder layers over all pipeline stages."""
    num_heads: int = 0
    """Query heads; divisible by parallel.tensor."""
    num_kv_heads: int = 0
    """Key/value heads (grouped-query attention); divisible by parallel.tensor."""
    ffn_hidden_size: int = 0
    """Width of the gated MLP."""
    vocab_size: int = 0
    """Token ids the embedding has rows for, before padding for tensor parallel."""
    rope_theta: float = 1000000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Epsilon of the RMS norms."""


@dataclass
class ModelConfig:
    """The whole embedder."""

    preset: str | None = None
    """Sizes to start from: tiny, 0.5b, 2b or 7b (presets.py); keys given beside it win."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Decoder."""
    image_grids: list[list[int]] = field(default_factory=list)
    """Anyres tile grids [columns, rows] to choose from, the first of equals wins; empty: one squashed tile."""
    anyres_max_tiles: int | None = 9
    """A picture's feature map of more than 1.21 times this many tiles is interpolated down to them (the 9 of
    anyres_max_9; never happens with grids up to 2x2); null: every patch is kept."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: any of vision, projector, language. image_newline goes with the projector."""
    kernels: str = "local"
    """Layer implementation: local (torch) or transformer_engine."""
    precision: str = "fp32"
    """Parameters and activations: fp32 or bf16; fp8: bf16 with the decoder's matrix products in FP8, needs kernels
    transformer_engine. Gradients, optimizer and loss are float32 in all of them, tower and pooling never FP8."""
    fp8_recipe: str = "tensorwise"
    """How FP8 numbers are scaled: delayed, tensorwise, blockwise or mxfp8, as megatron-core names them."""
    recompute: str = "none"
    """Activations of the decoder that the backward computes again: none, selective (inside attention and MLP) or full
    (each layer from its input): less memory, more time."""
    dropout: float = 0.0
    """Share of the decoder's hidden channels set to 0 in training, after the embedding and after every sublayer."""

    def __post_init__(self) -> None:
        """Check what can be said without the other sections."""
        for part in self.freeze:
            one_of("model.freeze", part, PARTS)
        one_of("model.kernels", self.kernels, ("local", "transformer_engine"))
        one_of("model.precision", self.precision, PRECISIONS)
        one_of("model.fp8_recipe", self.fp8_recipe, FP8_RECIPES)
        one_of("model.recompute", self.recompute, RECOMPUTE)
        is_possible = self.precision != "fp8" or self.kernels == "transformer_engine"
        require(is_possible, "model.precision=fp8 needs model.kernels=transformer_engine")
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be at least 0 and below 1")
        for grid in self.image_grids:
            ok = len(grid) == 2 and min(grid) >= 1
            require(ok, f"model.image_grids: {grid} is not a pair of [columns, rows], both at least 1")
        at_least(self, "model", 1, ("anyres_max_tiles",))

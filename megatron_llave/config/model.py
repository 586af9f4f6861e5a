"""The `model` section of the configuration: sizes of vision encoder and decoder, precision, kernels, frozen parts.

schema.py has the tree of all sections.
"""

from dataclasses import dataclass, field

from megatron_llave.errors import at_least, one_of, require

PARTS = ("vision", "projector", "language")
PRECISIONS = ("fp32", "bf16", "fp8")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
MOST_TILES = 1024
"""Number of tiles of the largest grid, which take 450 MB of memory per image at 384 pixels."""
RECOMPUTE = ("none", "selective", "full")


@dataclass
class VisionConfig:
    """The vision encoder: SigLIP of llava_onevision, or that of a Qwen-VL family."""

    hidden_size: int = 0
    """Width of the vision encoder."""
    num_layers: int = 0
    """Number of layers that are built; so400m uses 26 of its 27 pretrained layers."""
    num_heads: int = 0
    """Number of attention heads; must be divisible by parallel.tensor."""
    ffn_hidden_size: int = 0
    """Width of the MLP in each layer."""
    image_size: int = 0
    """Side of one square tile, in pixels; 0 for the Qwen-VL families, whose images keep their shape."""
    patch_size: int = 14
    """Side of one patch, in pixels. Where it does not divide image_size, the remaining pixels are ignored."""
    num_positions: int = 0
    """Rows of the table of learned positions, a square number, for qwen3_vl; it is interpolated to each image."""
    window_size: int = 0
    """Side of the windows that patches attend in, in pixels, for qwen2_5_vl."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers of qwen2_5_vl, counted from 0, in which a patch attends to its whole image."""
    tokens_per_second: int = 0
    """Temporal positions per second of a video, for qwen2_5_vl; 0: each pair of frames is one position."""
    deepstack_layers: list[int] = field(default_factory=list)
    """Layers of qwen3_vl, counted from 0, whose output is added after the decoder's first layers (deepstack)."""

    @property
    def patches_per_side(self) -> int:
        """Number of patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass
class LanguageConfig:
    """The Qwen2 or Qwen3 decoder, up to and including its final norm."""

    hidden_size: int = 0
    """Width of the decoder; this is also the size of the embedding."""
    num_layers: int = 0
    """Number of decoder layers over all pipeline stages."""
    num_heads: int = 0
    """Number of query heads; must be divisible by parallel.tensor."""
    num_kv_heads: int = 0
    """Number of key/value heads (grouped-query attention); must be divisible by parallel.tensor."""
    ffn_hidden_size: int = 0
    """Width of the gated MLP."""
    vocab_size: int = 0
    """Number of token ids that the token embedding has rows for, before it is padded for tensor parallelism."""
    rope_theta: float = 1000000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Epsilon of the RMS norms."""
    head_size: int = 0
    """Channels of an attention head; 0: hidden_size / num_heads."""
    mrope_section: list[int] = field(default_factory=list)
    """Numbers of channel pairs of a head that the rotary embedding turns by temporal, vertical and horizontal position,
    for the Qwen-VL families. Empty: all are turned by the position in the sequence."""

    @property
    def head_channels(self) -> int:
        """Number of channels of an attention head."""
        return self.head_size or self.hidden_size // max(1, self.num_heads)


@dataclass
class ModelConfig:
    """The complete embedding model: vision encoder, projector and decoder."""

    family: str = "llava_onevision"
    """Model family: llava_onevision, of which LLaVE is (SigLIP, projector, Qwen2), qwen2_vl, qwen2_5_vl or qwen3_vl. A
    preset sets it too."""
    preset: str | None = None
    """Preset that gives the sizes (presets.py): tiny, 0.5b, 2b or 7b; of the Qwen-VL families tiny_qwen2vl,
    tiny_qwen2_5vl, tiny_qwen3vl, qwen2vl_2b, qwen2vl_7b, qwen2_5vl_3b, qwen2_5vl_7b, qwen3vl_2b, qwen3vl_4b or
    qwen3vl_8b. Keys that are set beside it override it."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision encoder."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """The decoder."""
    image_grids: list[list[int]] = field(default_factory=list)
    """Anyres tile grids [columns, rows] to choose from; of equally good grids the first is used. Empty: each image is
    squashed into one tile."""
    anyres_max_tiles: int | None = 9
    """The feature map of an image that has more than 1.21 times this many tiles is interpolated down to this many. The
    9 is that of anyres_max_9; grids up to 2x2 never reach it. null: every patch is kept."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: any of vision, projector and language. image_newline belongs to the projector."""
    kernels: str = "local"
    """Implementation of the layers: local (torch) or transformer_engine."""
    precision: str = "fp32"
    """Precision of parameters and activations: fp32, bf16 or fp8. fp8 means bf16 with the decoder's matrix products in
    FP8, and needs kernels=transformer_engine. Gradients, optimizer and loss are always float32; vision encoder and
    pooling never use FP8."""
    fp8_recipe: str = "tensorwise"
    """How FP8 numbers are scaled: delayed, tensorwise, blockwise or mxfp8 (megatron-core's names)."""
    recompute: str = "none"
    """Activations of the decoder that are recomputed in the backward pass, which saves memory and costs time: none,
    selective (inside attention and MLP) or full (each layer from its input)."""
    dropout: float = 0.0
    """Probability with which a hidden channel of the decoder is set to 0 in training, after the token embedding and
    after every sublayer."""

    def __post_init__(self) -> None:
        """Check what can be checked without the other sections."""
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
            require(grid[0] * grid[1] <= MOST_TILES, f"model.image_grids: {grid} has more than {MOST_TILES} tiles")
        at_least(self, "model", 1, ("anyres_max_tiles",))

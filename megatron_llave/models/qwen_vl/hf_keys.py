"""Keys of config.json of the Qwen-VL families: what a missing key means, and which values we can run.

HfKeys has what differs; each family's folder makes one. A missing key has the value of transformers' config class.

Sources: transformers' configuration_qwen2_vl.py, configuration_qwen2_5_vl.py and configuration_qwen3_vl.py (4.57 and
5.23).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_llave.models.hf.decoder_config import DecoderKeys


@dataclass(frozen=True)
class HfKeys:
    """What the config.json of one family has of its own."""

    layout: str
    """The value of model_type, and the family's name."""
    architecture: str
    """The class of transformers with the vocabulary projection."""
    base: str
    """The class without it."""
    may_be_flat: bool
    """Whether the decoder's keys may be at the top level, as older versions of transformers write them."""
    decoder: DecoderKeys
    """Keys of the decoder."""
    mrope_section: tuple[int, int, int]
    """The value of a missing mrope_section."""
    is_interleaved: bool
    """Whether channels of the three positions take turns (mrope_interleaved), or come in three blocks."""
    vision: Mapping[str, tuple[str, int]]
    """Field of VisionConfig -> the key in vision_config, and the value of a missing key. The key mlp_ratio is the MLP's
    width in multiples of the encoder's."""
    vision_fixed: Mapping[str, tuple[Any, Any]]
    """Key of vision_config -> the value of a missing key, and the only value that is run."""
    output: tuple[str, int]
    """The key of vision_config with the width of visual tokens, which is the decoder's, and its default."""
    layer_lists: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Field of VisionConfig -> the key in vision_config with a list of layers, and the value of a missing key."""


SPECIAL_TOKENS = {
    "image_token_id": ("<|image_pad|>", 151655),
    "video_token_id": ("<|video_pad|>", 151656),
    "vision_start_token_id": ("<|vision_start|>", 151652),
    "vision_end_token_id": ("<|vision_end|>", 151653),
}
"""Key of config.json -> the token, and the value of a missing key."""

END_OF_TEXT = "<|endoftext|>"
"""The token that embedding models pool; the tokenizers of some append it to each text."""

TOKEN_BUDGET = {"min_image_tokens": 256, "max_image_tokens": 1280}
"""Keys of GME's config.json with its budget in visual tokens, and what its GmeQwen2VLConfig takes for a missing one."""

TOP_FIXED = {"quantization_config": (None, None)}

# Our field -> the key in config.json, and the value that Qwen2VLTextConfig and Qwen2_5_VLTextConfig give a missing key.
QWEN2_SIZES = {
    "hidden_size": ("hidden_size", 8192),
    "num_layers": ("num_hidden_layers", 80),
    "num_heads": ("num_attention_heads", 64),
    "num_kv_heads": ("num_key_value_heads", 8),
    "ffn_hidden_size": ("intermediate_size", 29568),
    "vocab_size": ("vocab_size", 152064),
    "norm_epsilon": ("rms_norm_eps", 1e-5),
}
QWEN2_DECODER = DecoderKeys(
    sizes=QWEN2_SIZES,
    fixed={"hidden_act": ("silu", "silu"), "attention_dropout": (0.0, 0.0), "partial_rotary_factor": (1.0, 1.0)},
    rope_theta=1000000.0,
    window_layers=80,
    rope_types=("default", "mrope"),
)
"""The decoder of Qwen2-VL and Qwen2.5-VL."""

VISION_FIXED = {
    "in_channels": (3, 3),
    "spatial_merge_size": (2, 2),
    "temporal_patch_size": (2, 2),
}
"""Keys of vision_config in all three families -> the value of a missing key, and the only value that is run."""

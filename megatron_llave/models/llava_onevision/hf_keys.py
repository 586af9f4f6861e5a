"""What a Hugging Face config.json may say: the keys of each layout, what a missing one means, which values we run.

hf_config.py makes a ModelConfig of them. A missing key has the value that the layout's own code takes.

Sources: transformers' configuration_llava_onevision.py, configuration_qwen2.py and configuration_siglip.py (4.4x to
5.x); the released llava_arch.py and multimodal_projector/builder.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llave.errors import CheckpointError

# Our field -> their key, and what Qwen2Config and SiglipVisionConfig take where it is missing.
LANGUAGE_KEYS = {
    "hidden_size": ("hidden_size", 4096),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", 32),  # null: as many as query heads
    "ffn_hidden_size": ("intermediate_size", 22016),
    "vocab_size": ("vocab_size", 151936),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
}
VISION_KEYS = {
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "ffn_hidden_size": ("intermediate_size", 3072),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
}
DEFAULT_ROPE_THETA = 10000.0

# Key -> (value where it is missing, the one value that we run).
LANGUAGE_FIXED = {"hidden_act": ("silu", "silu")}
VISION_FIXED = {
    "model_type": ("siglip_vision_model", "siglip_vision_model"),
    "hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
    "num_channels": (3, 3),
    "layer_norm_eps": (1e-6, 1e-6),
}
ONEVISION_FIXED = {
    "vision_feature_select_strategy": ("full", "full"),
    "projector_hidden_act": ("gelu", "gelu"),
    "multimodal_projector_bias": (True, True),
}
QWEN_FIXED = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_resampler_type": (None, None),
    "mm_use_im_start_end": (False, False),
}

# What the released configurations hold beside, none of which bears on a picture's or a text's embedding: video, the
# tokenizer's side, training. The tower is named among the tuned parts so that loaders take it from the weights.
QWEN_UNUSED = {
    "add_faster_video": False,
    "alpha": 9.0,
    "faster_token_stride": 10,
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "logit_scale": 50.0,
    "mm_newline_position": "one_token",
    "mm_projector_lr": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower_lr": None,
    "pos_skipping_range": 4096,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "vision_tower_pretrained": None,
}

# A llava_qwen file names its tower; sizes of another one than the released stand under the first of these keys. The
# second one is that of a test fixture.
QWEN_VISION_SECTIONS = ("vision_config", "_fixture_vision_config")

# Ids of <image> and <video>: the first two that Qwen2's tokenizer leaves free.
IMAGE_TOKENS = {"image_token_index": 151646, "video_token_index": 151647}


@dataclass(frozen=True)
class Section:
    """A part of a config.json, and how to name it in messages."""

    file: Path
    prefix: str
    values: dict

    def refuse(self, key: str, right: str) -> CheckpointError:
        """The error to raise for the value of `key`."""
        value = repr(self.values[key]) if key in self.values else "(missing)"
        return CheckpointError(f"{self.file}: {self.prefix}{key}={value} is not supported; it must be {right}")

    def number(self, key: str, default: float) -> float:
        """A positive number; a whole one where the default is."""
        value = self.values.get(key, default)
        kinds = int if isinstance(default, int) else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
            raise self.refuse(key, f"a positive {'whole ' if kinds is int else ''}number")
        return value

    def check(self, fixed: dict[str, tuple[Any, Any]]) -> None:
        """Refuse values other than the one we run."""
        for key, (default, right) in fixed.items():
            if self.values.get(key, default) != right:
                raise self.refuse(key, repr(right))

    def inner(self, key: str) -> "Section | None":
        """The section under `key`; None where it is missing or null."""
        values = self.values.get(key)
        if not isinstance(values, dict | None):
            raise self.refuse(key, "an object")
        return None if values is None else Section(self.file, f"{self.prefix}{key}.", values)

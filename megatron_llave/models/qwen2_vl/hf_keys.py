"""Keys of Qwen2-VL's config.json (models/qwen_vl/hf_keys.py says what they mean).

Source: transformers' configuration_qwen2_vl.py (4.57, 5.23).
"""

from megatron_llave.models.qwen_vl.hf_keys import QWEN2_DECODER, VISION_FIXED, HfKeys

KEYS = HfKeys(
    layout="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    base="Qwen2VLModel",
    may_be_flat=True,
    decoder=QWEN2_DECODER,
    mrope_section=(16, 24, 24),
    is_interleaved=False,
    vision={
        "hidden_size": ("embed_dim", 1280),
        "num_layers": ("depth", 32),
        "num_heads": ("num_heads", 16),
        "ffn_hidden_size": ("mlp_ratio", 4),
        "patch_size": ("patch_size", 14),
    },
    vision_fixed={**VISION_FIXED, "hidden_act": ("quick_gelu", "quick_gelu")},
    output=("hidden_size", 3584),
)

"""Keys of Qwen2.5-VL's config.json (models/qwen_vl/hf_keys.py says what they mean).

Source: transformers' configuration_qwen2_5_vl.py (4.57, 5.23).
"""

from megatron_llave.models.qwen_vl.hf_keys import QWEN2_DECODER, VISION_FIXED, HfKeys

KEYS = HfKeys(
    layout="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    base="Qwen2_5_VLModel",
    may_be_flat=True,
    decoder=QWEN2_DECODER,
    mrope_section=(16, 24, 24),
    is_interleaved=False,
    vision={
        "hidden_size": ("hidden_size", 3584),
        "num_layers": ("depth", 32),
        "num_heads": ("num_heads", 16),
        "ffn_hidden_size": ("intermediate_size", 3420),
        "patch_size": ("patch_size", 14),
        "window_size": ("window_size", 112),
        "tokens_per_second": ("tokens_per_second", 4),
    },
    vision_fixed={**VISION_FIXED, "hidden_act": ("silu", "silu")},
    output=("out_hidden_size", 3584),
    layer_lists={"full_attention_layers": ("fullatt_block_indexes", (7, 15, 23, 31))},
)

"""Keys of Qwen3-VL's config.json (models/qwen_vl/hf_keys.py says what they mean).

Source: transformers' configuration_qwen3_vl.py (4.57, 5.23). For a missing rope_theta the one takes 5000000, as in the
released models, and the other 500000.
"""

from megatron_llave.models.hf.decoder_config import DecoderKeys
from megatron_llave.models.qwen_vl.hf_keys import QWEN2_DECODER, VISION_FIXED, HfKeys

KEYS = HfKeys(
    layout="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    base="Qwen3VLModel",
    may_be_flat=False,
    decoder=DecoderKeys(
        # Our field -> the key in config.json, and the value that Qwen3VLTextConfig gives a missing key.
        sizes={
            "hidden_size": ("hidden_size", 4096),
            "num_layers": ("num_hidden_layers", 32),
            "num_heads": ("num_attention_heads", 32),
            "num_kv_heads": ("num_key_value_heads", 32),
            "ffn_hidden_size": ("intermediate_size", 22016),
            "vocab_size": ("vocab_size", 151936),
            "norm_epsilon": ("rms_norm_eps", 1e-6),
        },
        fixed={**QWEN2_DECODER.fixed, "attention_bias": (False, False)},
        rope_theta=None,
        window_layers=80,
        rope_types=QWEN2_DECODER.rope_types,
        head_size=128,
    ),
    mrope_section=(24, 20, 20),
    is_interleaved=True,
    vision={
        "hidden_size": ("hidden_size", 1152),
        "num_layers": ("depth", 27),
        "num_heads": ("num_heads", 16),
        "ffn_hidden_size": ("intermediate_size", 4304),
        "patch_size": ("patch_size", 16),
        "num_positions": ("num_position_embeddings", 2304),
    },
    vision_fixed={**VISION_FIXED, "hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh")},
    output=("out_hidden_size", 3584),
    layer_lists={"deepstack_layers": ("deepstack_visual_indexes", (8, 16, 24))},
)

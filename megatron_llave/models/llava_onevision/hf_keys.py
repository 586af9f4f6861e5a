"""Keys of a Hugging Face config.json in each layout: what a missing key means, and which values we can run.

hf_config.py makes a ModelConfig of them. A missing key has the value that the code of the layout gives it.

Sources: transformers' configuration_llava_onevision.py, configuration_qwen2.py and configuration_siglip.py (4.4x to
5.x); llava_arch.py and multimodal_projector/builder.py of the official LLaVE repository.
"""

from megatron_llave.models.hf.decoder_config import DecoderKeys

# Our field -> the key in config.json, and the value that Qwen2Config and SiglipVisionConfig give a missing key.
LANGUAGE_KEYS = {
    "hidden_size": ("hidden_size", 4096),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", 32),  # null means as many as query heads
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

# Key -> (value of a missing key, the only value that we run).
LANGUAGE_FIXED = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (True, True),
    "attention_dropout": (0.0, 0.0),
    "is_causal": (True, True),
    "mlp_bias": (False, False),
    "partial_rotary_factor": (1.0, 1.0),
}
DECODER = DecoderKeys(LANGUAGE_KEYS, LANGUAGE_FIXED, DEFAULT_ROPE_THETA, window_layers=28)
VISION_FIXED = {
    "model_type": ("siglip_vision_model", "siglip_vision_model"),
    "hidden_act": ("gelu_pytorch_tanh", "gelu_pytorch_tanh"),
    "attention_dropout": (0.0, 0.0),
    "num_channels": (3, 3),
    "layer_norm_eps": (1e-6, 1e-6),
}
ONEVISION_FIXED = {
    "vision_feature_select_strategy": ("full", "full"),
    "projector_hidden_act": ("gelu", "gelu"),
    "multimodal_projector_bias": (True, True),
}
LLAVA_FIXED = ONEVISION_FIXED | {
    "vision_feature_select_strategy": ("default", "full"),
    "vision_feature_layer": (-2, -1),
}
TOP_FIXED = {"quantization_config": (None, None), "use_image_newline_parameter": (True, True)}
QWEN_FIXED = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_resampler_type": (None, None),
    "mm_use_im_start_end": (False, False),
}

# Further keys of the released configurations, about video, the tokenizer and training, which do not affect embeddings
# of texts and images. The vision encoder is named among the tuned parts so that loaders take it from the weights.
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

QWEN_REFUSED = ("add_faster_video", "mm_spatial_pool_mode", "use_pos_skipping")
"""Those of QWEN_UNUSED that do affect embeddings, of videos or in training, if they have another value."""

QWEN_VISION_SECTION = "vision_config"
"""A llava_qwen file names its vision encoder; if that is not the released one, its sizes are under this key."""

# Ids of <image> and <video>: the first two that Qwen2's tokenizer leaves free.
IMAGE_TOKENS = {"image_token_index": 151646, "video_token_index": 151647}

"""Names of Qwen3-VL's tensors in Hugging Face folders, as far as they are its own.

Source: transformers' modeling_qwen3_vl.py (4.57, 5.23).
"""

from megatron_llave.models.hf.mapping import copied
from megatron_llave.models.qwen_vl.hf_weights import LANGUAGE, VISION, HfNames, merger, vision_layer

MATRICES = ("linear_fc1", "linear_fc2")

NAMES = HfNames(
    written={LANGUAGE: "model.language_model.", VISION: "model.visual."},
    vision_layer=vision_layer(*MATRICES),
    single={
        "vision.position_embedding.weight": "pos_embed.weight",
        **merger("projector.merger", "merger", "norm", *MATRICES),
        **merger("projector.deepstack.*", "deepstack_merger_list.*", "norm", *MATRICES),
    },
    has_patch_bias=True,
    language_layer={
        f"self_attention.{part}_layernorm.weight": copied(f"self_attn.{part}_norm.weight") for part in "qk"
    },
)

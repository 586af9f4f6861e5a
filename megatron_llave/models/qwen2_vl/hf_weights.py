"""Names of Qwen2-VL's tensors in Hugging Face folders, as far as they are its own.

Source: transformers' modeling_qwen2_vl.py (4.57, 5.23).
"""

from megatron_llave.models.qwen_vl.hf_weights import LANGUAGE, QKV_BIAS, HfNames, merger, vision_layer

NAMES = HfNames(
    written={LANGUAGE: "model."},
    vision_layer=vision_layer("fc1", "fc2"),
    single=merger("projector.merger", "merger", "ln_q", "mlp.0", "mlp.2"),
    language_layer=QKV_BIAS,
)

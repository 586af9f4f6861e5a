"""Names of Qwen2.5-VL's tensors in Hugging Face folders, as far as they are its own: RMS norms and a gated MLP.

Source: transformers' modeling_qwen2_5_vl.py (4.57, 5.23).
"""

from megatron_llave.models.hf.mapping import copied, gated
from megatron_llave.models.qwen_vl.hf_weights import KINDS, LANGUAGE, QKV_BIAS, VISION_ATTENTION, HfNames, merger

NORM_BIAS = "projector.merger.norm.bias"

NAMES = HfNames(
    written={LANGUAGE: "model."},
    vision_layer={
        **VISION_ATTENTION,
        "input_layernorm.weight": copied("norm1.weight"),
        "pre_mlp_layernorm.weight": copied("norm2.weight"),
        **{f"mlp.linear_fc1.{kind}": gated(f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}") for kind in KINDS},
        **{f"mlp.linear_fc2.{kind}": copied(f"mlp.down_proj.{kind}") for kind in KINDS},
    },
    single={
        ours: theirs
        for ours, theirs in merger("projector.merger", "merger", "ln_q", "mlp.0", "mlp.2").items()
        if ours != NORM_BIAS
    },
    language_layer=QKV_BIAS,
)

"""Names of a LLaVA-OneVision model's tensors in Hugging Face folders, and the rules that make our parameters of them.

Canonical names are those that transformers 4.x writes for LLaVA-OneVision. PREFIXES translates the spelling of
transformers 5.x and of llava_qwen, the layout of LLaVA-NeXT and of the released LLaVE checkpoints.

Sources of the pairs: transformers' convert_llava_onevision_weights_to_hf.py and modeling_qwen2.py, modeling_siglip.py.
"""

import re

from megatron_llave.config.model import ModelConfig
from megatron_llave.models.hf.config_json import HfConfig
from megatron_llave.models.hf.mapping import Rule, copied, gated, layer_rules, padded, qkv
from megatron_llave.models.hf.peft_files import in_transformers

LANGUAGE, VISION = "language_model.model.", "vision_tower.vision_model."
HF_EMBEDDING = LANGUAGE + "embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
POST_NORM = VISION + "post_layernorm."

# Our parameter -> the canonical name of the tensor that it is.
SINGLE_PARAMETERS = {
    "language.decoder.final_layernorm.weight": LANGUAGE + "norm.weight",
    "image_newline": "image_newline",
    "projector.encoder.linear_fc1.weight": "multi_modal_projector.linear_1.weight",
    "projector.encoder.linear_fc1.bias": "multi_modal_projector.linear_1.bias",
    "projector.encoder.linear_fc2.weight": "multi_modal_projector.linear_2.weight",
    "projector.encoder.linear_fc2.bias": "multi_modal_projector.linear_2.bias",
    "vision.encoder.conv1.weight": VISION + "embeddings.patch_embedding.weight",
    "vision.encoder.conv1.bias": VISION + "embeddings.patch_embedding.bias",
    "vision.encoder.position_embeddings.weight": VISION + "embeddings.position_embedding.weight",
}
# Within a layer: our parameter -> how it is made.
LANGUAGE_LAYER = {
    "input_layernorm.weight": copied("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": qkv(*(f"self_attn.{part}_proj.weight" for part in "qkv")),
    "self_attention.linear_qkv.bias": qkv(*(f"self_attn.{part}_proj.bias" for part in "qkv")),
    "self_attention.linear_proj.weight": copied("self_attn.o_proj.weight"),
    "pre_mlp_layernorm.weight": copied("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": gated("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": copied("mlp.down_proj.weight"),
}
VISION_LAYER = {
    f"{ours}.{kind}": copied(f"{theirs}.{kind}")
    for ours, theirs in {
        "input_layernorm": "layer_norm1",
        "self_attention.linear_proj": "self_attn.out_proj",
        "pre_mlp_layernorm": "layer_norm2",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }.items()
    for kind in ("weight", "bias")
} | {
    f"self_attention.linear_qkv.{kind}": qkv(*(f"self_attn.{part}_proj.{kind}" for part in "qkv"))
    for kind in ("weight", "bias")
}

# Spelling -> canonical, the first that fits. Transformers 5.x drops `vision_model.` from the names of the vision
# encoder; some 4.5x releases wrote the names that the model has in memory, which begin with `model.`.
PREFIXES = {
    "llava_onevision": [
        ("model.language_model.", LANGUAGE),
        ("model.vision_tower.vision_model.", VISION),
        ("model.vision_tower.", VISION),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
        (VISION, VISION),
        ("vision_tower.", VISION),
    ],
    "llava_qwen": [
        ("model.vision_tower.vision_tower.vision_model.", VISION),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
        ("model.", LANGUAGE),
    ],
}

PREFIXES["llava"] = PREFIXES["llava_onevision"]

# What the files may hold beside the embedder: the vocabulary projection, the vision encoder's norm and head, buffers.
UNUSED = re.compile(
    rf"{re.escape(LM_HEAD)}|{re.escape(POST_NORM)}(weight|bias)|{re.escape(VISION)}(head\..*|embeddings\.position_ids)"
    r"|.*\.rotary_emb\.inv_freq"
)


def canonical_name(name: str, layout: str) -> str:
    """The canonical name of a tensor that a folder of this layout calls `name`."""
    for spelling, canonical in PREFIXES[layout]:
        if name.startswith(spelling):
            return canonical + name.removeprefix(spelling)
    return name


def layout_name(name: str, layout: str) -> str:
    """How a tensor is called in a folder that we write; those of transformers get names which 4 and 5 load."""
    if layout != "llava_qwen":
        return name
    for spelling, canonical in PREFIXES[layout]:
        if name.startswith(canonical):
            return spelling + name.removeprefix(canonical)
    return name


def module_name(module: str, layout: str) -> str:
    """How a module of canonical name is called in memory: by transformers 5 (4.57 differs in the vision encoder), or by
    the code of LLaVA for llava_qwen."""
    if layout != "llava_qwen":
        return in_transformers(module.replace("vision_tower.vision_model.", "vision_tower."), layout)
    return layout_name(module, layout)


def rules(model: ModelConfig) -> dict[str, Rule]:
    """A rule for each parameter of the complete model, by our name."""
    language, vision = model.language, model.vision
    table = {ours: copied(theirs) for ours, theirs in SINGLE_PARAMETERS.items()}
    table["language.embedding.word_embeddings.weight"] = padded(HF_EMBEDDING, language.vocab_size)
    table |= layer_rules(
        LANGUAGE_LAYER,
        "language.decoder.layers.",
        LANGUAGE + "layers.",
        language.num_layers,
        language.num_heads,
        language.num_kv_heads,
    )
    return table | layer_rules(
        VISION_LAYER,
        "vision.encoder.decoder.layers.",
        VISION + "encoder.layers.",
        vision.num_layers,
        vision.num_heads,
        vision.num_heads,
    )


def is_unused(name: str, config: HfConfig) -> bool:
    """Whether a folder may hold a tensor of this canonical name that the embedder does not use."""
    layer = re.match(re.escape(VISION) + r"encoder\.layers\.(\d+)\.", name)
    is_beyond = layer is not None and config.model.vision.num_layers <= int(layer[1]) < config.vision_layers
    return is_beyond or UNUSED.fullmatch(name) is not None


def unused_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The vision encoder's last norm, which both layouts hold and the embedder does not use."""
    return {POST_NORM + kind: (model.vision.hidden_size,) for kind in ("weight", "bias")}

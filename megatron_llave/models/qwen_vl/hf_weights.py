"""Names of a Qwen-VL model's tensors in Hugging Face folders, and the rules that make our parameters of them.

Canonical names are those of transformers' models without the vocabulary projection (Qwen2VLModel and its like).
PREFIXES translates all others: those of the released Qwen2-VL and Qwen2.5-VL folders, which transformers 4.45 to 5.x
read and write (`model.layers`, `visual`), and those of the models in memory since 4.52, which are also the names of
Qwen3-VL's folders (`model.language_model.layers`, `model.visual`).

Sources of the pairs: transformers' modeling_qwen2_vl.py, modeling_qwen2_5_vl.py, modeling_qwen3_vl.py and, for the
names, conversion_mapping.py of 5.23 and _checkpoint_conversion_mapping of 4.57.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_llave.config.model import ModelConfig
from megatron_llave.models.hf.config_json import HfConfig
from megatron_llave.models.hf.mapping import Rule, copied, flattened, gated, layer_rules, padded, qkv, stacked_qkv
from megatron_llave.models.qwen_vl.resize import FRAMES

LANGUAGE, VISION = "language_model.", "visual."
HF_EMBEDDING = LANGUAGE + "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
CHANNELS = 3
"""Colours of a patch."""
KINDS = ("weight", "bias")

PREFIXES = (
    ("model.visual.", VISION),
    ("model.language_model.", LANGUAGE),
    ("language_model.model.", LANGUAGE),
    ("language_model.lm_head.", "lm_head."),
    (LANGUAGE, LANGUAGE),
    ("model.", LANGUAGE),
)
"""Spelling -> canonical, the first that fits."""

UNUSED = re.compile(rf"{re.escape(LM_HEAD)}|.*\.(rotary_emb|rotary_pos_emb)\.inv_freq")
"""What the files may hold beside the embedder: the vocabulary projection and buffers."""


@dataclass(frozen=True)
class HfNames:
    """What differs between the weights of the families."""

    written: Mapping[str, str]
    """Canonical prefix -> the spelling that an export writes, which transformers 4.57 and 5.23 load."""
    vision_layer: Mapping[str, Rule]
    """Rules of a layer of the vision encoder; names on both sides are relative to the layer."""
    single: Mapping[str, str]
    """Our parameters outside of the layers -> the names in the folder after `visual.`; `*` counts deepstack mergers."""
    has_patch_bias: bool = False
    """Whether the patch embedding has a bias."""
    language_layer: Mapping[str, Rule] = field(default_factory=dict)
    """Rules of a decoder layer beside LANGUAGE_LAYER."""


LANGUAGE_LAYER = {
    "input_layernorm.weight": copied("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": qkv(*(f"self_attn.{part}_proj.weight" for part in "qkv")),
    "self_attention.linear_proj.weight": copied("self_attn.o_proj.weight"),
    "pre_mlp_layernorm.weight": copied("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": gated("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": copied("mlp.down_proj.weight"),
}
"""Within a decoder layer: our parameter -> how it is made, in all families."""
QKV_BIAS = {"self_attention.linear_qkv.bias": qkv(*(f"self_attn.{part}_proj.bias" for part in "qkv"))}
"""The further parameter of Qwen2's decoder layers."""

VISION_ATTENTION = {f"self_attention.linear_qkv.{kind}": stacked_qkv(f"attn.qkv.{kind}") for kind in KINDS} | {
    f"self_attention.linear_proj.{kind}": copied(f"attn.proj.{kind}") for kind in KINDS
}
"""Within a layer of the vision encoder, in all families."""


def vision_layer(fc1: str, fc2: str) -> dict[str, Rule]:
    """Rules of a layer with layer norms and a plain MLP, whose matrices have these names."""
    pairs = {"input_layernorm": "norm1", "pre_mlp_layernorm": "norm2"}
    pairs |= {"mlp.linear_fc1": f"mlp.{fc1}", "mlp.linear_fc2": f"mlp.{fc2}"}
    plain = {f"{ours}.{kind}": copied(f"{theirs}.{kind}") for ours, theirs in pairs.items() for kind in KINDS}
    return VISION_ATTENTION | plain


def merger(ours: str, theirs: str, norm: str, fc1: str, fc2: str) -> dict[str, str]:
    """Our parameters of a merger with a layer norm -> its names in the folder."""
    parts = {"norm": norm, "mlp.linear_fc1": fc1, "mlp.linear_fc2": fc2}
    return {f"{ours}.{part}.{kind}": f"{theirs}.{name}.{kind}" for part, name in parts.items() for kind in KINDS}


def canonical_name(name: str, layout: str) -> str:
    """The canonical name of a tensor that a folder calls `name`."""
    for spelling, canonical in PREFIXES:
        if name.startswith(spelling):
            return canonical + name.removeprefix(spelling)
    return name


def layout_name(name: str, layout: str, names: HfNames) -> str:
    """How a tensor is called in a folder that we write."""
    for canonical, spelling in names.written.items():
        if name.startswith(canonical):
            return spelling + name.removeprefix(canonical)
    return name


def rules(model: ModelConfig, names: HfNames) -> dict[str, Rule]:
    """A rule for each parameter of the complete model, by our name."""
    language, vision = model.language, model.vision
    patch = (CHANNELS, FRAMES, vision.patch_size, vision.patch_size)
    table = {
        "language.embedding.word_embeddings.weight": padded(HF_EMBEDDING, language.vocab_size),
        "language.decoder.final_layernorm.weight": copied(LANGUAGE + "norm.weight"),
        "vision.patch_embed.weight": flattened(VISION + "patch_embed.proj.weight", patch),
    }
    if names.has_patch_bias:
        table["vision.patch_embed.bias"] = copied(VISION + "patch_embed.proj.bias")
    for ours, theirs in names.single.items():
        for index in range(len(vision.deepstack_layers) if "*" in ours else 1):
            table[ours.replace("*", str(index))] = copied(VISION + theirs.replace("*", str(index)))
    decoder = (language.num_layers, language.num_heads, language.num_kv_heads)
    layer = LANGUAGE_LAYER | dict(names.language_layer)
    table |= layer_rules(layer, "language.decoder.layers.", LANGUAGE + "layers.", *decoder)
    encoder = (vision.num_layers, vision.num_heads, vision.num_heads)
    return table | layer_rules(names.vision_layer, "vision.decoder.layers.", VISION + "blocks.", *encoder)


def is_unused(name: str, config: HfConfig) -> bool:
    """Whether a folder may hold a tensor of this canonical name that the embedder does not use."""
    return UNUSED.fullmatch(name) is not None

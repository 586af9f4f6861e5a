"""config.json of the Qwen-VL families <-> ModelConfig.

Newer files have the decoder's keys under text_config and its rotary embedding under rope_parameters; older ones of
Qwen2-VL and Qwen2.5-VL have them at the top level, and rope_scaling beside rope_theta. What is written is read by
transformers 4.57 and 5.23 alike. hf_keys.py has the keys, hf_weights.py the names of the weights.

Sources: transformers' configuration_qwen2_vl.py, configuration_qwen2_5_vl.py and configuration_qwen3_vl.py (4.57 and
5.23).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_llave.config.checks import require_same_model
from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import one_of, require
from megatron_llave.models.hf.config_json import DTYPE_KEYS, DTYPES, HfConfig, Section
from megatron_llave.models.hf.decoder_config import language_section, read_language, rope_section
from megatron_llave.models.qwen_vl.hf_keys import SPECIAL_TOKENS, TOP_FIXED, HfKeys
from megatron_llave.models.qwen_vl.resize import MERGED

VISION_ROPE = {"rope_theta": (10000.0, 10000.0)}
MROPE_DIMENSIONS = 3


def layout_of(values: Mapping[str, Any], keys: HfKeys) -> str | None:
    """The layout of a folder with this config.json; None: it is of another family."""
    return keys.layout if values.get("model_type") == keys.layout else None


def read_config(top: Section, keys: HfKeys) -> HfConfig:
    """What a config.json says.

    Raises:
        CheckpointError: it describes a model that we cannot run.
    """
    top.check(TOP_FIXED)
    inner = top.inner("text_config")
    text = inner if inner is not None else top if keys.may_be_flat else Section(top.file, "text_config.", {})
    language = _read_language(text, keys)
    vision = _read_vision(top.inner("vision_config") or Section(top.file, "vision_config.", {}), keys, language)
    for key, (_, default) in SPECIAL_TOKENS.items():
        token = top.values.get(key, default)
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < language.vocab_size:
            raise top.refuse(key, f"a token id below vocab_size={language.vocab_size}")
    # transformers 4.x ties weights by the key of the decoder, 5.x if either key is true.
    tied = bool(top.values.get("tie_word_embeddings")) or bool(text.values.get("tie_word_embeddings"))
    run = RunConfig(model=ModelConfig(family=keys.layout, vision=vision, language=language))
    return HfConfig(keys.layout, run, tied, top.dtype() or text.dtype(), vision.num_layers, top.values)


def _read_language(text: Section, keys: HfKeys) -> LanguageConfig:
    kinds = (None, keys.layout, f"{keys.layout}_text")
    if text.values.get("model_type") not in kinds:
        raise text.refuse("model_type", f"{keys.layout}_text")
    text.check(TOP_FIXED)
    language = read_language(text, keys.decoder)
    rope, pairs = rope_section(text, keys.decoder.rope_types), language.head_channels // 2
    section = rope.values.get("mrope_section", list(keys.mrope_section))
    is_list = isinstance(section, list) and len(section) == MROPE_DIMENSIONS
    if not is_list or not all(_is_size(part) for part in section) or sum(section) != pairs:
        raise rope.refuse("mrope_section", f"three positive numbers whose sum is half a head's channels, {pairs}")
    language.mrope_section = section
    if rope.values.get("mrope_interleaved", keys.is_interleaved) != keys.is_interleaved:
        raise rope.refuse("mrope_interleaved", str(keys.is_interleaved).lower())
    return language


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read_vision(section: Section, keys: HfKeys, language: LanguageConfig) -> VisionConfig:
    kinds = (None, keys.layout, f"{keys.layout}_vision")
    if section.values.get("model_type") not in kinds:
        raise section.refuse("model_type", f"{keys.layout}_vision")
    section.check(keys.vision_fixed)
    rope = section.inner("rope_parameters")
    if rope is not None:
        rope.check(VISION_ROPE)
    read = {name: section.number(key, default) for name, (key, default) in keys.vision.items()}
    if keys.vision["ffn_hidden_size"][0] == "mlp_ratio":
        read["ffn_hidden_size"] *= read["hidden_size"]
    vision = VisionConfig(**read)
    for name, (key, default) in keys.layer_lists.items():
        layers = section.values.get(key, list(default))
        if not isinstance(layers, list) or not all(isinstance(i, int) and 0 <= i < vision.num_layers for i in layers):
            raise section.refuse(key, f"a list of layers from 0 to {vision.num_layers - 1}")
        if layers != sorted({*layers}):
            raise section.refuse(key, "a rising list of layers")
        setattr(vision, name, layers)
    key, default = keys.output
    if section.values.get(key, default) != language.hidden_size:
        raise section.refuse(key, f"{language.hidden_size}, the hidden_size of the decoder")
    head, rest = divmod(vision.hidden_size, vision.num_heads)
    if rest or head % 4:
        raise section.refuse("num_heads", f"such that {vision.hidden_size} channels are multiples of 4 in each head")
    if vision.window_size % (MERGED * vision.patch_size):
        right = f"a multiple of two patches, {MERGED * vision.patch_size}"
        raise section.refuse(keys.vision["window_size"][0], right)
    if math.isqrt(vision.num_positions) ** 2 != vision.num_positions:
        raise section.refuse(keys.vision["num_positions"][0], "a square number")
    if len(vision.deepstack_layers) > language.num_layers:
        raise section.refuse(keys.layer_lists["deepstack_layers"][0], f"at most {language.num_layers} layers")
    return vision


def build_config_json(
    model: ModelConfig, layout: str, tied: bool, dtype: str | None, source: HfConfig | None, keys: HfKeys
) -> dict:
    """Return the config.json of a folder with this model's weights.

    With a source, all keys stay except those that no longer describe the model; the rotary embedding is added in the
    spelling of transformers 4.x where only 5.x would find it.

    Args:
        model: sizes of the model.
        layout: that of the family.
        tied: whether the embedding is the vocabulary projection too, so that the weights hold it once.
        dtype: type of the weights, float32, bfloat16 or float16; None: that of the source, if it has one.
        source: the config.json that the weights were imported with.
        keys: the family's keys.

    Raises:
        ConfigError: the source is of another model.
    """
    one_of("layout", layout, (keys.layout,))
    require(dtype in (None, *DTYPES), f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    if source is not None:
        require_same_model(model, source.model, "the folder the weights came from")
        return _updated(model, tied, dtype, source, keys)
    language = language_section(model.language, keys.decoder, {}, tied, _mrope(model.language, keys))
    return {
        "architectures": [keys.architecture],
        "model_type": keys.layout,
        **_special_tokens(model.language.vocab_size),
        "text_config": {"model_type": f"{keys.layout}_text", **language},
        "tie_word_embeddings": tied,
        "vision_config": _vision_section(model, keys),
        **({} if dtype is None else dict.fromkeys(DTYPE_KEYS, dtype)),
    }


def _updated(model: ModelConfig, tied: bool, dtype: str | None, source: HfConfig, keys: HfKeys) -> dict:
    """Return the source's config.json with only those keys changed that do not describe the model."""
    made = copy.deepcopy(source.raw)
    if made.get("text_config") is None and not keys.may_be_flat:
        made["text_config"] = {}
    text = made if made.get("text_config") is None else made["text_config"]
    written = language_section(model.language, keys.decoder, {}, tied, _mrope(model.language, keys))
    text["rope_scaling"] = written["rope_scaling"] | (text.get("rope_scaling") or {})
    text["rope_theta"] = model.language.rope_theta
    if model.language.vocab_size != source.model.language.vocab_size:
        text["vocab_size"] = model.language.vocab_size
    if tied or tied != source.tied:
        text["tie_word_embeddings"] = made["tie_word_embeddings"] = tied
    if dtype not in (None, source.dtype):
        for section in (text, made.get("vision_config") or {}):
            section |= {key: dtype for key in DTYPE_KEYS if key in section}
        made |= dict.fromkeys(DTYPE_KEYS, dtype)
    return made


def _mrope(language: LanguageConfig, keys: HfKeys) -> dict:
    section = {"mrope_section": language.mrope_section}
    return section | ({"mrope_interleaved": True} if keys.is_interleaved else {})


def _special_tokens(rows: int) -> dict[str, int]:
    """Return the ids of Qwen2's tokenizer, or where the embedding has no rows for them, the last ones that it has."""
    defaults = {key: default for key, (_, default) in SPECIAL_TOKENS.items()}
    if max(defaults.values()) < rows:
        return defaults
    return {key: rows - 1 - i for i, key in enumerate(defaults)}


def _vision_section(model: ModelConfig, keys: HfKeys) -> dict:
    values = asdict(model.vision)
    named = {key: values[name] for name, (key, _) in keys.vision.items()}
    if "mlp_ratio" in named:
        width = model.vision.hidden_size
        ok = values["ffn_hidden_size"] % width == 0
        sizes = f"model.vision.ffn_hidden_size={values['ffn_hidden_size']}"
        require(ok, f"{sizes} has no place in format {keys.layout}; it must be a multiple of hidden_size={width}")
        named["mlp_ratio"] = values["ffn_hidden_size"] // width
    lists = {key: values[name] for name, (key, _) in keys.layer_lists.items()}
    fixed = {key: right for key, (_, right) in keys.vision_fixed.items()}
    width = {keys.output[0]: model.language.hidden_size}
    return {"model_type": keys.layout, **fixed, **named, **lists, **width, "initializer_range": 0.02}

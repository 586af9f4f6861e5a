"""The decoder's keys of a config.json <-> LanguageConfig, for decoders that are built as Qwen2's is.

transformers names these keys alike for all of them; the families say what a missing key means and which values are run.

Sources: transformers' configuration_qwen2.py, configuration_qwen2_vl.py, configuration_qwen3_vl.py and
modeling_rope_utils.py (4.4x to 5.x).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_llave.config.model import LanguageConfig
from megatron_llave.models.hf.config_json import Section

SPECIAL_TOKENS = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
"""Ids of Qwen2's tokenizer, for a decoder that was not imported."""


@dataclass(frozen=True)
class DecoderKeys:
    """What a family's config class makes of missing keys, and which values are run."""

    sizes: Mapping[str, tuple[str, float]]
    """Our field -> the key in config.json, and the value of a missing key."""
    fixed: Mapping[str, tuple[Any, Any]]
    """Key -> the value of a missing key, and the only value that is run."""
    rope_theta: float | None
    """The value of a missing rope_theta; None: versions of transformers disagree, so that the key is needed."""
    window_layers: int
    """The value of a missing max_window_layers."""
    rope_types: tuple[str, ...] = ("default",)
    """Kinds of rotary embedding that are run."""
    head_size: int | None = None
    """The value of a missing head_dim; None: heads always have hidden_size / num_attention_heads channels."""


def read_language(section: Section, keys: DecoderKeys) -> LanguageConfig:
    """The decoder that a section describes, but for mrope_section.

    Raises:
        CheckpointError: it is one that we cannot run.
    """
    section.check(keys.fixed)
    values, named = section.values, dict(keys.sizes)
    heads = section.number(*named["num_heads"])
    if values.get("num_key_value_heads", 0) is None:
        named["num_kv_heads"] = ("num_attention_heads", heads)
    language = LanguageConfig(**{name: section.number(key, default) for name, (key, default) in named.items()})
    language.rope_theta = _rope_theta(section, keys)
    width = language.hidden_size // heads
    if keys.head_size is None and values.get("head_dim") not in (None, width):
        raise section.refuse("head_dim", f"hidden_size / num_attention_heads = {width}")
    if keys.head_size is not None and values.get("head_dim", 0) is not None:
        channels = section.number("head_dim", keys.head_size)
        language.head_size = 0 if channels * heads == language.hidden_size else channels
    is_sliding = "sliding_attention" in str(values.get("layer_types"))
    if values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None:
        slides = section.number("max_window_layers", keys.window_layers) < language.num_layers
        if is_sliding if values.get("layer_types") else slides:
            raise section.refuse("use_sliding_window", "false: every layer of ours sees the whole sequence")
    if is_sliding:
        raise section.refuse("layer_types", "full_attention in each place: every layer of ours sees the whole sequence")
    return language


def rope_section(section: Section, types: tuple[str, ...]) -> Section:
    """What rope_parameters and rope_scaling say; of a key in both that of the latter counts, as in transformers 5.x.

    Raises:
        CheckpointError: the rotary embedding is of a kind that is not among `types`.
    """
    merged = Section(section.file, f"{section.prefix}rope_parameters.", {})
    for key in ("rope_parameters", "rope_scaling"):
        inner = section.inner(key)
        if inner is not None:
            if inner.values.get("rope_type", inner.values.get("type", "default")) not in types:
                raise section.refuse(key, f"null, or of rope_type {' or '.join(types)}")
            merged = Section(section.file, inner.prefix, merged.values | inner.values)
    return merged


def _rope_theta(section: Section, keys: DecoderKeys) -> float:
    """Return the base of the rotary embedding; as transformers 5.x does, from rope_parameters before rope_theta."""
    rope = rope_section(section, keys.rope_types)
    if keys.rope_theta is None and not {"rope_theta"} & (section.values.keys() | rope.values.keys()):
        raise section.refuse("rope_theta", "given: versions of transformers do not agree on the value of a missing one")
    theta = float(section.number("rope_theta", keys.rope_theta or 1.0))
    return float(rope.number("rope_theta", theta))


def language_section(
    language: LanguageConfig, keys: DecoderKeys, given: Mapping[str, Any], tied: bool, mrope: Mapping[str, Any]
) -> dict:
    """Return the keys of a decoder, with the rotary embedding as in transformers 4.x and as in 5.x.

    Args:
        language: the decoder.
        keys: how its family names and fixes keys.
        given: the section that the weights were imported with, for token ids, context length and the like.
        tied: whether the embedding is the vocabulary projection too.
        mrope: keys of rope_parameters beside theta and kind, if tokens have several positions.
    """
    rows, values, theta = language.vocab_size, asdict(language), language.rope_theta
    scaling = {"type": "mrope", "rope_type": "default", **mrope} if mrope else None
    return {
        **{key: given.get(key, token if token < rows else None) for key, token in SPECIAL_TOKENS.items()},
        "attention_dropout": given.get("attention_dropout", 0.0),
        "hidden_act": "silu",
        "initializer_range": given.get("initializer_range", 0.02),
        "max_position_embeddings": given.get("max_position_embeddings", 32768),
        "max_window_layers": language.num_layers,
        **{key: values[name] for name, (key, _) in keys.sizes.items()},
        **({} if keys.head_size is None else {"head_dim": language.head_channels}),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default", **mrope},
        "rope_scaling": scaling,
        "rope_theta": theta,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_cache": given.get("use_cache", True),
        "use_sliding_window": False,
    }

"""The record of a Qwen-VL family, made of what it has of its own."""

from dataclasses import fields
from functools import partial
from math import isqrt

from megatron_llave.config.model import ModelConfig, VisionConfig
from megatron_llave.errors import require
from megatron_llave.models.family import Family
from megatron_llave.models.hf.weights import HfFormat
from megatron_llave.models.qwen_vl.cost import QwenVlCost
from megatron_llave.models.qwen_vl.embedder import QwenVlEmbedder
from megatron_llave.models.qwen_vl.hf_keys import HfKeys
from megatron_llave.models.qwen_vl.processor import QwenVlInputs
from megatron_llave.models.qwen_vl.resize import MERGED


def qwen_vl_family(embedder: type[QwenVlEmbedder], inputs: QwenVlInputs, keys: HfKeys, hf: HfFormat) -> Family:
    """Return the record of the family with these keys of config.json."""
    return Family(
        name=keys.layout,
        embedder=embedder,
        build_processor=inputs.build_processor,
        image_lengths=inputs.image_lengths,
        video_lengths=inputs.video_lengths,
        count_tokens=inputs.count_tokens,
        input_settings=inputs.input_settings,
        describe=inputs.describe,
        prompts=inputs.prompts,
        hf=hf,
        check=partial(check_model, keys=keys),
        cost=QwenVlCost(embedder, inputs.has_time_stamps),
    )


def check_model(model: ModelConfig, keys: HfKeys) -> None:
    """Raise a ConfigError for sizes that the vision encoder or the decoder cannot have."""
    vision, language = model.vision, model.language
    for f in fields(VisionConfig):
        is_default = getattr(vision, f.name) == getattr(VisionConfig(), f.name)
        what = f"model.vision.{f.name}={getattr(vision, f.name)}"
        require(is_default or f.name in {*keys.vision, *keys.layer_lists}, f"{what}: a model of {keys.layout} has none")
    grids = f"model.image_grids={model.image_grids}"
    require(not model.image_grids, f"{grids}: images of {keys.layout} keep their shape and are not cut into tiles")
    for name in keys.vision:
        ok = getattr(vision, name) > 0
        require(ok, f"model.vision.{name}={getattr(vision, name)} must be positive; set it or choose model.preset")
    head = vision.hidden_size // max(1, vision.num_heads)
    sizes = f"model.vision.hidden_size={vision.hidden_size} / model.vision.num_heads={vision.num_heads}"
    require(head % 4 == 0, f"{sizes} must be a multiple of 4, as rotary embeddings turn pairs of channels on two axes")
    require(len(language.mrope_section) == 3, "model.language.mrope_section=[] must be three numbers")
    side, block = isqrt(vision.num_positions), MERGED * vision.patch_size
    require(side**2 == vision.num_positions, f"model.vision.num_positions={vision.num_positions} must be a square")
    window = f"model.vision.window_size={vision.window_size}"
    require(vision.window_size % block == 0, f"{window} must be a multiple of {block}, two patches")
    for key in ("full_attention_layers", "deepstack_layers"):
        layers = getattr(vision, key)
        ok = layers == sorted(set(layers)) and all(0 <= layer < vision.num_layers for layer in layers)
        right = f"rising numbers from 0 to {vision.num_layers - 1}, of layers of the vision encoder"
        require(ok, f"model.vision.{key}={layers} must be {right}")
    number = len(vision.deepstack_layers)
    least = f"model.language.num_layers={language.num_layers} must be at least {number}"
    require(number <= language.num_layers, f"{least}, the number of model.vision.deepstack_layers")

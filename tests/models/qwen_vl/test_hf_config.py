"""config.json of the Qwen-VL families, older and newer, against transformers' own reading, and back."""

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.convert.hf import check_preset
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.models.hf.config_json import HfConfig, read_config_json
from megatron_llave.models.qwen_vl.hf_config import build_config_json, layout_of, read_config
from megatron_llave.models.qwen_vl.hf_keys import SPECIAL_TOKENS, HfKeys

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_vl"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KEYS: dict[str, HfKeys] = {name: import_module(f"megatron_llave.models.{name}.hf_keys").KEYS for name in FAMILIES}
CONFIGS = {
    "qwen2_vl": transformers.Qwen2VLConfig,
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig,
    "qwen3_vl": transformers.Qwen3VLConfig,
}
MISSING = object()


def changed(family: str, change: dict[str, Any]) -> dict:
    """The tiny folder's config.json with some keys, dotted, set or taken out."""
    values = json.loads((GOLDEN / family / "config.json").read_text())
    for path, value in change.items():
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section.pop(key, None)
        if value is not MISSING:
            section[key] = copy.deepcopy(value)
    return values


def older(family: str) -> dict:
    """The tiny folder's config.json flat and with rope_scaling, as the released Qwen2-VL has it."""
    values = changed(family, {})
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "model_type": family}
    return text | values | {"torch_dtype": values.pop("dtype")}


def read(folder: Path, family: str, values: dict) -> HfConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return read_config(read_config_json(folder), KEYS[family])


def assert_same_as_transformers(model: ModelConfig, theirs: transformers.PretrainedConfig) -> None:
    text, vision = theirs.text_config.to_dict(), theirs.vision_config.to_dict()
    keys, language = KEYS[theirs.model_type], model.language
    assert {key: text[key] for key, _ in keys.decoder.sizes.values()} == {
        key: getattr(language, name) for name, (key, _) in keys.decoder.sizes.items()
    }
    assert language.rope_theta == text["rope_parameters"]["rope_theta"]
    assert language.mrope_section == text["rope_parameters"].get("mrope_section", list(keys.mrope_section))
    assert language.head_channels == text.get("head_dim", language.hidden_size // language.num_heads)
    sizes = {name: vision[key] for name, (key, _) in keys.vision.items()}
    if "mlp_ratio" in vision:
        sizes["ffn_hidden_size"] *= sizes["hidden_size"]
    lists = {name: list(vision[key]) for name, (key, _) in keys.layer_lists.items()}
    assert model.vision == VisionConfig(**sizes, **lists) and vision[keys.output[0]] == language.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_is_what_transformers_takes_for_it(family: str) -> None:
    keys, theirs = KEYS[family], CONFIGS[family]()
    text, vision = theirs.text_config.to_dict(), theirs.vision_config.to_dict()
    assert {key: text[key] for key, _ in keys.decoder.sizes.values()} == dict(keys.decoder.sizes.values())
    fixed = {key: default for key, (default, _) in keys.decoder.fixed.items() if key != "partial_rotary_factor"}
    assert {key: text[key] for key in fixed} == fixed
    assert text.get("max_window_layers", keys.decoder.window_layers) == keys.decoder.window_layers
    assert keys.decoder.rope_theta in (None, text["rope_parameters"]["rope_theta"])
    assert text.get("head_dim") == keys.decoder.head_size
    assert {key: vision[key] for key, _ in keys.vision.values()} == dict(keys.vision.values())
    assert {key: vision[key] for key in keys.vision_fixed} == {
        k: default for k, (default, _) in keys.vision_fixed.items()
    }
    assert vision[keys.output[0]] == keys.output[1]
    assert all(list(vision[key]) == list(default) for key, default in keys.layer_lists.values())
    assert {key: getattr(theirs, key) for key in SPECIAL_TOKENS} == {k: v for k, (_, v) in SPECIAL_TOKENS.items()}
    classes = [transformers, keys.architecture, keys.base]
    assert all(hasattr(classes[0], name) for name in classes[1:]) and theirs.tie_word_embeddings is False


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_folder(family: str, tmp_path: Path) -> None:
    config = read(tmp_path, family, changed(family, {}))
    width = {"qwen2_vl": 144}.get(family, 100)
    of_family = {
        "qwen2_vl": VisionConfig(48, 3, 4, width),
        "qwen2_5_vl": VisionConfig(48, 4, 4, width, window_size=56, full_attention_layers=[1, 3], tokens_per_second=4),
        "qwen3_vl": VisionConfig(48, 4, 4, width, patch_size=16, num_positions=64, deepstack_layers=[0, 1, 2]),
    }
    theta, section = (5e6, [4, 2, 2]) if family == "qwen3_vl" else (1e6, [2, 3, 3])
    assert config.model.vision == of_family[family] and config.model.family == config.layout == family
    assert config.model.language == LanguageConfig(64, 4, 4, 2, 160, 512, theta, 1e-6, mrope_section=section)
    assert (config.tied, config.dtype, config.vision_layers) == (False, "float32", of_family[family].num_layers)
    assert layout_of(config.raw, KEYS[family]) == family and layout_of({"model_type": "qwen2"}, KEYS[family]) is None


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_older_folders_have_the_keys_of_the_decoder_at_the_top_level(family: str, tmp_path: Path) -> None:
    config = read(tmp_path, family, older(family))
    assert (config.model, config.dtype) == (read(tmp_path, family, changed(family, {})).model, "float32")
    assert_same_as_transformers(config.model, CONFIGS[family].from_dict(older(family)))
    assert read(tmp_path, family, older(family) | {"tie_word_embeddings": True}).tied


READ = [
    ({"text_config.rope_parameters.rope_theta": 5e5}, {"rope_theta": 5e5}),
    ({"text_config.rope_parameters.rope_theta": MISSING, "text_config.rope_theta": 500000}, {"rope_theta": 5e5}),
    ({"text_config.num_key_value_heads": None}, {"num_kv_heads": 4}),
    ({"text_config.rms_norm_eps": 1e-5}, {"norm_epsilon": 1e-5}),
    ({"vision_config.rope_parameters": MISSING}, {}),
    ({"vision_config.patch_size": MISSING}, {}),
    ({"text_config.tie_word_embeddings": True}, {}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("change", "differs"), READ)
def test_variants_are_read_as_by_transformers(family: str, change: dict, differs: dict, tmp_path: Path) -> None:
    values = changed(family, change)
    config, plain = read(tmp_path, family, values), read(tmp_path, family, changed(family, {}))
    assert {key: getattr(config.model.language, key) for key in differs} == differs
    assert config.model != plain.model or not differs
    theirs = CONFIGS[family].from_dict(values)
    assert_same_as_transformers(config.model, theirs)
    assert config.tied == ("text_config.tie_word_embeddings" in change)


REFUSED = [
    (FAMILIES, {"vision_config.spatial_merge_size": 3}, "vision_config.spatial_merge_size=3 .* must be 2"),
    (FAMILIES, {"vision_config.temporal_patch_size": 1}, "vision_config.temporal_patch_size=1 .* must be 2"),
    (FAMILIES, {"vision_config.hidden_act": "relu"}, "vision_config.hidden_act='relu'"),
    (FAMILIES, {"vision_config.in_channels": 4}, "vision_config.in_channels=4 .* must be 3"),
    (FAMILIES, {"vision_config.rope_parameters.rope_theta": 5e5}, "vision_config.rope_parameters.rope_theta"),
    (FAMILIES, {"vision_config.model_type": "siglip"}, "vision_config.model_type='siglip'"),
    (FAMILIES, {"vision_config.depth": 501}, "vision_config.depth=501 .* at most 500"),
    (FAMILIES, {"vision_config.num_heads": 0}, "vision_config.num_heads=0"),
    (FAMILIES, {"vision_config.num_heads": 8}, "vision_config.num_heads=8 .* multiples of 4 in each head"),
    (FAMILIES, {"text_config.hidden_act": "gelu"}, "text_config.hidden_act='gelu' .* must be 'silu'"),
    (FAMILIES, {"text_config.layer_types": ["sliding_attention"] * 4}, "text_config.layer_types"),
    (FAMILIES, {"text_config.model_type": "qwen3_vl_moe_text"}, "text_config.model_type='qwen3_vl_moe_text'"),
    (FAMILIES, {"text_config.rope_parameters.rope_type": "yarn"}, "text_config.rope_parameters=.* default or mrope"),
    (FAMILIES, {"text_config.rope_scaling": {"type": "linear"}}, "text_config.rope_scaling"),
    (FAMILIES, {"text_config.rope_parameters.mrope_section": [8, 0, 0]}, "mrope_section=.* whose sum .* 8"),
    (FAMILIES, {"text_config.rope_parameters.mrope_section": [2, 2, 2]}, "mrope_section=.* whose sum .* 8"),
    (FAMILIES, {"quantization_config": {"quant_method": "awq"}}, "quantization_config=.* must be None"),
    (FAMILIES, {"image_token_id": 512}, "image_token_id=512 .* below vocab_size=512"),
    (FAMILIES, {"vision_end_token_id": MISSING}, r"vision_end_token_id=\(missing\)"),
    (FAMILIES, {"text_config": "large"}, "text_config='large'"),
    (
        FAMILIES[:1],
        {"vision_config.hidden_size": 48},
        "vision_config.hidden_size=48 .* 64, the hidden_size of the decoder",
    ),
    (FAMILIES[:2], {"text_config.head_dim": 32}, "text_config.head_dim=32"),
    (FAMILIES[:2], {"text_config.rope_parameters.mrope_interleaved": True}, "mrope_interleaved=True .* must be false"),
    (
        FAMILIES[:2],
        {"text_config.use_sliding_window": True, "text_config.layer_types": None, "text_config.max_window_layers": 3}
        | {"text_config.sliding_window": 128},
        "text_config.use_sliding_window=True",
    ),
    (FAMILIES[1:], {"vision_config.out_hidden_size": 32}, "vision_config.out_hidden_size=32"),
    (FAMILIES[1:2], {"vision_config.window_size": 60}, "vision_config.window_size=60 .* a multiple of two patches, 28"),
    (FAMILIES[1:2], {"vision_config.fullatt_block_indexes": [1, 4]}, "fullatt_block_indexes=.* from 0 to 3"),
    (FAMILIES[2:], {"vision_config.deepstack_visual_indexes": [2, 1]}, "deepstack_visual_indexes=.* rising"),
    (FAMILIES[2:], {"vision_config.num_position_embeddings": 63}, "num_position_embeddings=63 .* square"),
    (FAMILIES[2:], {"text_config.attention_bias": True}, "text_config.attention_bias=True .* must be False"),
    (FAMILIES[2:], {"text_config.rope_parameters.mrope_interleaved": False}, "mrope_interleaved=False .* must be true"),
    (FAMILIES[2:], {"text_config.rope_parameters.rope_theta": MISSING}, r"rope_theta=\(missing\)"),
]


@pytest.mark.parametrize(
    ("family", "change", "message"), [(family, change, words) for many, change, words in REFUSED for family in many]
)
def test_what_we_cannot_run_is_refused(family: str, change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}") as error:
        read(tmp_path, family, changed(family, change))
    assert "\n" not in str(error.value)


def test_heads_of_qwen3_may_be_wider_than_their_share(tmp_path: Path) -> None:
    wide = {"text_config.head_dim": 32, "text_config.rope_parameters.mrope_section": [8, 4, 4]}
    values = changed("qwen3_vl", wide)
    model = read(tmp_path, "qwen3_vl", values).model
    assert (model.language.head_size, model.language.head_channels) == (32, 32)
    assert_same_as_transformers(model, CONFIGS["qwen3_vl"].from_dict(values))
    made = build_config_json(model, "qwen3_vl", True, None, None, KEYS["qwen3_vl"])
    assert read(tmp_path, "qwen3_vl", made).model == model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read_back_and_by_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    model = read(tmp_path, family, changed(family, {})).model
    made = build_config_json(model, family, tied, "bfloat16", None, KEYS[family])
    back, theirs = read(tmp_path, family, made), CONFIGS[family].from_dict(made)
    assert (back.model, back.tied, back.dtype) == (model, tied, "bfloat16")
    assert_same_as_transformers(model, theirs)
    assert theirs.tie_word_embeddings is tied and str(theirs.dtype).endswith("bfloat16")
    # As transformers 4.57 looks for it.
    text = made["text_config"]
    assert text["rope_theta"] == model.language.rope_theta and text["tie_word_embeddings"] is tied
    assert text["rope_scaling"]["mrope_section"] == model.language.mrope_section
    large = copy.deepcopy(model)
    large.language.vocab_size = 151936
    made = build_config_json(large, family, tied, None, None, KEYS[family])
    assert {key: made[key] for key in SPECIAL_TOKENS} == {key: default for key, (_, default) in SPECIAL_TOKENS.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_the_source_stay(family: str, tmp_path: Path) -> None:
    sources = [changed(family, {"extra": 1, "text_config.more": [2]})]
    sources += [older(family) | {"extra": 1}] if KEYS[family].may_be_flat else []
    for raw in sources:
        source = read(tmp_path, family, raw)
        made = build_config_json(source.model, family, False, None, source, KEYS[family])
        text, theirs = made.get("text_config") or made, raw.get("text_config") or raw
        scaling = text["rope_scaling"]
        assert {key: made[key] for key in raw.keys() - {"text_config", "rope_scaling"}} == {
            key: raw[key] for key in raw.keys() - {"text_config", "rope_scaling"}
        }
        assert {k: v for k, v in text.items() if k in theirs and k != "rope_scaling"} == {
            k: v for k, v in theirs.items() if k != "rope_scaling"
        }
        assert scaling["mrope_section"] == source.model.language.mrope_section
        assert text["rope_theta"] == source.model.language.rope_theta and source.raw == raw
        assert_same_as_transformers(source.model, CONFIGS[family].from_dict(made))
        made = build_config_json(source.model, family, True, "bfloat16", source, KEYS[family])
        again = read(tmp_path, family, made)
        assert (again.model, again.tied, again.dtype) == (source.model, True, "bfloat16")
        other = copy.deepcopy(source.model)
        other.language.num_layers = 3
        with pytest.raises(ConfigError, match=r"model\.language\.num_layers=3 contradicts"):
            build_config_json(other, family, True, None, source, KEYS[family])


def test_a_width_that_no_ratio_gives_has_no_place_in_qwen2_vl(tmp_path: Path) -> None:
    model = read(tmp_path, "qwen2_vl", changed("qwen2_vl", {})).model
    model.vision.ffn_hidden_size = 100
    with pytest.raises(ConfigError, match=r"model\.vision\.ffn_hidden_size=100 has no place in format qwen2_vl"):
        build_config_json(model, "qwen2_vl", True, None, None, KEYS["qwen2_vl"])


@pytest.mark.parametrize("preset", [name for name, sizes in PRESETS.items() if sizes.get("family") in FAMILIES])
def test_presets_are_written_and_read_back(preset: str, tmp_path: Path) -> None:
    sizes = PRESETS[preset]
    family, language = sizes["family"], LanguageConfig(**sizes["language"])
    model = ModelConfig(family=family, vision=VisionConfig(**sizes["vision"]), language=language)
    assert read(tmp_path, family, build_config_json(model, family, True, None, None, KEYS[family])).model == model


# config.json of released folders, without keys that say nothing of the model.
TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
RELEASED = {
    "qwen2_5vl_7b": {
        "model_type": "qwen2_5_vl",
        **TOKENS,
        "vision_token_id": 151654,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    },
    "qwen3vl_4b": {
        "model_type": "qwen3_vl",
        **TOKENS,
        "text_config": {
            "attention_bias": False,
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024,
            "in_channels": 3,
            "intermediate_size": 4096,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
}


@pytest.mark.parametrize("preset", RELEASED)
def test_released_folders_are_the_presets(preset: str, tmp_path: Path) -> None:
    values = RELEASED[preset]
    config = read(tmp_path, values["model_type"], values)
    check_preset(config.model, preset)
    assert (config.tied, config.dtype) == (values["tie_word_embeddings"], "bfloat16")
    assert_same_as_transformers(config.model, CONFIGS[values["model_type"]].from_dict(values))

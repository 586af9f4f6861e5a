"""config.json of both layouts against transformers' own reading, the facts about the released models, and itself."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaOnevisionConfig

from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.convert.hf import check_preset
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.models import read_hf_config
from megatron_llave.models.hf.config_json import HfConfig
from megatron_llave.models.llava_onevision.hf_config import build_config_json

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = {"llava_onevision": GOLDEN / "hf_tiny", "llava_qwen": GOLDEN / "hf_tiny_llava_qwen"}
FACTS = json.loads((GOLDEN / "facts" / "full_size_configs.json").read_text())
MISSING = object()


def read(folder: Path, values: dict) -> HfConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return read_hf_config(folder)


def changed(layout: str, change: dict[str, Any]) -> dict:
    """The tiny folder's config.json with some keys, dotted, set or taken out."""
    values = json.loads((FOLDERS[layout] / "config.json").read_text())
    for path, value in change.items():
        *parents, key = path.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section.pop(key, None)
        if value is not MISSING:
            section[key] = copy.deepcopy(value)
    return values


def released(name: str, pinpoints: Any) -> dict:
    """config.json of a released model, as far as the facts go: the keys of its 7b relative with its own sizes."""
    facts = FACTS["models"][name]
    sizes = {
        "hidden_size": facts["hidden_size"],
        "num_hidden_layers": facts["num_layers"],
        "num_attention_heads": facts["num_attention_heads"],
        "num_key_value_heads": facts["num_key_value_heads"],
        "intermediate_size": facts["ffn_hidden_size"],
        "vocab_size": facts["vocab_size_base"],
        "rope_theta": facts["rope_theta"],
        "rms_norm_eps": facts["rms_norm_eps"],
        "tie_word_embeddings": facts["tie_word_embeddings"],
        "image_grid_pinpoints": pinpoints,
    }
    return FACTS["lmms_lab_llava_onevision_qwen2_7b_ov_config_json_keys"] | sizes


def preset_model(preset: str) -> ModelConfig:
    sizes = PRESETS[preset]
    vision, language = VisionConfig(**sizes["vision"]), LanguageConfig(**sizes["language"])
    return ModelConfig(vision=vision, language=language, image_grids=sizes["image_grids"])


def test_tiny_folders_are_one_model_with_their_own_order_of_grids() -> None:
    found = {layout: read_hf_config(folder) for layout, folder in FOLDERS.items()}
    onevision, qwen = found["llava_onevision"], found["llava_qwen"]
    assert (onevision.layout, qwen.layout) == tuple(FOLDERS)
    assert onevision.model.vision == qwen.model.vision == VisionConfig(48, 3, 4, 96, 56, 14)
    assert onevision.model.language == qwen.model.language == LanguageConfig(64, 4, 4, 2, 128, 512)
    # The same list of pixels is height first in one layout and width first in the other.
    assert onevision.model.image_grids == [[1, 1], [2, 1], [1, 2], [2, 2]]
    assert qwen.model.image_grids == [[1, 1], [1, 2], [2, 1], [2, 2]]
    for config in found.values():
        assert (config.tied, config.dtype, config.vision_layers) == (False, "float32", 3)
        assert config.model.anyres_max_tiles == 9


@pytest.mark.parametrize(("preset", "name"), [("0.5b", "LLaVE-0.5B"), ("2b", "LLaVE-2B"), ("7b", "LLaVE-7B")])
@pytest.mark.parametrize("pinpoints", ["(1x1),...,(2x2)", "[(384, 384), (384, 768), (768, 384), (768, 768)]"])
def test_released_models_are_the_presets(preset: str, name: str, pinpoints: str, tmp_path: Path) -> None:
    config = read(tmp_path, released(name, pinpoints))
    assert config.layout == "llava_qwen"
    assert config.model == preset_model(preset)
    assert (config.tied, config.dtype, config.vision_layers) == (preset != "7b", "bfloat16", 26)
    check_preset(config.model, preset)
    other = build_config_json(config.model, "llava_onevision", config.tied, config.dtype, config)
    assert (other["image_token_index"], other["video_token_index"]) == (151646, 151647)
    again = read(tmp_path, other)
    assert (again.model, again.tied, again.dtype) == (config.model, config.tied, config.dtype)


@pytest.mark.parametrize(("layers", "selected", "used"), [(26, -1, 26), (27, -2, 26), (27, 26, 26), (26, 1, 1)])
def test_layers_of_the_tower_that_are_run(layers: int, selected: int, used: int, tmp_path: Path) -> None:
    change = {"vision_config.num_hidden_layers": layers, "vision_feature_layer": selected}
    config = read(tmp_path, changed("llava_onevision", change))
    assert (config.model.vision.num_layers, config.vision_layers) == (used, layers)
    same = build_config_json(config.model, "llava_onevision", False, None, config)
    assert (same["vision_config"]["num_hidden_layers"], same["vision_feature_layer"]) == (layers, selected)
    other = read(tmp_path, build_config_json(config.model, "llava_qwen", False, None, config))
    assert (other.model.vision.num_layers, other.vision_layers) == (used, used)


ALL_GRIDS = [[columns, rows] for rows in range(1, 7) for columns in range(1, 7)]


@pytest.mark.parametrize(
    ("layout", "change", "field", "expected"),
    [
        ("llava_onevision", {"image_grid_pinpoints": MISSING, "vision_config": None}, "image_grids", ALL_GRIDS),
        ("llava_onevision", {"vision_aspect_ratio": MISSING}, "anyres_max_tiles", 9),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_12"}, "anyres_max_tiles", 12),
        ("llava_qwen", {"image_aspect_ratio": "anyres"}, "anyres_max_tiles", None),
        ("llava_qwen", {"image_aspect_ratio": "square"}, "image_grids", []),
        ("llava_qwen", {"image_grid_pinpoints": [[112, 56], [56, 112]]}, "image_grids", [[2, 1], [1, 2]]),
        ("llava_qwen", {"image_grid_pinpoints": "(1x1),...,(3x1)"}, "image_grids", [[1, 1], [2, 1], [3, 1]]),
        ("llava_onevision", {"image_grid_pinpoints": [[112, 56], [56, 112]]}, "image_grids", [[1, 2], [2, 1]]),
    ],
)
def test_pictures(layout: str, change: dict, field: str, expected: Any, tmp_path: Path) -> None:
    config = read(tmp_path, changed(layout, change))
    assert getattr(config.model, field) == expected
    again = read(tmp_path, build_config_json(config.model, layout, False, None, None))
    assert again.model == config.model


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_parameters": MISSING, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": None, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5}, {"rope_theta": 1e6}),  # rope_parameters stay and win
        ({"rope_theta": 500000}, {"rope_theta": 1e6}),  # also over a whole number
        ({"rope_parameters": MISSING, "rope_theta": 500000}, {"rope_theta": 5e5}),
        ({"rope_parameters": MISSING}, {"rope_theta": 1e4}),
        ({"rope_parameters.rope_theta": MISSING, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"use_sliding_window": True, "sliding_window": 64}, {"num_layers": 4}),  # all layers below max_window_layers
        ({"vocab_size": MISSING, "rms_norm_eps": 1e-5}, {"vocab_size": 151936, "norm_epsilon": 1e-5}),
    ],
)
def test_decoder_is_read_as_transformers_reads_it(change: dict, expected: dict, tmp_path: Path) -> None:
    values = changed("llava_onevision", {f"text_config.{key}": value for key, value in change.items()})
    values["text_config"].pop("layer_types")
    language = read(tmp_path, values).model.language
    theirs = LlavaOnevisionConfig.from_pretrained(tmp_path).text_config
    assert {key: getattr(language, key) for key in expected} == expected
    assert language.rope_theta == theirs.rope_parameters["rope_theta"]
    assert language.num_kv_heads == theirs.num_key_value_heads
    assert language.vocab_size == theirs.vocab_size
    assert language.norm_epsilon == theirs.rms_norm_eps


@pytest.mark.parametrize("top", [False, True, MISSING])
@pytest.mark.parametrize("text", [False, True, MISSING])
def test_tied_as_transformers_reads_it(top: Any, text: Any, tmp_path: Path) -> None:
    change = {"tie_word_embeddings": top, "text_config.tie_word_embeddings": text}
    config = read(tmp_path, changed("llava_onevision", change))
    assert config.tied == LlavaOnevisionConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert (
        build_config_json(config.model, "llava_onevision", config.tied, None, config)["text_config"].get(
            "tie_word_embeddings", MISSING
        )
        is text
    )
    for tied in (False, True):
        assert read(tmp_path, build_config_json(config.model, config.layout, tied, None, config)).tied == tied


@pytest.mark.parametrize("layout", FOLDERS)
def test_same_layout_gives_the_file_back(layout: str) -> None:
    config = read_hf_config(FOLDERS[layout])
    given = copy.deepcopy(config.raw)
    made = build_config_json(config.model, layout, config.tied, config.dtype, config)
    assert config.raw == given, "the source must stay as it is"
    if layout == "llava_onevision":  # written by transformers 5.x, whose place for it 4.x does not know
        assert made["text_config"].pop("rope_theta") == 1e6
    assert made == given


@pytest.mark.parametrize("layout", FOLDERS)
def test_same_layout_changes_what_is_asked_for(layout: str, tmp_path: Path) -> None:
    config = read_hf_config(FOLDERS[layout])
    model = copy.deepcopy(config.model)
    model.language.vocab_size, model.image_grids, model.anyres_max_tiles = 500, [[2, 1], [1, 1]], 4
    again = read(tmp_path, build_config_json(model, layout, True, "bfloat16", config))
    assert (again.model, again.tied, again.dtype) == (model, True, "bfloat16")
    differs = {key for key in config.raw if again.raw[key] != config.raw[key]}
    common = {"image_grid_pinpoints", "tie_word_embeddings"}
    if layout == "llava_qwen":
        assert differs == common | {"image_aspect_ratio", "vocab_size", "torch_dtype"}
    else:
        ids = {"image_token_index", "video_token_index"}
        assert differs == common | ids | {"vision_aspect_ratio", "text_config", "dtype"}
        assert (again.raw["image_token_index"], again.raw["video_token_index"]) == (499, 498)


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.parametrize("target", FOLDERS)
@pytest.mark.parametrize("with_source", [False, True])
def test_round_trip(layout: str, target: str, with_source: bool, tmp_path: Path) -> None:
    config = read_hf_config(FOLDERS[layout])
    made = build_config_json(config.model, target, True, "bfloat16", config if with_source else None)
    again = read(tmp_path, made)
    assert (again.layout, again.model, again.tied, again.dtype) == (target, config.model, True, "bfloat16")
    assert again.vision_layers == config.vision_layers


@pytest.mark.parametrize("source", [None, *FOLDERS])
def test_transformers_reads_what_is_built(source: str | None, tmp_path: Path) -> None:
    config = read_hf_config(FOLDERS[source or "llava_qwen"])
    model = config.model
    made = build_config_json(model, "llava_onevision", True, "bfloat16", config if source else None)
    read(tmp_path, made)
    theirs = LlavaOnevisionConfig.from_pretrained(tmp_path)
    text, vision = theirs.text_config, theirs.vision_config
    assert (text.model_type, vision.model_type) == ("qwen2", "siglip_vision_model")
    assert (
        LanguageConfig(
            *(text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads),
            *(text.intermediate_size, text.vocab_size, text.rope_parameters["rope_theta"], text.rms_norm_eps),
        )
        == model.language
    )
    assert (
        VisionConfig(
            *(vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads),
            *(vision.intermediate_size, vision.image_size, vision.patch_size),
        )
        == model.vision
    )
    assert theirs.image_grid_pinpoints == [[rows * 56, columns * 56] for columns, rows in model.image_grids]
    assert (theirs.vision_aspect_ratio, theirs.vision_feature_layer) == ("anyres_max_9", -1)
    assert theirs.vision_feature_select_strategy == "full"
    assert theirs.tie_word_embeddings and text.tie_word_embeddings
    assert str(theirs.dtype) == "torch.bfloat16"
    # What 4.x looks for, which this version is not.
    assert made["text_config"]["rope_theta"] == model.language.rope_theta
    assert made["torch_dtype"] == "bfloat16"
    ids = (511, 510)  # the source's, and the last two rows
    assert (theirs.image_token_index, theirs.video_token_index) == ids
    special = (text.bos_token_id, text.eos_token_id, text.pad_token_id)
    assert special == ((501, 502, 500) if source else (None, None, None))


def test_llava_qwen_has_every_key_of_the_released_files(tmp_path: Path) -> None:
    made = build_config_json(preset_model("7b"), "llava_qwen", False, "bfloat16")
    expected = FACTS["lmms_lab_llava_onevision_qwen2_7b_ov_config_json_keys"]
    assert expected.keys() - made.keys() == {"transformers_version"}
    differs = {key for key in expected.keys() & made.keys() if made[key] != expected[key]}
    assert differs == {"image_grid_pinpoints", "model_type", "mm_vision_tower_lr", "sliding_window"}
    assert "vision_config" not in made
    assert {"alpha", "logit_scale"} < made.keys()
    assert read(tmp_path, made).model == preset_model("7b")


def test_no_interpolation_survives_in_transformers(tmp_path: Path) -> None:
    model = preset_model("0.5b")
    model.anyres_max_tiles = None
    made = build_config_json(model, "llava_onevision", True, None)
    assert made["vision_aspect_ratio"] == "anyres_max_4"  # 4 tiles are never more than 1.21 times 4
    assert not {"dtype", "torch_dtype"} & made.keys()


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        (
            "llava_onevision",
            {"model_type": "llava_next"},
            ["model_type='llava_next'", "llava_onevision or llava or llava_qwen"],
        ),
        (
            "llava_qwen",
            {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
            ["model_type='llava' is not supported; it must be llava_onevision or llava_qwen or"],
        ),
        ("llava_onevision", {"text_config.model_type": "llama"}, ["text_config.model_type='llama'", "'qwen2'"]),
        ("llava_onevision", {"text_config": [1]}, ["text_config=[1]", "object"]),
        ("llava_onevision", {"text_config.hidden_act": "gelu"}, ["text_config.hidden_act='gelu'", "'silu'"]),
        ("llava_onevision", {"text_config.hidden_size": "64"}, ["text_config.hidden_size='64'", "whole number"]),
        ("llava_onevision", {"text_config.head_dim": 32}, ["text_config.head_dim=32", "= 16"]),
        ("llava_onevision", {"text_config.rope_scaling": {"type": "yarn"}}, ["text_config.rope_scaling", "null"]),
        ("llava_onevision", {"text_config.rope_parameters.rope_type": "linear"}, ["text_config.rope_parameters"]),
        (
            "llava_qwen",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            ["use_sliding_window=True", "whole sequence"],
        ),
        (
            "llava_onevision",
            {
                "text_config.use_sliding_window": True,
                "text_config.sliding_window": 64,
                "text_config.layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            ["text_config.use_sliding_window=True"],
        ),
        ("llava_onevision", {"vision_config.model_type": "clip_vision_model"}, ["vision_config.model_type"]),
        ("llava_onevision", {"vision_config.hidden_act": "gelu"}, ["vision_config.hidden_act='gelu'"]),
        ("llava_onevision", {"vision_config.image_size": [56, 56]}, ["vision_config.image_size=[56, 56]"]),
        ("llava_onevision", {"vision_feature_layer": [-1, -2]}, ["vision_feature_layer=[-1, -2]", "one layer"]),
        ("llava_onevision", {"vision_feature_layer": -4}, ["vision_feature_layer=-4", "-3 to -1, or 1 to 3"]),
        ("llava_onevision", {"vision_feature_layer": 0}, ["vision_feature_layer=0"]),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, ["select_strategy='default'", "'full'"]),
        ("llava_onevision", {"projector_hidden_act": "relu"}, ["projector_hidden_act='relu'", "'gelu'"]),
        ("llava_onevision", {"multimodal_projector_bias": False}, ["multimodal_projector_bias=False"]),
        ("llava_onevision", {"vision_aspect_ratio": "anyres"}, ["vision_aspect_ratio='anyres'", "anyres_max_N"]),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_0"}, ["vision_aspect_ratio='anyres_max_0'"]),
        ("llava_onevision", {"image_grid_pinpoints": [[56, 60]]}, ["image_grid_pinpoints=[[56, 60]]", "56 pixels"]),
        ("llava_onevision", {"image_grid_pinpoints": []}, ["image_grid_pinpoints=[]", "pairs"]),
        ("llava_onevision", {"image_grid_pinpoints": None}, ["image_grid_pinpoints=None", "56 pixels"]),
        ("llava_onevision", {"dtype": "float8"}, ["dtype='float8'", "bfloat16"]),
        ("llava_qwen", {"mm_projector_type": "linear"}, ["mm_projector_type='linear'", "'mlp2x_gelu'"]),
        ("llava_qwen", {"mm_projector_type": MISSING}, ["mm_projector_type=(missing)", "'mlp2x_gelu'"]),
        ("llava_qwen", {"mm_patch_merge_type": "spatial"}, ["mm_patch_merge_type='spatial'", "'spatial_unpad'"]),
        ("llava_qwen", {"mm_resampler_type": "qformer"}, ["mm_resampler_type='qformer'", "None"]),
        ("llava_qwen", {"mm_use_im_start_end": True}, ["mm_use_im_start_end=True", "False"]),
        ("llava_qwen", {"mm_hidden_size": 1152}, ["mm_hidden_size=1152", "48"]),
        ("llava_qwen", {"vision_config": MISSING}, ["mm_vision_tower='tiny-siglip-patch14-56'", "so400m"]),
        ("llava_qwen", {"image_aspect_ratio": "pad"}, ["image_aspect_ratio='pad'", "square"]),
        ("llava_qwen", {"image_aspect_ratio": "anyres_max"}, ["image_aspect_ratio='anyres_max'"]),
        ("llava_qwen", {"image_grid_pinpoints": "1x2"}, ["image_grid_pinpoints='1x2'", "range"]),
        ("llava_qwen", {"image_grid_pinpoints": "[(56,"}, ["image_grid_pinpoints='[(56,'", "list of pairs"]),
        ("llava_qwen", {"image_grid_pinpoints": MISSING}, ["image_grid_pinpoints=(missing)"]),
        ("llava_qwen", {"vocab_size": True}, ["vocab_size=True"]),
        ("llava_onevision", {"text_config.attention_bias": False}, ["text_config.attention_bias=False", "True"]),
        ("llava_onevision", {"text_config.attention_dropout": 0.1}, ["text_config.attention_dropout=0.1"]),
        ("llava_onevision", {"text_config.layer_types": ["sliding_attention"] * 9}, ["layer_types", "full_attention"]),
        ("llava_onevision", {"text_config.is_causal": False}, ["text_config.is_causal=False"]),
        ("llava_onevision", {"text_config.mlp_bias": True}, ["text_config.mlp_bias=True"]),
        ("llava_qwen", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ("llava_onevision", {"vision_config.attention_dropout": 0.1}, ["vision_config.attention_dropout=0.1"]),
        ("llava_onevision", {"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}", "None"]),
        ("llava_onevision", {"use_image_newline_parameter": False}, ["use_image_newline_parameter=False"]),
        ("llava_qwen", {"mm_spatial_pool_mode": "max"}, ["mm_spatial_pool_mode='max'", "'bilinear'"]),
        ("llava_qwen", {"add_faster_video": True}, ["add_faster_video=True"]),
        ("llava_qwen", {"image_grid_pinpoints": "(1x1),...,(9999x9999)"}, ["image_grid_pinpoints", "at most 1024"]),
        ("llava_qwen", {"image_grid_pinpoints": "(1x1),...,(99999x99999)"}, ["image_grid_pinpoints", "at most 1024"]),
        ("llava_qwen", {"image_grid_pinpoints": [[5600, 5600]]}, ["image_grid_pinpoints", "at most 1024 tiles"]),
        ("llava_onevision", {"image_grid_pinpoints": [[56, 56]] * 1025}, ["at most 1024 pairs"]),
        ("llava_qwen", {"image_grid_pinpoints": "[" * 3999}, ["image_grid_pinpoints", "list of pairs"]),
        ("llava_onevision", {"text_config.num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000", "at most 500"]),
        ("llava_qwen", {"hidden_size": 2**62}, ["hidden_size=4611686018427387904", "at most 16777216"]),
        ("llava_onevision", {"vision_config.image_size": 56 * 10**6}, ["image_size=56000000", "at most 4096"]),
        (
            "llava_onevision",
            {"text_config.rms_norm_eps": float("inf")},
            ["config.json", "Infinity is no finite number"],
        ),
    ],
)
def test_what_we_cannot_run_is_refused(layout: str, change: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, changed(layout, change))
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "a Hugging Face folder has one"),
        ("{", "not valid JSON"),
        ("[]", "a list"),
        ("[" * 100_000, "nested deeper"),
        ('{"hidden_size": 1' + "0" * 400 + "}", "more than 64 bits"),
    ],
)
def test_damaged_file(content: str | None, word: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=word) as caught:
        read_hf_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_check_preset() -> None:
    found = preset_model("2b")
    found.language.vocab_size, found.image_grids = 152000, []
    check_preset(found, "2b")
    found.language.rope_theta = 1e4
    for preset, words in {
        "2b": r"model\.language\.rope_theta=1000000\.0 contradicts config\.json, where it is 10000\.0",
        "7b": r"model\.language\.hidden_size=3584 contradicts config\.json, where it is 1536",
        "tiny": "preset='tiny' is not one of 0.5b, 2b, 7b",
    }.items():
        with pytest.raises(ConfigError, match=words):
            check_preset(found, preset)


def test_what_cannot_be_built() -> None:
    model = preset_model("0.5b")
    with pytest.raises(ConfigError, match="model.vision.hidden_size=1152 contradicts the folder"):
        build_config_json(model, "llava_qwen", True, None, read_hf_config(FOLDERS["llava_qwen"]))
    with pytest.raises(ConfigError, match="dtype='int8'"):
        build_config_json(model, "llava_qwen", True, "int8")
    with pytest.raises(ConfigError, match="layout='hf'"):
        build_config_json(model, "hf", True, None)
    model.image_grids = []
    assert build_config_json(model, "llava_qwen", True, None)["image_aspect_ratio"] == "square"
    with pytest.raises(ConfigError, match=r"model.image_grids=\[\] has no place in format llava_onevision"):
        build_config_json(model, "llava_onevision", True, None)


def test_the_newline_of_videos_comes_from_the_file(tmp_path):
    assert read_hf_config(FOLDERS["llava_onevision"]).run.data.video_newline == "one_token"
    for newline in ("grid", "no_token"):
        found = read(tmp_path, changed("llava_qwen", {"mm_newline_position": newline}))
        assert found.run.data.video_newline == newline
    with pytest.raises(ConfigError, match="data.video_newline='somewhere' "):
        _ = read(tmp_path, changed("llava_qwen", {"mm_newline_position": "somewhere"})).run

"""Files of a Hugging Face folder that say something other than what is run: each is refused, none is ignored."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import LlavaOnevisionImageProcessorPil

from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.config.model import ModelConfig
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.convert.inspect import inspect
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.models import open_hf, read_hf_config
from megatron_llave.models.hf.side_checks import BICUBIC, STEPS
from megatron_llave.models.hf.side_files import SPECIAL_TOKEN
from megatron_llave.models.llava_onevision import hf_checks, prompt

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGES, PROCESSOR, VIDEOS = "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"
PINPOINTS = json.loads((GOLDEN / "hf_tiny" / "config.json").read_text())["image_grid_pinpoints"]
RIGHT = {
    IMAGES: {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 56, "width": 56},
    },
    PROCESSOR: {
        "image_token": "<image>",
        "num_image_tokens": 16,
        "processor_class": "LlavaOnevisionProcessor",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
        "video_token": "<video>",
    },
    VIDEOS: {"image_mean": [0.5, 0.5, 0.5], "size": {"height": 56, "width": 56}, "do_sample_frames": False},
    "tokenizer.json": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "added_tokens": [
            {**SPECIAL_TOKEN, "id": i, "content": token} for i, token in ((1, "<|im_end|>"), (511, "<image>"))
        ],
    },
    "tokenizer_config.json": {"added_tokens_decoder": {"1": {"content": "<|im_end|>"}}, "padding_side": "left"},
    "added_tokens.json": {"<image>": 511},
    "generation_config.json": {"eos_token_id": 1},
}
NESTED = {"image_processor": RIGHT[IMAGES], "video_processor": RIGHT[VIDEOS]}


def folder(path: Path, layout: str = "hf_tiny", **files: dict) -> Path:
    """A folder with config.json and all other files, some of whose keys are changed; None takes a key out."""
    path.mkdir()
    shutil.copyfile(GOLDEN / layout / "config.json", path / "config.json")
    for name in RIGHT | files:
        values = RIGHT.get(name, {}) | files.get(name, {})
        (path / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.mark.parametrize("layout", ["hf_tiny", "hf_tiny_llava_qwen"])
@pytest.mark.parametrize(
    "files", [{}, {PROCESSOR: NESTED}, {IMAGES: {"image_mean": 0.5, "size": 56, "resample": "bicubic"}}]
)
def test_files_that_agree_are_taken(layout: str, files: dict, tmp_path: Path) -> None:
    assert read_hf_config(folder(tmp_path / "hf", layout, **files)).model.vision.image_size == 56


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (IMAGES, {"image_mean": [0.481, 0.458, 0.408]}),
        (IMAGES, {"image_std": [0.5, 0.5, 0.51]}),
        (IMAGES, {"image_mean": "half"}),
        (IMAGES, {"do_resize": False}),
        (IMAGES, {"do_normalize": False}),
        (IMAGES, {"do_rescale": False}),
        (IMAGES, {"do_pad": False}),
        (IMAGES, {"do_center_crop": True}),
        (IMAGES, {"rescale_factor": 0.0078125}),
        (IMAGES, {"resample": 2}),
        (IMAGES, {"size": {"height": 56, "width": 84}}),
        (IMAGES, {"size": {"shortest_edge": 336}}),
        (IMAGES, {"crop_size": 28}),
        (IMAGES, {"size": [56]}),
        (IMAGES, {"size": {"height": [56], "width": {}}}),
        (VIDEOS, {"image_mean": [0.481, 0.458, 0.408]}),
        (VIDEOS, {"do_rescale": False}),
        (PROCESSOR, {"num_image_tokens": 729}),
        (PROCESSOR, {"image_token": "<|image_pad|>"}),
        (PROCESSOR, {"vision_feature_select_strategy": "default"}),
        (PROCESSOR, {"image_processor": RIGHT[IMAGES] | {"resample": 0}}),
        (PROCESSOR, {"video_processor": RIGHT[VIDEOS] | {"size": {"height": 57, "width": 57}}}),
        (PROCESSOR, {"image_processor": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<extra>"}}}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"split_special_tokens": True}),
        ("adapter_config.json", {"adapter": 1}),
        (
            "tokenizer.json",
            {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}]}},
        ),
        ("tokenizer.json", {"post_processor": {"processors": [{"type": "BertProcessing"}]}}),
        ("vocab.json", {"<|im_end|>": 7}),
        ("added_tokens.json", {"<image>": 510}),
        ("added_tokens.json", {"<image>": float("inf")}),
        ("added_tokens.json", {"<image>": [511]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": ["<|im_end|>"]}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<|im_end|>"}}),
        ("tokenizer.json", {"model": [1]}),
    ],
)
@pytest.mark.parametrize("layout", ["hf_tiny", "hf_tiny_llava_qwen"])
def test_contradictions_are_refused_with_file_and_key(layout: str, name: str, change: dict, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", layout, **{name: change})
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert f"{path / name}" in message or (name.startswith(("tokenizer_c", "added", "vocab")) and name in message)
    assert next(iter(change)).split("_decoder")[0] in message or re.search(
        "must have the id|can(not)? be|no finite", message
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (IMAGES, {"image_processor_type": "CLIPImageProcessor"}),
        (IMAGES, {"image_grid_pinpoints": PINPOINTS[:2]}),
        (IMAGES, {"image_grid_pinpoints": PINPOINTS[::-1]}),
        (IMAGES, {"image_mean": None}),
        (IMAGES, {"image_std": None}),
        (PROCESSOR, {"vision_aspect_ratio": "anyres_max_4"}),
        ("config.json", {"image_token_index": 510}),
    ],
)
def test_what_transformers_would_take_in_its_own_layout(name: str, change: dict, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", **({name: change} if name != "config.json" else {}))
    if name == "config.json":
        values = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match="|".join([*change, "must have the id 510, as config.json says"])):
        read_hf_config(path)


def test_a_missing_key_is_what_transformers_takes_for_it() -> None:
    theirs, missing = LlavaOnevisionImageProcessorPil(), hf_checks.MISSING
    assert list(theirs.image_mean) == missing["image_mean"] and list(theirs.image_std) == missing["image_std"]
    assert all(getattr(theirs, key) == default for key, (default, _) in {**STEPS, "do_pad": (True, True)}.items())
    assert theirs.resample == BICUBIC and theirs.rescale_factor == 1 / 255


def test_every_way_into_a_folder_looks_at_its_files(groups, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", **{IMAGES: {"resample": 2}})
    shutil.copyfile(GOLDEN / "hf_tiny" / "model.safetensors", path / "model.safetensors")
    for way in (find_pretrained, open_hf, lambda path: import_hf(path, tmp_path / "checkpoint", groups)):
        with pytest.raises(CheckpointError, match="preprocessor_config.json: resample=2 is not supported"):
            way(path)
    assert not (tmp_path / "checkpoint").exists()


def test_an_export_writes_what_was_imported(groups, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    shutil.copyfile(GOLDEN / "hf_tiny" / "model.safetensors", path / "model.safetensors")
    export_hf(import_hf(path, tmp_path / "checkpoint", groups), tmp_path / "out", groups)
    for name in (IMAGES, PROCESSOR, VIDEOS):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert {key: written[key] for key in RIGHT[name]} == RIGHT[name]
    assert read_hf_config(tmp_path / "out").model == read_hf_config(path).model


def test_inspect_names_a_chat_template_that_is_not_used(groups, capsys, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", **{"tokenizer_config.json": {"chat_template": "{{ messages }}"}})
    shutil.copyfile(GOLDEN / "hf_tiny" / "model.safetensors", path / "model.safetensors")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": prompt.chat_template("qwen", "")}))
    assert inspect(path, groups) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "chat template" in line]
    assert notes == ["chat template in tokenizer_config.json: not used, since data.prompt is the prompt of embeddings"]


def test_the_prompt_of_an_export_is_followed(tmp_path: Path) -> None:
    template = prompt.chat_template("plain", "<|endoftext|>")
    for name, written, expected in (("a", template, "plain"), ("b", prompt.chat_template("qwen", ""), "qwen")):
        path = folder(tmp_path / name, **{"tokenizer_config.json": {"chat_template": written}})
        assert read_hf_config(path).run.data.prompt == expected


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, None),
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode_mean_tokens": True}, "pooling_mode_mean_tokens=True is not supported; it must be false"),
        ({"pooling_mode": "mean"}, "pooling_mode='mean' is not supported; it must be lasttoken"),
        ({"pooling_mode": ["lasttoken", "cls"]}, r"pooling_mode=\['lasttoken', 'cls'\] is not supported"),
    ],
)
def test_pooling_of_sentence_transformers(pooling: dict, words: str | None, tmp_path: Path) -> None:
    path = folder(tmp_path / "hf")
    (path / "modules.json").write_text("[]")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if words is None:
        read_hf_config(path)
        return
    with pytest.raises(CheckpointError, match=words):
        read_hf_config(path)


def test_grids_are_bounded() -> None:
    with pytest.raises(ConfigError, match="more than 1024 tiles"):
        ModelConfig(image_grids=[[33, 32]])

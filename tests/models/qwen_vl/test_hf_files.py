"""The files beside the weights of a Qwen-VL model: what is written is ours, what is read is followed or refused."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hf_processors import load_processor, use_processors
from PIL import Image
from transformers import AutoTokenizer

from megatron_llave.batch import Side
from megatron_llave.config.data import DataConfig
from megatron_llave.data.packing import IMAGE
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import CheckpointError
from megatron_llave.models.hf.config_json import HfConfig, read_config_json
from megatron_llave.models.hf.side_files import SPECIAL_TOKEN
from megatron_llave.models.qwen_vl import hf_files
from megatron_llave.models.qwen_vl.chat_templates import chat_template, sentence_transformers_template
from megatron_llave.models.qwen_vl.hf_checks import check_files
from megatron_llave.models.qwen_vl.hf_config import build_config_json, read_config
from megatron_llave.models.qwen_vl.hf_files import HfProcessor
from megatron_llave.models.qwen_vl.hf_keys import SPECIAL_TOKENS, HfKeys
from megatron_llave.models.qwen_vl.prompt import encode_prompt
from megatron_llave.models.qwen_vl.resize import normalise

GOLDEN = Path(__file__).parents[2] / "golden" / "qwen_vl"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PROMPTS = ("qwen", "plain", "vlm2vec_v2", "gme", "qwen3_vl_embedding")
IDS = {"<|endoftext|>": 500, "<|im_end|>": 501, "<|im_start|>": 502}
IDS |= {"<|image_pad|>": 505, "<|video_pad|>": 506, "<|vision_start|>": 507, "<|vision_end|>": 508}


def keys_of(family: str) -> HfKeys:
    return import_module(f"megatron_llave.models.{family}.hf_keys").KEYS


def files_of(family: str) -> HfProcessor:
    return import_module(f"megatron_llave.models.{family}.hf_files").PROCESSOR


def write_tokenizer(folder: Path, ids: dict[str, int] = IDS) -> Path:
    """A tokenizer.json with one id per byte and special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spec = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])).to_str())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["decoder"] = spec["pre_tokenizer"]
    spec["model"]["vocab"] |= ids
    spec["added_tokens"] = [{"id": i, "content": token, **SPECIAL_TOKEN} for token, i in ids.items()]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder / "tokenizer.json"


def read(folder: Path, family: str) -> HfConfig:
    return read_config(read_config_json(folder), keys_of(family))


def write(out: Path, family: str, source: Path | None, training: str | None = None, config: dict | None = None) -> list:
    config = config or read(GOLDEN / family, family).raw
    return hf_files.write_files(out, family, config, source, training, keys_of(family), files_of(family))


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and a folder that was written for its golden weights."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    write_tokenizer(source)
    shutil.copyfile(GOLDEN / request.param / "config.json", source / "config.json")
    assert write(out, request.param, source) == []
    shutil.copyfile(GOLDEN / request.param / "model.safetensors", out / "model.safetensors")
    return request.param, out


PICTURE = {"type": "image"}
MESSAGES = {
    "a text": ("It's a text.", 0),
    "an image and a text": ([PICTURE, {"type": "text", "text": "the picture"}], 1),
    "an image alone": ([PICTURE], 1),
    "two images": ([PICTURE, PICTURE, {"type": "text", "text": " both \n"}], 2),
}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_chat_template_is_the_prompt_of_the_run(family: str, prompt: str, tmp_path: Path) -> None:
    tokenizer, template = load_tokenizer(write_tokenizer(tmp_path)), files_of(family).prompts[prompt]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = chat_template(template, "<|im_end|>")
    of_inputs = sentence_transformers_template(template, "<|im_end|>")
    for content, num_images in MESSAGES.values():
        text = content if num_images == 0 else "".join(part.get("text", "") for part in content)
        system = [{"role": "system", "content": "Find it."}] if template.takes_instruction else []
        for before, given in (([], text), (system, f"Instruct: Find it.\n{text}" if system else text)):
            ours = encode_prompt(given, ["<image>"] * num_images, tokenizer, template, 1000, num_images)
            ours = [505 if token == IMAGE else token for token in ours]
            for begun in (False, True):
                messages = [*before, {"role": "user", "content": content}]
                written = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun)
                assert theirs.encode(written) == ours, written
                if num_images == 0 or template.has_image_positions:
                    written = theirs.apply_chat_template(messages, chat_template=of_inputs, tokenize=False)
                    assert theirs.encode(written) == ours, written


def test_processor_makes_our_inputs(exported: tuple[str, Path]) -> None:
    family, folder = exported
    config, files = read(folder, family), files_of(family)
    assert check_files(config, folder, files) == [
        f"size in {hf_files.VIDEO_FILE}: not used, since data.min_pixels and data.max_pixels hold for videos too"
    ]
    data = replace(config.run.data, tokenizer=str(folder / "tokenizer.json"))
    assert (data.min_pixels, data.max_pixels, data.prompt) == (
        *((2 * config.model.vision.patch_size) ** 2 * n for n in (4, 1280)),
        "qwen",
    )
    inputs = import_module(f"megatron_llave.models.{family}.inputs").INPUTS
    picture = Image.linear_gradient("L").convert("RGB").resize((150, 90))
    picture.save(stored := io.BytesIO(), "PNG")
    ours = inputs.build_processor(data, config.model).encode(Side("a text", [stored.getvalue()]))
    processor = load_processor(folder)
    content = [PICTURE, {"type": "text", "text": "a text"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    theirs = processor(text=[prompt], images=[picture], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [list(grid) for grid in ours.grids]
    expanded = [[505] * len(ours.layouts[0].source) if t == IMAGE else [t] for t in ours.tokens]
    assert theirs["input_ids"][0].tolist() == [t for part in expanded for t in part]
    pixels = normalise(torch.from_numpy(np.concatenate(ours.tiles)), torch.tensor(files.mean), torch.tensor(files.std))
    torch.testing.assert_close(theirs["pixel_values"], pixels.flatten(0, 1).flatten(1), rtol=0, atol=1e-6)


def test_model_card_runs(exported: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    family, folder = exported
    code, *_ = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)  # tests/convert/test_sentence_transformers.py runs the card's other code
    use_processors(monkeypatch)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    assert -1.001 <= float(printed.getvalue()) <= 1.001
    tokenizer, template = load_tokenizer(folder / "tokenizer.json"), files_of(family).prompts["qwen"]
    ids = torch.tensor([encode_prompt("a text", [], tokenizer, template, 1000, 0)])
    with torch.no_grad():
        states = names["model"](input_ids=ids, output_hidden_states=True).hidden_states[-1]
    expected = torch.nn.functional.normalize(states[0, -1], dim=0)
    torch.testing.assert_close(names["embed"]("a text"), expected, atol=1e-6, rtol=0)
    picture = Image.linear_gradient("L").convert("RGB").resize((100, 60))
    with_image = names["embed"]("a text", picture)
    torch.testing.assert_close(with_image.norm(), torch.tensor(1.0), atol=1e-6, rtol=0)
    assert not torch.allclose(with_image, names["embed"]("a text", picture.rotate(180)), atol=1e-3)


TRAINED = "data:\n  prompt: {}\n  min_pixels: 4000\n  max_pixels: null\n"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_files_of_a_trained_model(prompt: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    write_tokenizer(source)
    shutil.copyfile(GOLDEN / "qwen2_vl" / "config.json", source / "config.json")
    (source / "chat_template.jinja").write_text("of the source")
    (source / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 99999, "extra": 1, "size": {}}))
    (source / "processor_config.json").write_text("{}")
    gme = {"auto_map": {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}, "min_image_tokens": 9}
    write(out, "qwen2_vl", source, TRAINED.format(prompt), read(GOLDEN / "qwen2_vl", "qwen2_vl").raw | gme)
    images = json.loads((out / "preprocessor_config.json").read_text())
    assert (images["min_pixels"], images["max_pixels"], images["extra"]) == (4000, 28 * 28 * 1280, 1)
    assert images["size"] == {"shortest_edge": 4000, "longest_edge": 28 * 28 * 1280}
    videos = json.loads((out / "video_preprocessor_config.json").read_text())
    assert videos["size"] == images["size"] and videos["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert not (out / "processor_config.json").exists() and not (out / "chat_template.jinja").exists()
    config = read(out, "qwen2_vl")
    check_files(config, out, files_of("qwen2_vl"))
    assert (config.run.data.prompt, config.run.data.min_pixels) == (prompt, 4000)
    card = (out / "README.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(codes) == 4
    for code in codes:
        compile(code, "README.md", "exec")


def test_a_converted_folder_keeps_its_template_and_budget(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    write_tokenizer(source)
    shutil.copyfile(GOLDEN / "qwen3_vl" / "config.json", source / "config.json")
    (source / "chat_template.json").write_text('{"chat_template": "of the source"}')
    nested = {"image_processor": {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_mean": [0.5] * 3}}
    (source / "processor_config.json").write_text(json.dumps(nested))
    kept = tmp_path / "kept"
    kept.mkdir()
    hf_files.keep_files(source, kept)
    write(out, "qwen3_vl", kept)
    assert json.loads((out / "chat_template.json").read_text()) == {"chat_template": "of the source"}
    images = json.loads((out / "preprocessor_config.json").read_text())
    assert images["size"] == {"shortest_edge": 65536, "longest_edge": 16777216} and images["patch_size"] == 16
    notes = check_files(read(out, "qwen3_vl"), out, files_of("qwen3_vl"))
    assert any(note.startswith("chat template in chat_template.json: not used") for note in notes)


APPENDED = tokenizers.processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[("<|endoftext|>", 500)])
BYTES = tokenizers.processors.ByteLevel(trim_offsets=False)
APPENDS = "<|endoftext|> at the end of each text by tokenizer.json: not used, since data.prompt says how an input ends"


def append(file: Path, processor: object) -> None:
    """Give a tokenizer.json this post_processor."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.post_processor = processor
    tokenizer.save(str(file))


@pytest.mark.parametrize("processor", [APPENDED, tokenizers.processors.Sequence([BYTES, APPENDED])])
def test_a_token_that_the_tokenizer_appends_is_there_once(processor: object, tmp_path: Path) -> None:
    """As in the folder of Qwen3-VL-Embedding, whose chat template leaves the pooled token to the tokenizer."""
    source, kept, out = (tmp_path / name for name in ("source", "kept", "out"))
    source.mkdir(), kept.mkdir(), out.mkdir()
    append(write_tokenizer(source), processor)
    shutil.copyfile(GOLDEN / "qwen3_vl" / "config.json", source / "config.json")
    (source / "chat_template.jinja").write_text("of the source")
    assert APPENDS in check_files(read(source, "qwen3_vl"), source, files_of("qwen3_vl"))
    write(kept, "qwen3_vl", source)  # converted, not trained
    assert AutoTokenizer.from_pretrained(kept).encode("a")[-1] == IDS["<|endoftext|>"]
    assert APPENDS in check_files(read(kept, "qwen3_vl"), kept, files_of("qwen3_vl"))
    write(out, "qwen3_vl", source, TRAINED.format("qwen3_vl_embedding"))
    assert APPENDS not in check_files(read(out, "qwen3_vl"), out, files_of("qwen3_vl"))
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out / "tokenizer.json")
    template = json.loads((out / "chat_template.json").read_text())["chat_template"]
    written = theirs.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    ids = encode_prompt("a", [], ours, files_of("qwen3_vl").prompts["qwen3_vl_embedding"], 1000, 0)
    assert theirs.encode(written) == ids and ids.count(IDS["<|endoftext|>"]) == 1


@pytest.mark.parametrize("text", ["<|endoftext|> $A", "$A <|im_end|>", "$A <|endoftext|> <|endoftext|>"])
def test_other_tokens_that_a_tokenizer_adds_are_refused(text: str, tmp_path: Path) -> None:
    ids = [("<|endoftext|>", 500), ("<|im_end|>", 501)]
    added = tokenizers.processors.TemplateProcessing(text, special_tokens=ids)
    append(write_tokenizer(tmp_path), tokenizers.processors.Sequence([BYTES, added]))
    shutil.copyfile(GOLDEN / "qwen3_vl" / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="tokenizer.json: its post_processor adds tokens to each text"):
        check_files(read(tmp_path, "qwen3_vl"), tmp_path, files_of("qwen3_vl"))


def test_a_model_trained_from_scratch_has_the_ids_of_its_tokenizer(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    known = {
        "<|endoftext|>": 256,
        "<|im_end|>": 257,
        "<|im_start|>": 258,
        "<|vision_start|>": 259,
        "<|vision_end|>": 260,
    }
    write_tokenizer(source, known)
    model = read(GOLDEN / "qwen2_vl", "qwen2_vl").model
    made = build_config_json(model, "qwen2_vl", True, "float32", None, keys_of("qwen2_vl"))
    write(out, "qwen2_vl", source, "data:\n  prompt: plain\n", made)
    config = json.loads((out / "config.json").read_text())
    ids = {token: config[key] for key, (token, _) in SPECIAL_TOKENS.items()}
    assert ids == {"<|image_pad|>": 511, "<|video_pad|>": 510, "<|vision_start|>": 259, "<|vision_end|>": 260}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    check_files(read(out, "qwen2_vl"), out, files_of("qwen2_vl"))
    (out / "tokenizer.json").unlink()
    bare = tmp_path / "bare"
    bare.mkdir()
    assert write(bare, "qwen2_vl", None) == [
        "There is no tokenizer.json, so transformers cannot make a processor of this folder."
    ]
    assert {path.name for path in bare.iterdir()} == {"config.json", "generation_config.json", "README.md"}


REFUSED = [
    ("preprocessor_config.json", {"patch_size": 12}, "patch_size=12 .* must be (14|16)"),
    ("preprocessor_config.json", {"merge_size": 1}, "merge_size=1 .* must be 2"),
    ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size=1 .* must be 2"),
    ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}, "image_mean="),
    ("preprocessor_config.json", {"image_std": 1.0}, "image_std="),
    ("preprocessor_config.json", {"do_resize": False}, "do_resize=False"),
    ("preprocessor_config.json", {"resample": 2}, "resample=2"),
    ("preprocessor_config.json", {"min_pixels": 0}, "min_pixels=0 .* positive number of pixels"),
    ("preprocessor_config.json", {"min_pixels": 5000, "max_pixels": 4000}, "min_pixels=5000 is above max_pixels=4000"),
    ("preprocessor_config.json", {"min_pixels": None, "size": {"shortest_edge": "few"}}, "size="),
    ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type="),
    ("video_preprocessor_config.json", {"patch_size": 12}, "patch_size=12"),
    ("video_preprocessor_config.json", {"video_processor_type": "LlavaVideo"}, "video_processor_type="),
    ("processor_config.json", {"image_processor": {"do_normalize": False}}, "image_processor.do_normalize=False"),
    ("config.json", {"image_token_id": 504}, "'<.image_pad.>' must have the id 504, as config.json says, not 505"),
    ("config.json", {"vision_start_token_id": 504}, "'<.vision_start.>' must have the id 504"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_contradictions_between_files_are_refused(
    exported: tuple[str, Path], name: str, change: dict, message: str, tmp_path: Path
) -> None:
    family, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((tmp_path / name).read_text()) if (tmp_path / name).is_file() else {}
    (tmp_path / name).write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message) as error:
        check_files(read(tmp_path, family), tmp_path, files_of(family))
    assert "\n" not in str(error.value)


def test_two_budgets_are_refused(exported: tuple[str, Path], tmp_path: Path) -> None:
    """A missing budget is that of transformers, which reads processor_config.json first."""
    family, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    file, inner = tmp_path / "processor_config.json", json.loads((folder / "preprocessor_config.json").read_text())
    budget = {key: inner.pop(key) for key in (*hf_files.EDGES, "size")}
    file.write_text(json.dumps({"image_processor": inner | {"size": budget["size"]}}))
    check_files(read(tmp_path, family), tmp_path, files_of(family))
    inner["size"] = {"shortest_edge": 5000}
    file.write_text(json.dumps({"image_processor": inner}))
    message = "processor_config.json: image_processor.min_pixels is 5000, but .* in preprocessor_config.json"
    with pytest.raises(CheckpointError, match=message):
        check_files(read(tmp_path, family), tmp_path, files_of(family))


def test_missing_keys_of_the_image_processor(tmp_path: Path) -> None:
    theirs = transformers.Qwen2VLImageProcessorPil()
    assert {hf_files.EDGES[key]: value for key, value in hf_files.DEFAULT_PIXELS.items()} == dict(theirs.size)
    for family in FAMILIES:
        shutil.copyfile(GOLDEN / family / "config.json", tmp_path / "config.json")
        (tmp_path / "preprocessor_config.json").write_text("{}")
        config = read(tmp_path, family)
        if family == "qwen3_vl":
            with pytest.raises(CheckpointError, match="image_mean="):
                check_files(config, tmp_path, files_of(family))
            continue
        (note,) = check_files(config, tmp_path, files_of(family))
        assert note.startswith("data.prompt=qwen, the default: an embedding model needs the prompt")
        assert (config.run.data.min_pixels, config.run.data.max_pixels) == tuple(hf_files.DEFAULT_PIXELS.values())
    # An older spelling.
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"min_pixels": 3136, "max_pixels": 12845056}}')
    shutil.copyfile(GOLDEN / "qwen2_vl" / "config.json", tmp_path / "config.json")
    config = read(tmp_path, "qwen2_vl")
    check_files(config, tmp_path, files_of("qwen2_vl"))
    assert config.run.data == replace(DataConfig(), min_pixels=3136, max_pixels=12845056)

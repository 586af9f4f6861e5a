"""Models with one tile for an image, as the demo's: exported to transformers' llava, and read back."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from forking import run_script
from golden_model import QWEN
from hf_processors import load_processor
from megatron.core.process_groups_config import ProcessGroupCollection
from PIL import Image
from run_ranks import run_ranks
from safetensors.torch import load_file
from transformers.utils import is_torchvision_available

from megatron_llave.batch import Side
from megatron_llave.checkpoint.folders import write_manifest
from megatron_llave.convert.hf import export_hf, import_hf
from megatron_llave.convert.inspect import inspect
from megatron_llave.embedding.embedder import LoadedModel, load_model
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.prepare.tokenizer import train_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_hf.py"
PIXELS = 1e-3 if is_torchvision_available() else 1e-5
"""Of images: torchvision's bicubic resize rounds some pixels to the next value, and Pillow's is ours."""
TEXTS = [
    "red apple",
    "Find an image that matches the caption: caf\u00e9 \U0001f469\u200d\U0001f680",
    " \u4f60\u597d  x ",
]


@pytest.fixture(scope="module")
def checkpoint(groups: ProcessGroupCollection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As of a run from scratch: golden weights, no grids, a SentencePiece tokenizer and the prompt `plain`."""
    folder = tmp_path_factory.mktemp("one-tile")
    source = shutil.copytree(QWEN, folder / "source")
    config = json.loads((source / "config.json").read_text()) | {"image_aspect_ratio": "square"}
    (source / "config.json").write_text(json.dumps(config))
    made = import_hf(source, folder / "checkpoint", groups)
    shutil.rmtree(made / "assets")
    (made / "assets").mkdir()
    (made / "assets" / "tokenizer.model").write_bytes(train_tokenizer(TEXTS * 20, 500))
    text = (made / "config.yaml").read_text()
    assert "image_grids: []" in text
    text = text.replace("prompt: qwen", "prompt: plain").replace("\n  steps: 0", "\n  steps: 1")
    (made / "config.yaml").write_text(text)
    (made / "manifest.json").unlink()
    write_manifest(made, step=0, layout=None)
    return made


@pytest.fixture(scope="module")
def exported(checkpoint: Path, groups: ProcessGroupCollection) -> Path:
    out = checkpoint.parent / "out"
    assert export_hf(checkpoint, out, groups) == []
    return out


def pictures(folder: Path) -> list[Path]:
    """Two images of different shapes."""
    files = [folder / "wide.png", folder / "tall.png"]
    for file, size in zip(files, ((150, 40), (30, 90))):
        Image.linear_gradient("L").convert("RGB").resize(size).rotate(size[0]).save(file)
    return files


def check(out: Path, ours: LoadedModel, folder: Path) -> None:
    """transformers, by the chat template alone, and sentence-transformers give our vectors, of images too."""
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    processor = load_processor(out)
    theirs = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    files = pictures(folder)
    images = [Image.open(file).convert("RGB") for file in files]
    for text in TEXTS:
        expected = ours.embed(Side(text, []))
        torch.testing.assert_close(torch.from_numpy(theirs.encode(text)), expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            messages = [{"role": "user", "content": text}]
            kinds = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            state = model.eval().model(**processor.apply_chat_template(messages, **kinds)).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.nn.functional.normalize(state, dim=0), expected, atol=1e-5, rtol=0)
        one = ours.embed(Side(text, [files[0].read_bytes()]))
        found = theirs.encode({"text": text, "image": images[0]})
        torch.testing.assert_close(torch.from_numpy(found), one, atol=PIXELS, rtol=0)
        assert not torch.allclose(one, expected, atol=1e-3)
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        both = ours.embed(Side(text, [file.read_bytes() for file in files]))
        found = theirs.encode([[{"role": "user", "content": parts}]])[0]
        torch.testing.assert_close(torch.from_numpy(found), both, atol=PIXELS, rtol=0)


def test_transformers_and_sentence_transformers_give_our_vectors(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    check(exported, load_model(checkpoint), tmp_path)


def test_the_folder_is_read_back(
    checkpoint: Path, exported: Path, groups: ProcessGroupCollection, tmp_path: Path
) -> None:
    assert inspect(exported, groups) == 0
    again = import_hf(exported, tmp_path / "again", groups)
    assert re.search(r"prompt: plain\n", (again / "config.yaml").read_text())
    assert export_hf(again, tmp_path / "back", groups) == []
    found, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", exported))
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    for name in ("config.json", "chat_template.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_text() == (exported / name).read_text(), name
    side = Side(TEXTS[1], [pictures(tmp_path)[0].read_bytes()])
    assert torch.equal(load_model(exported).embed(side), load_model(checkpoint).embed(side))
    done = run_script(TOOL, "verify", "--hf", exported, "--checkpoint", checkpoint)
    assert done.returncode == 0 and "the same model (tolerance 3e-05" in done.stdout, done.stdout + done.stderr


def test_what_sentence_transformers_saves_is_read_back(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """As after a training with it: its own spellings of the files, and transformers' of the model without its head."""
    saved = tmp_path / "saved"
    sentence_transformers.SentenceTransformer(str(exported), device="cpu").save_pretrained(str(saved))
    assert (saved / "chat_template.jinja").is_file()
    side = Side(TEXTS[1], [pictures(tmp_path)[0].read_bytes()])
    assert torch.equal(load_model(saved).embed(side), load_model(checkpoint).embed(side))


def test_the_newline_is_an_embedding(exported: Path, checkpoint: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    rows = {config["image_token_index"], config["image_newline_token_id"]}
    assert rows == {config["text_config"]["vocab_size"] - 1, config["text_config"]["vocab_size"] - 2} == {510, 511}
    tensors = load_file(exported / "model.safetensors")
    newline = load_file(QWEN / "model.safetensors")["model.image_newline"]
    embedding = tensors["language_model.model.embed_tokens.weight"]
    assert torch.equal(embedding[config["image_newline_token_id"]], newline)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.encode("<image><image_newline>") == [
        config["image_token_index"],
        config["image_newline_token_id"],
    ]


def test_what_a_layout_cannot_hold_is_refused(
    checkpoint: Path, exported: Path, groups: ProcessGroupCollection, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"image_grids=\[\] has no place in format llava_onevision; give llava or"):
        export_hf(checkpoint, tmp_path / "out", groups, "llava_onevision")
    grids = import_hf(QWEN, tmp_path / "grids", groups)
    with pytest.raises(ConfigError, match=r"has no place in format llava; give llava_onevision or llava_qwen"):
        export_hf(grids, tmp_path / "out", groups, "llava")
    config = json.loads((exported / "config.json").read_text())
    for change, words in (
        ({"image_newline_token_id": 512}, "image_newline_token_id=512 is not supported; it must be a token id below"),
        ({"vision_feature_layer": -2}, "vision_feature_layer=-2 is not supported; it must be -1"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy='default'"),
    ):
        folder = shutil.copytree(exported, tmp_path / str(words.split("=")[0] + str(len(words))))
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=words):
            load_model(folder)


@pytest.mark.slow
def test_the_demos_own_run(openmoji_data: Path, groups: ProcessGroupCollection, tmp_path: Path) -> None:
    paths = [f"data.path={openmoji_data}", f"train.output={tmp_path / 'run'}"]
    config = ["--config", str(ROOT / "examples" / "tiny.yaml")]
    steps = ["train.steps=3", "train.global_batch_size=8", "evaluate.interval=0", "log.histogram_interval=0"]
    run_ranks(1, ROOT / "megatron_llave" / "train.py", *config, *paths, *steps)
    assert export_hf(tmp_path / "run", tmp_path / "out", groups) == []
    check(tmp_path / "out", load_model(tmp_path / "run"), tmp_path)

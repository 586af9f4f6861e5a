"""tools/embed.py, three lines of Python and examples/first_check.py, as a user starts them."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from forking import run_script
from golden_model import ONEVISION, byte_tokenizer
from PIL import Image
from run_ranks import run_ranks

from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TOOL, CHECK = ROOT / "tools" / "embed.py", ROOT / "examples" / "first_check.py"
THREE_LINES = """
import sys
from megatron_llave.embedding import load_model
model = load_model(sys.argv[1])
vectors = model.embed(["a cat", "a dog"])
again = load_model(sys.argv[1]).embed(["a cat"])
assert vectors.shape == (2, 64) and (again[0] - vectors[0]).abs().max() < 1e-6
print(vectors.tolist())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, and a picture beside it."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ONEVISION / name, folder)
    byte_tokenizer(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder.parent / "picture.png")
    return folder


def run(*command: str | Path) -> subprocess.CompletedProcess:
    full = [sys.executable, "-W", "ignore", *map(str, command)]
    return subprocess.run(full, capture_output=True, text=True, timeout=200)


def test_three_lines_and_the_tool_agree(model: Path) -> None:
    done = run("-c", THREE_LINES, model)
    assert done.returncode == 0, done.stderr
    vectors = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    picture = model.parent / "picture.png"
    done = run(TOOL, "--checkpoint", model, "--text", "a cat", "--text", "a dog", "--image", picture)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["input"] for line in lines] == ["a cat", "a dog", str(picture)], done.stderr
    np.testing.assert_allclose([line["embedding"] for line in lines[:2]], vectors, atol=1e-6)


def test_jsonl_on_one_and_two_ranks(model: Path, tmp_path: Path) -> None:
    inputs = model.parent / "inputs.jsonl"
    instruction = "<image>\nRepresent the given image."
    lines = [{"text": "a cat"}, {"text": instruction, "image": "picture.png", "id": "p"}, {"text": "x" * 300}]
    inputs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parquet, npy = tmp_path / "out.parquet", tmp_path / "out.npy"
    done = run_script(TOOL, "--checkpoint", model, "--jsonl", inputs, "--out", parquet)
    assert done.returncode == 0 and f"3 embeddings of 64 numbers: {parquet}" in done.stdout, done.stderr
    table = pq.read_table(parquet)
    assert table["id"].to_pylist() == ["1", "p", "3"]
    run_ranks(2, TOOL, "--checkpoint", str(model), "--jsonl", str(inputs), "--out", str(npy))
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), np.load(npy), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "out.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--jsonl", "b"], "give either --jsonl, or --text and --image"),
        ([], "give either --jsonl, or --text and --image"),
        (["--jsonl", "b"], "--jsonl needs --out"),
        (["--jsonl", "none.jsonl", "--out", "a.npy"], "none.jsonl cannot be read: No such file or directory"),
    ],
)
def test_wrong_use_is_one_line(model: Path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--checkpoint", str(model), *arguments])
    with pytest.raises(SystemExit) as caught:  # in this process, since none of them gets as far as the model
        runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_folder_without_tokenizer_says_what_to_do() -> None:
    with pytest.raises(DataError, match="has neither tokenizer.json nor tokenizer.model; set data.tokenizer"):
        load_model(ONEVISION)


def test_first_check_tells_another_model_apart(model: Path) -> None:
    done = run_script(CHECK, "--checkpoint", model, "--image", model.parent / "picture.png")
    assert done.returncode == 1, done.stderr
    assert "released 0.4802" in done.stdout and "released 0.3413" in done.stdout and "NOT as released" in done.stdout

"""tools/embed.py, three lines of Python and examples/first_check.py, as a user starts them."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from forking import run_script
from golden_model import ONEVISION, byte_tokenizer
from PIL import Image
from run_ranks import run_ranks
from safetensors.numpy import load_file, save_file

from megatron_llave.batch import Pair, Side
from megatron_llave.commands import embed as embed_tool
from megatron_llave.data.index import Index, write_index
from megatron_llave.data.packing import IMAGE
from megatron_llave.data.shards import write_subset
from megatron_llave.data.stored_vectors import open_vectors
from megatron_llave.distributed import process_groups
from megatron_llave.embedding import cache, whole_files
from megatron_llave.embedding.embeddable import to_side
from megatron_llave.embedding.embedder import embed, load_model
from megatron_llave.errors import DataError, NotFiniteError

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ids", "out.npy", "out.parquet"]
    assert (tmp_path / "out.ids").read_text() == "1\np\n3\n"


def test_a_bad_image_costs_itself_alone_and_the_command_continues(model: Path, tmp_path: Path) -> None:
    image = (model.parent / "picture.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(image[: len(image) // 2])
    texts = [f"{i}" for i in range(1, 599)] + ["x" * 599]  # more than a part
    lines = [{"id": f"t{i}", "text": text} for i, text in enumerate(texts, 1)] + [{"id": "bad", "image": "bad.png"}]
    Image.new("RGB", (8, 8)).save(tmp_path / "dull.png")
    lines.append({"id": "dull", "image": "dull.png"})
    inputs, npy = tmp_path / "in.jsonl", tmp_path / "out.npy"
    inputs.write_text("\ufeff\n" + "\n\n".join(map(json.dumps, lines)))
    command = [TOOL, "--checkpoint", model, "--jsonl", inputs, "--out", npy]
    done = run_script(*command)
    wrong = f"error: input {inputs}:1200 bad.png cannot be embedded: not a readable image"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(wrong), done.stderr
    assert (
        f"what is embedded stays in {npy}.parts for the same command; --skip-bad leaves such inputs out" in done.stderr
    )
    before = {path: np.load(path) for path in Path(f"{npy}.parts").rglob("part-*.npy")}
    assert before and not npy.exists()
    done = run_script(*command, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert f"1 of 601 inputs were left out: {npy}.skipped.jsonl" in done.stdout
    left = 601 - sum(map(len, before.values()))
    assert 0 < left < 601 and f"noticed in the {left} inputs embedded now: 1 x image of one colour" in done.stderr
    (skipped,) = [json.loads(line) for line in Path(f"{npy}.skipped.jsonl").read_text().splitlines()]
    assert skipped["id"] == "bad" and "not a readable image" in skipped["problem"]
    assert (tmp_path / "out.ids").read_text().split() == [line["id"] for line in lines if line["id"] != "bad"]
    rows = np.load(npy)
    assert rows.shape == (600, 64) and not Path(f"{npy}.parts").exists()
    np.testing.assert_allclose(rows[[0, -2]], load_model(model).embed([texts[0], texts[-1]]), atol=1e-5)


def test_blocks_missing_files_and_a_full_disk(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """In this process: several blocks, several parts in each, an image that is missing, one that is damaged."""
    image = (model.parent / "picture.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(image[: len(image) // 2])
    lines = [{"id": f"t{i}", "text": "x" * i} for i in range(1, 12)]
    lines[4]["image"], lines[9]["image"] = "bad.png", "nowhere.png"
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    kept = [line["id"] for line in lines if "image" not in line]
    monkeypatch.setattr(embed_tool, "BLOCK", 4)
    monkeypatch.setattr(whole_files, "ROWS", 3)
    monkeypatch.setattr(cache, "PART_COST", 2)
    monkeypatch.setattr(process_groups, "destroy_distributed", lambda: None)
    monkeypatch.setattr(embed_tool, "read_blocks", reads := Mock(wraps=embed_tool.read_blocks))

    def run(*options: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["embed.py", "--checkpoint", str(model), *map(str, options)])
        embed_tool.main()

    def last_line_of_error(*options: str | Path) -> str:
        with pytest.raises(SystemExit):
            run(*options)
        return capsys.readouterr().err.splitlines()[-1]

    command = ["--jsonl", tmp_path / "in.jsonl", "--out", tmp_path / "out.parquet"]
    assert "nowhere.png does not exist, 1 of" in last_line_of_error(*command)
    run(*command, "--skip-bad")
    skipped = [json.loads(line) for line in (tmp_path / "out.parquet.skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in skipped] == ["t5", "t10"] and f"{tmp_path}/in.jsonl:9 " in skipped[0]["input"]
    assert "not a readable image" in skipped[0]["problem"] and "does not exist" in skipped[1]["problem"]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == kept
    reads.assert_called_once()  # other ranks wait while the first one writes
    texts = [line["text"] for line in lines if "image" not in line]
    rows = np.array(table["embedding"].to_pylist())
    np.testing.assert_allclose(rows, load_model(model).embed(texts), atol=1e-5)
    monkeypatch.setattr(whole_files, "write_text", Mock(side_effect=OSError(28, "No space left on device", "the list")))
    assert last_line_of_error(*command, "--skip-bad") == "error: the list cannot be written: No space left on device"
    (tmp_path / "in.jsonl").write_text('{"image": "bad.png"}')
    (tmp_path / "out.parquet.parts").rename(tmp_path / "old")
    assert "not a readable image" in (line := last_line_of_error(*command, "--skip-bad")) and "no input can be" in line
    shards = tmp_path / "shards"
    pair = Pair("p", "cats", Side("q", [image]), Side("t", []), "q", "t")
    write_index(shards, Index({"cats": write_subset([pair], shards, "cats", "vqa")}))
    (shard,) = shards.glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(image, image[:-1] + b"?"))
    line = last_line_of_error("--shards", shards, "--out", tmp_path / "other.npy")
    assert line == f"error: {shards}: no pair can be read; llave prepare verify says more"


def test_embeddings_that_are_not_finite_are_not_written(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    next(value for name, value in tensors.items() if name.endswith("layers.1.mlp.down_proj.weight"))[0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    done = run_script(TOOL, "--checkpoint", broken, "--jsonl", tmp_path / "in.jsonl", "--out", tmp_path / "out.npy")
    assert done.returncode == 2 and "in.jsonl:1 a has no finite embedding" in done.stderr
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(NotFiniteError, match="input 0 has no finite embedding .2 of 2 inputs"):
        load_model(broken).embed(["a", "b"])


def test_everything_that_is_an_input_is_embedded_alike(model: Path) -> None:
    loaded, path = load_model(model), model.parent / "picture.png"
    image = Image.open(path)
    given = [path, image, np.asarray(image), path.read_bytes(), {"image": path}, {"images": [str(path)], "text": ""}]
    rows = loaded.embed([*given, Side("", [path.read_bytes()]), "a cat"])
    np.testing.assert_allclose(rows[:-1], rows[:1].expand(7, -1), atol=1e-6)
    assert loaded.embed("a cat").shape == (64,) and loaded.embed(path).shape == (64,)
    np.testing.assert_allclose(loaded.embed("a cat"), rows[-1], atol=1e-6)
    with_text = loaded.embed([{"text": "what is it", "image": image}, Side("what is it", [path.read_bytes()])])
    np.testing.assert_allclose(with_text[0], with_text[1], atol=1e-6)
    assert (with_text[0] - rows[0]).abs().max() > 1e-3 and len(repr(loaded).splitlines()) == 3
    pair = ("<image>\nwhat is it", path)
    for several in ([pair, "a cat", "b"], (value for value in (pair, {"text": "a cat", "id": 7}, "b"))):
        vectors = loaded.embed(several)
        np.testing.assert_allclose(vectors[0], loaded.embed(pair), atol=1e-6)
        np.testing.assert_allclose(vectors[1], rows[-1], atol=1e-6)
    np.testing.assert_allclose(loaded.embed(np.array(["a cat", "b"])), vectors[1:], atol=1e-6)
    np.testing.assert_allclose(loaded.embed(("a cat", "b")), vectors[1:], atol=1e-6)
    np.testing.assert_allclose(loaded.embed([bytearray(path.read_bytes()), image.convert("RGBA")]), rows[:2], atol=1e-6)
    for several in ({"a", "b"}, torch.zeros(2, 3), 3, None):
        with pytest.raises(DataError, match=f"the input is of type {type(several).__name__}; give a text"):
            loaded.embed(several)


@pytest.mark.parametrize("images", ["photo.png", b"bytes", ["photo.png"], [Path("photo.png")], None])
def test_a_side_has_a_list_of_images(images: object) -> None:
    with pytest.raises(DataError, match="images of a Side must be a list of the bytes of image files or of PIL images"):
        Side("a", images)


def test_literal_marks_in_texts(model: Path) -> None:
    """The tokenizer has an id for each byte and <|im_end|>; the embedding is that of the text as it is written."""
    loaded = load_model(model)
    for text in ("How do I use the <image> tag?", "an <|im_end|> or <video>", "one <|image_1|>"):
        tokens = loaded.encoder.encode(to_side(text, "")).tokens
        assert IMAGE not in tokens
        plain = loaded.encoder.tokenizer.encode_plain(text)
        assert str(plain)[1:-1] in str(tokens) and len(plain) == len(text.encode())
    both = loaded.encoder.encode(to_side(("<image>\nthe \\<image> tag", model.parent / "picture.png"), "")).tokens
    assert both.count(IMAGE) == 1


def test_what_never_ends_is_not_read() -> None:
    os.mkfifo("pipe.png")
    with pytest.raises(DataError, match="image pipe.png cannot be read: it is not a regular file"):
        to_side(Path("pipe.png"), "input 1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "input 1: it is of type NoneType; give a text, a pathlib.Path of an image, a PIL image"),
        (3, "input 1: it is of type int; give"),
        (torch.zeros(3, 4, 4), "input 1: it is of type Tensor; give"),
        (np.zeros((4, 4, 3), np.float32), r"input 1: an array must be uint8 \[h, w\], .* not float32 \[4, 4, 3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"not uint8 \[3, 4, 5\]"),
        (Path("nowhere.png"), "input 1: image nowhere.png does not exist; name another file"),
        (Path("a\0b"), "input 1: image .* cannot be the name of a file .embedded null byte"),
        ({"txt": "a"}, "input 1: the key 'txt' is unknown; a mapping has text, image, or both"),
        ("photo.png", r"input 1: 'photo.png' is the name of a file; pathlib.Path\('photo.png'\) embeds"),
        ("photo.png\n", r"input 1: 'photo.png.n' is the name of a file; pathlib.Path\('photo.png'\) embeds an image"),
        ("no/where/Cat.JPG", r"input 1: 'no/where/Cat.JPG' is the name of a file"),
        ("/tmp", "input 1: '/tmp' is the name of a file"),
        ("file:///a/b", 'input 1: .* is the address of a file, which is not fetched; {"text": .* embeds these words'),
        ("https://host/a.png?x=1", "input 1: .* is the address of a file"),
        ("data:image/png;base64,AAAA", "input 1: .* is the address of a file"),
        ("a\0b", "input 1: the text holds a NUL"),
        ((("a", "photo.png"),), "input 1: it is of type tuple; give"),
        (["a"], "input 1: it is of type list; give"),
        ("half \ud83d", r"input 1: the text holds half a surrogate pair, as of a cut emoji .'.ud83d' at character 6"),
        (("<image> <image>", b""), r"input 1: text has 2 image placeholders for 1 images: .*; write .<image> where"),
        ({"text": "", "id": "x"}, "input 1: the mapping has neither text nor image"),
    ],
)
def test_anything_else_is_one_clear_error(value: object, message: str) -> None:
    Path("photo.png").touch()
    with pytest.raises(DataError, match=message):
        to_side(value, "input 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--jsonl", "b"], "give either --jsonl, or --shards, or --text and --image"),
        (["--text", "a\nb", "--out", "x.npy"], "'a\\nb' has more than one line, but is to be one of x.ids; --out a"),
        (["--image", "\udcff.png"], "'\\udcff.png' is not UTF-8 text; name its file otherwise"),
        ([], "give either --jsonl, or --shards, or --text and --image"),
        (["--jsonl", "b"], "--jsonl needs --out"),
        (["--shards", "b"], "--shards needs --out FILE.npy or FILE.parquet"),
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


def test_first_check_refuses_another_family(model: Path, tmp_path: Path) -> None:
    folder = ROOT / "tests" / "golden" / "qwen_vl" / "qwen2_vl"
    overrides = [f"data.tokenizer={byte_tokenizer(tmp_path)}", "data.prompt=plain"]
    done = run_script(CHECK, "--checkpoint", folder, "--image", model.parent / "picture.png", *overrides)
    assert done.returncode == 2
    assert done.stderr == f"error: {folder} is a qwen2_vl; this check is of LLaVE-0.5B alone\n"


def test_the_inputs_of_shards_get_their_names(model: Path, tmp_path: Path) -> None:
    """Texts and pictures, one id with two inputs, one input that cannot be read; on two ranks, as training reads it."""
    picture = (model.parent / "picture.png").read_bytes()

    def pair(number: int) -> Pair:
        query = (
            Side(f"<image>\nIs it {number}?", [picture]) if number % 2 else Side(f"<|im_end|> \\<image> {number}", [])
        )
        target, other = Side(f"answer {number % 3}", []), Side(f"answer {(number + 1) % 3}", [])
        names = f"a{number % 3}", f"a{(number + 1) % 3}"
        return Pair(f"p{number}", "vqa", query, target, f"q{number // 2}", names[0], [other], [names[1]])

    shards, out = tmp_path / "shards", tmp_path / "judge.npy"
    write_index(shards, Index({"vqa": write_subset(map(pair, range(6)), shards, "vqa", "vqa", 4)}))
    printed = run_ranks(2, TOOL, "--checkpoint", str(model), "--shards", str(shards), "--out", str(out))
    assert printed.count("3 of 6 ids have inputs that differ; the first of each is embedded") == 1
    first = {"vqa/query/q0": 0, "vqa/query/q1": 2, "vqa/query/q2": 4}
    sides = {name: pair(number).query for name, number in first.items()}
    sides |= {f"vqa/target/a{number}": pair(number).target for number in range(3)}
    rows = open_vectors(out).rows(list(sides))
    expected = embed(load_model(model), sides)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)

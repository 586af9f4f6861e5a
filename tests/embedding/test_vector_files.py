"""JSONL in, .npy and Parquet out: what is wrong is named with file and line, and a file is whole or absent."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from megatron_llave.embedding.cache import EmbeddingCache
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.embedding.jsonl import count_inputs, read_blocks, read_inputs
from megatron_llave.embedding.vector_files import embedding_file
from megatron_llave.errors import DataError


def write(folder: Path, *lines: object) -> Path:
    path = folder / "inputs.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_parts_keep_order_ids_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes(b"B")
    two = {"text": "three", "image": ["a.png", "sub/b.png"], "id": 7}
    path = write(tmp_path, {"text": "one"}, {"image": "a.png", "id": "x"}, two, {"text": "f\u00fcnf"}, {"text": "five"})
    assert count_inputs(path, 2) == 5
    parts = list(read_blocks(path, 2))
    assert [[line.id for line in part.entries] for part in parts] == [["1", "x"], ["7", "4"], ["5"]]
    assert [list(part) for part in parts][1] == [f"{path}:3 a.png sub/b.png", f"{path}:4 f\u00fcnf"]
    side = parts[1][f"{path}:3"]
    assert side.text == "three" and side.images == [b"A", b"B"]
    assert parts[0][f"{path}:2"].images == [b"A"] and parts[1][f"{path}:4"].text == "f\u00fcnf"
    with pytest.raises(DataError, match="inputs.jsonl has no lines"):
        count_inputs(write(tmp_path), 2)


def test_two_inputs_with_one_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "one", "id": "b"}, {"text": "two", "id": "3"}, {"text": "three"})
    with pytest.raises(DataError, match="inputs.jsonl:3: the id '3' is that of line 2 too; an id defaults to the line"):
        count_inputs(path, 2)


def test_blank_lines_do_not_count_and_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "inputs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "three"}\r\n{"text": "four", "id": 4}\r\n\r\n')
    parts = list(read_blocks(path, 2))
    assert count_inputs(path, 2) == 3
    assert [list(part) for part in parts] == [[f"{path}:1 one", f"{path}:3 three"], [f"{path}:4 four"]]
    assert [line.id for part in parts for line in part.entries] == ["1", "3", "4"]


def test_both_spellings_of_images_are_one(tmp_path: Path) -> None:
    spellings = {"image": "a.png"}, {"image": ["a.png"]}, {"images": ["a.png"]}, {"images": "a.png"}
    inputs = [line for _, line in read_inputs(write(tmp_path, *spellings))]
    assert inputs == [Input("", ("a.png",))] * 4


def test_frames_of_a_video_are_one_input(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    frames = ["a.png", "b.png"]
    item = {"text": "<image> x", "frames": frames}
    path = write(tmp_path, item, {"text": "<image> x", "images": frames}, {**item, "fps": 0.5})
    video, images, timed = read_blocks(path, 1)
    assert next(iter(timed.values())).seconds == (0, 2) and timed.digest != video.digest
    [side] = video.values()
    assert side.is_video and len(side.images) == 2 and side.num_placeholders == 1
    assert video.digest != images.digest, "embeddings of the one are not those of the other"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2 is not valid JSON"),
        ('{"text": "a cut emoji \\ud83d"}', "2: the text .* holds half a surrogate pair"),
        ('{"text": "a\\u0000b"}', "2: the text .* holds a NUL"),
        ('{"image": "a\\u0000b"}', "2: the text .* holds a NUL"),
        ("[" * 100_000, r"2 is not valid JSON .nested deeper than 100"),
        ([1], r"2: must be an object with id, text, image, images, frames, fps, not \[1\]"),
        ({"txt": "a"}, "2: unknown key 'txt'; known keys: id, text, image, images"),
        ({"image": "a" * 5000}, "2: image has a path of more than 4096 bytes"),
        ({"image": "a.png", "images": ["a.png"]}, "2: image and images are two spellings of one key"),
        ({"text": "a", "id": {}}, "2: id must be a whole number or a string"),
        ({"text": 3}, "2: text must be a string, not 3"),
        ({"image": [3]}, "2: image must be a file name or a list of them"),
        ({"text": ""}, "2: neither text nor image"),
        ({"image": "nothing.png"}, ".*input '2': .*nothing.png does not exist"),
    ],
)
def test_wrong_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, {"text": "fine"}, line)
    with pytest.raises(DataError, match=f"{path}:?{message}") as caught:
        count_inputs(path, 2)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.jsonl cannot be read: No such file"):
        count_inputs(tmp_path / "nothing.jsonl", 2)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe4"}\n')
    with pytest.raises(DataError, match="latin.jsonl:1 is not UTF-8"):
        count_inputs(tmp_path / "latin.jsonl", 2)


def test_npy_and_parquet_hold_the_same(tmp_path: Path) -> None:
    rows = torch.arange(15, dtype=torch.float32).reshape(5, 3)
    for name in ("deep/out.npy", "deep/out.parquet"):
        with embedding_file(tmp_path / name, 5, 3, "runs/tiny") as write_part:
            write_part(["a", "b"], rows[:2])
            assert not (tmp_path / name).exists()
            write_part(["c", "d", "e"], rows[2:])
    stored = np.load(tmp_path / "deep/out.npy", allow_pickle=False)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, rows.numpy())
    table = pq.read_table(tmp_path / "deep/out.parquet")
    assert table["id"].to_pylist() == list("abcde") and table.schema.metadata[b"model"] == b"runs/tiny"
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), rows.numpy())
    assert pq.ParquetFile(tmp_path / "deep/out.parquet").num_row_groups == 2
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out.ids", "out.npy", "out.parquet"]
    assert (tmp_path / "deep/out.ids").read_text().split() == list("abcde")


@pytest.mark.parametrize("name", ["out.npy", "out.parquet"])
def test_interrupted_file_is_absent(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"the old one")
    with pytest.raises(KeyboardInterrupt), embedding_file(tmp_path / name, 2, 3, "m") as write_part:
        write_part(["a"], torch.zeros(1, 3))
        raise KeyboardInterrupt
    with pytest.raises(DataError, match=f"{name} cannot be written: No space left"):
        with embedding_file(tmp_path / name, 2, 3, "m"):
            raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"the old one"


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="out.txt must end in .npy or .parquet"):
        with embedding_file(tmp_path / "out.txt", 1, 1, "m"):
            raise AssertionError("not reached")


@pytest.mark.parametrize("name", ["a\0b.png", "half\ud83d.png", "x" * 5000 + ".png"])
def test_impossible_file_names_are_missing_files(tmp_path: Path, name: str) -> None:
    inputs = Inputs("set", [Input("", (name,), id="q1")], tmp_path)
    with pytest.raises(DataError, match=r"data set set, input 'q1': .* does not exist, 1 of 1 files") as caught:
        inputs.require_files()
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(
        DataError, match="data set set, input 'q1': image .* cannot be (the name of a file|read: File name too long)"
    ):
        inputs[inputs.key(0)]


def test_part_without_its_folder_is_one_line(tmp_path: Path) -> None:
    inputs = Inputs("set", [Input("a")], tmp_path)
    store = EmbeddingCache(tmp_path / "store", inputs)
    store.claim({"weights": "w"})
    shutil.rmtree(tmp_path / "store")  # as a user deletes the output directory of a running evaluation
    with pytest.raises(DataError, match=r"part-00000.npy cannot be written: No such file or directory"):
        store.write(0, np.ones((1, 4), np.float32))

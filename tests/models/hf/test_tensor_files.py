"""safetensors folders read and written in a stream: equal to the library's own, and what is damaged is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llave.errors import CheckpointError
from megatron_llave.files import whole_folder
from megatron_llave.models.hf.tensor_files import INDEX, SINGLE, TensorFiles, write_tensor_files

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(6).to(torch.bfloat16).reshape(2, 3).T,  # not contiguous
    "scalar": torch.tensor(3.5, dtype=torch.float16),
    "empty": torch.zeros(0, 7),
}


def write(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, **options) -> Path:
    folder.mkdir(exist_ok=True)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    write_tensor_files(folder, shapes, iter(tensors.items()), **options)
    return folder


def assert_equal(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, value in found.items():
        assert value.dtype == TENSORS[name].dtype and torch.equal(value, TENSORS[name]), name


def test_one_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert_equal(load_file(tmp_path / SINGLE))
    files = TensorFiles(tmp_path)
    assert_equal({name: files.read(name) for name in files.tensors})
    assert files.tensors["a"].shape == (3, 4) and files.tensors["a"].num_bytes == 48


def test_shards_and_index(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=50)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 48 + 12 + 2
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    files = TensorFiles(tmp_path)
    assert_equal({name: files.read(name) for name in files.tensors})
    assert_equal({k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()})


def test_values_are_cast_to_the_promised_dtype(tmp_path: Path) -> None:
    write_tensor_files(tmp_path, {"a": ((3, 4), torch.bfloat16)}, iter([("a", TENSORS["a"])]))
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], TENSORS["a"].bfloat16())


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorFiles(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.pth"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = refused(tmp_path)
    assert name in message and "run any code" in message and "safetensors" in message


def test_missing_shard_is_named_with_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=50)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = refused(tmp_path)
    assert "model-00002-of-00002.safetensors is missing" in message and "scalar" in message


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_of_a_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path) / SINGLE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert str(path) in refused(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 2**64 - 1]},
        {"data_offsets": [2**63, 2**63 + 48]},
        {"data_offsets": [48, 0]},
        {"data_offsets": [-48, 0]},
        {"data_offsets": [12, 60]},  # within the values of others
        {"data_offsets": None},
        {"shape": [2**62, 4]},
        {"shape": [-3, 4]},
        {"shape": [3, 5]},
        {"shape": "a"},
        {"dtype": None},
        {"dtype": "F9"},
    ],
    ids=str,
)
def test_header_that_lies_is_refused(tmp_path: Path, change: dict) -> None:
    path = write(tmp_path) / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert str(path) in refused(tmp_path)


def test_nested_header_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / SINGLE
    path.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    assert str(path) in refused(tmp_path)


@pytest.mark.parametrize("kept", [4, 30, -1])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path) / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    message = refused(tmp_path)
    assert str(path) in message and "damaged or truncated" in message


def test_tensor_that_the_index_promises(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=50)
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert "lacks b, empty, scalar, which" in refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": ["a.safetensors"]}}'),
        *('{"weight_map": {"a": "../a.safetensors"}}', json.dumps({"weight_map": {"a": "a" * 300}})),
        *('{"weight_map": {"a": "a\\u0000b"}}', '{"weight_map": {"a": "\\ud800"}}', '{"weight_map": {"a": ""}}'),
    ],
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert str(tmp_path / INDEX) in refused(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    assert "has neither model.safetensors nor" in refused(tmp_path)
    assert "is no folder" in refused(tmp_path / "nothing")


def test_unknown_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / SINGLE)
    assert "a has dtype I8" in refused(tmp_path)


def test_full_disk_while_tensors_are_written(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(CheckpointError, match="No space left on device; nothing is left of it"):
        with whole_folder(tmp_path / "out", "exported model") as partial:
            (partial / SINGLE).symlink_to("/dev/full")
            write(partial, {"a": torch.zeros(1 << 20)})
    assert list(tmp_path.iterdir()) == []

"""The safetensors files of a Hugging Face folder, read and written one tensor at a time; large ones in several files.

Not more than one tensor is in memory. The families say what the tensors are called and mean.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json, write_json

STEM, SUFFIX = "model", ".safetensors"
SINGLE = STEM + SUFFIX
INDEX = f"{SINGLE}.index.json"
SHARD_BYTES = 5_000_000_000
"""Bytes of the largest file that is written, unless a single tensor is larger; long the default of transformers."""
LONGEST_NAME = 255
"""Bytes of the longest file name that file systems have."""

DTYPE_CODES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    "I64": torch.int64,  # of buffers that old files hold
}
CODES = {dtype: code for code, dtype in DTYPE_CODES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFiles:
    """All tensors of a folder by name. Headers of the files are read at once, values when they are asked for."""

    def __init__(self, folder: str | Path, stem: str = STEM) -> None:
        """Find the files STEM.safetensors, or those that STEM.safetensors.index.json lists, and read their headers.

        Raises:
            CheckpointError: there are no files, one is missing, damaged or truncated, or they are pickled.
        """
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        for file, names in _files(self.folder, stem).items():
            with _opened(file) as handle:
                held = set(handle.keys())
                lost = sorted(names - held)
                if lost:
                    raise CheckpointError(f"{file} lacks {_some(lost)}, which {stem}{SUFFIX}.index.json says it holds")
                for name in sorted(names or held):
                    part = handle.get_slice(name)
                    code = part.get_dtype()
                    if code not in DTYPE_CODES:
                        known = ", ".join(DTYPE_CODES)
                        raise CheckpointError(f"{file}: {name} has dtype {code}; weights are one of {known}")
                    self.tensors[name] = TensorInfo(file, tuple(part.get_shape()), DTYPE_CODES[code])

    def read(self, name: str) -> Tensor:
        """Read a tensor to the CPU, in the dtype of the file.

        The file is mapped for this tensor alone, since a mapping that stays open counts as memory of this process.
        """
        with _opened(self.tensors[name].file) as handle:
            return handle.get_tensor(name)


def _files(folder: Path, stem: str) -> dict[Path, set[str]]:
    """Return each file with the names that the index expects in it; without an index, one file with no such names."""
    single, index = folder / f"{stem}{SUFFIX}", folder / f"{stem}{SUFFIX}.index.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    if index.is_file():
        files: dict[Path, set[str]] = {}
        for name, file in _read_index(index).items():
            files.setdefault(folder / file, set()).add(name)
        for file, names in files.items():
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; {index} says it holds {_some(sorted(names))}")
        return files
    if single.is_file():
        return {single: set()}
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if pickled:
        raise CheckpointError(
            f"{pickled[0]} is a pickle, which can run any code when it is read, so it is not; save the model as "
            "safetensors first (transformers: model.save_pretrained(folder))"
        )
    raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path, error=CheckpointError)["weight_map"]
        files = set(weight_map.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: no JSON with a weight_map of names to files") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or len(file.encode(errors="replace")) > LONGEST_NAME:
            raise CheckpointError(f"{path}: {file!r} is no file name in the same folder")
    return weight_map


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or truncated: {' '.join(str(error).split())}") from error


def _some(names: list[str]) -> str:
    """Return the first of many names, for a message of one line."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(islice(names, 3)) + more


def write_tensor_files(
    folder: Path,
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    values: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    single: str = SINGLE,
) -> None:
    """Write tensors one after the other into one file, or into several with an index, named as by transformers.

    Args:
        folder: an existing folder without weights.
        shapes: shape and dtype of every tensor, in the order in which `values` yields them.
        values: names and CPU tensors, which are cast to the dtype in `shapes`.
        shard_bytes: bytes of a file, which ends before the tensor that would make it larger.
        single: name of the file if there is only one.

    Raises:
        OSError: the disk is full, or cannot be written for another reason.
    """
    shards = _plan(shapes, shard_bytes)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [single]
    stream = iter(values)
    for file, names in zip(files, shards):
        with open(folder / file, "wb") as output:
            output.write(_header({name: shapes[name] for name in names}))
            for expected in names:
                name, value = next(stream)
                shape, dtype = shapes[expected]
                assert name == expected and value.shape == shape, f"{name} {tuple(value.shape)} came for {expected}"
                output.write(value.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            output.flush()
            os.fsync(output.fileno())
    if len(shards) > 1:
        total = sum(_num_bytes(*shape) for shape in shapes.values())
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _plan(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = _num_bytes(*shape)
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _header(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """Return a safetensors header: its length in 8 bytes, then JSON, padded with spaces to align the values."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + _num_bytes(shape, dtype)
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

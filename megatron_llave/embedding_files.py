"""Many inputs from a JSONL file, their embeddings into .npy or Parquet, a part at a time: tools/embed.py.

A line is {"text": ..., "image": FILE or [FILES], "id": ...}: a text, pictures, or both; files are relative to the
JSONL's folder, the id defaults to the line's number.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from megatron_llave.batch import Side
from megatron_llave.errors import DataError

KEYS = ("id", "text", "image")
SUFFIXES = (".npy", ".parquet")
Write = Callable[[list[str], Tensor], None]


@dataclass(frozen=True)
class InputLine:
    """One line of the file, its pictures not yet read."""

    id: str
    text: str
    images: list[Path]


class InputLines(Mapping[str, Side]):
    """Consecutive lines as the inputs of embedding.embed; a picture is read when its input is asked for."""

    def __init__(self, path: Path, first: int, lines: list[InputLine]) -> None:
        self.lines = {f"{path}:{first + index}": line for index, line in enumerate(lines)}

    def __getitem__(self, key: str) -> Side:
        """The input of the line that `key` (FILE:LINE) names."""
        return Side.read(self.lines[key].text, *self.lines[key].images)

    def __iter__(self) -> Iterator[str]:
        """FILE:LINE of each."""
        return iter(self.lines)

    def __len__(self) -> int:
        """How many."""
        return len(self.lines)

    @property
    def ids(self) -> list[str]:
        """Their ids."""
        return [line.id for line in self.lines.values()]


def read_lines(path: str | Path) -> Iterator[InputLine]:
    """The file's lines, one after the other.

    Raises:
        DataError: names file, line, and what is wrong with it.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, text in enumerate(file, start=1):
                yield _parse(text, f"{path}:{number}", path.parent, str(number))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error


def _parse(text: str, place: str, folder: Path, number: str) -> InputLine:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{place}: must be an object with {', '.join(KEYS)}")
    unknown = sorted(values.keys() - set(KEYS))
    if unknown:
        raise DataError(f"{place}: unknown key {unknown[0]!r}; known keys: {', '.join(KEYS)}")
    written, images = values.get("text", ""), values.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(written, str):
        raise DataError(f"{place}: text must be a string, not {written!r}")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{place}: image must be a file name or a list of them, not {images!r}")
    if not written and not images:
        raise DataError(f"{place}: neither text nor image")
    return InputLine(str(values.get("id", number)), written, [folder / image for image in images])


def count_lines(path: str | Path) -> int:
    """Number of lines, each of them checked and its pictures looked for: before hours of work, not after.

    Raises:
        DataError: a line is malformed, or names a picture that is not there.
    """
    number = 0
    for number, line in enumerate(read_lines(path), start=1):
        for image in line.images:
            if not image.is_file():
                raise DataError(f"{path}:{number}: picture {image} does not exist")
    return number


def read_parts(path: str | Path, size: int) -> Iterator[InputLines]:
    """The file's inputs, `size` at a time."""
    lines: list[InputLine] = []
    first = 1
    for line in read_lines(path):
        lines.append(line)
        if len(lines) == size:
            yield InputLines(Path(path), first, lines)
            first, lines = first + size, []
    if lines:
        yield InputLines(Path(path), first, lines)


@contextmanager
def embedding_file(path: str | Path, num_rows: int, width: int, model: str) -> Iterator[Write]:
    """A file of embeddings that is there whole or not at all.

    .npy: float32 [num_rows, width]. Parquet: columns id (string) and embedding (fixed-size list of float32), a row
    group for each part, `model` in the schema's metadata.

    Yields:
        write(ids, embeddings [n, width]) for each part in turn.

    Raises:
        DataError: the suffix is unknown, or the file cannot be written (a full disk); nothing is left of it then.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} must end in {' or '.join(SUFFIXES)}")
    partial = path.with_name(f"{path.name}.partial")
    open_file = _open_npy if path.suffix == ".npy" else _open_parquet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_file(partial, num_rows, width, model) as write:
            yield write
        os.replace(partial, path)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open_npy(path: Path, num_rows: int, width: int, model: str) -> Iterator[Write]:
    # Written in order and not through a memory map, which dies of a full disk without an error.
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda ids, embeddings: file.write(embeddings.cpu().numpy().astype("<f4").tobytes())


@contextmanager
def _open_parquet(path: Path, num_rows: int, width: int, model: str) -> Iterator[Write]:
    fields = [("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata={"model": model})
    with pq.ParquetWriter(path, schema) as writer:

        def write(ids: list[str], embeddings: Tensor) -> None:
            values = pa.array(embeddings.cpu().numpy().ravel())
            rows = pa.FixedSizeListArray.from_arrays(values, width)
            writer.write_table(pa.table([pa.array(ids, pa.string()), rows], schema=schema))

        yield write

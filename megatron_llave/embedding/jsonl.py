"""Reads the inputs of a JSONL file, for tools/embed.py and for retrieval on the user's own data.

A line is {"text": ..., "image": FILE or [FILES], "id": ...}: a text, images, or both. Files are relative to the JSONL's
folder; the id defaults to the line's number.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError

KEYS = ("id", "text", "image")


def read_lines(path: str | Path) -> Iterator[Input]:
    """The file's inputs one after the other; image files are relative to the file's folder where they lie in it.

    Raises:
        DataError: names the file, the line, and what is wrong with it.
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


def _parse(line: str, where: str, folder: Path, number: str) -> Input:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be an object with {', '.join(KEYS)}")
    unknown = sorted(values.keys() - set(KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(KEYS)}")
    text, images = values.get("text", ""), values.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(text, str):
        raise DataError(f"{where}: text must be a string, not {text!r}")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}: image must be a file name or a list of them, not {images!r}")
    if not text and not images:
        raise DataError(f"{where}: neither text nor image")
    return Input(text, tuple(_relative(folder / image, folder) for image in images), id=str(values.get("id", number)))


def _relative(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def count_lines(path: str | Path) -> int:
    """Number of lines. Checks each line and that its images exist, before hours of work and not after.

    Raises:
        DataError: a line is malformed, or an image does not exist.
    """
    number = 0
    for number, line in enumerate(read_lines(path), start=1):
        for image in line.files:
            if not (Path(path).parent / image).is_file():
                raise DataError(f"{path}:{number}: image {Path(path).parent / image} does not exist")
    return number


def read_parts(path: str | Path, size: int) -> Iterator[Inputs]:
    """The file's inputs, `size` at a time; their keys begin with FILE:LINE."""
    lines, first = read_lines(path), 1
    while part := list(islice(lines, size)):
        yield Inputs(str(path), part, Path(path).parent, first, separator=":")
        first += len(part)

"""Inputs to embed from JSONL files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llave.batch import Side
from megatron_llave.errors import DataError

KEYS = ("id", "text", "image")


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

"""Reads the inputs of a JSONL file, for tools/embed.py and for retrieval on the user's own data.

A line is an item (data/items.py). Files are relative to the JSONL's folder; the id defaults to the line's number.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_llave.data.items import parse_item, read_jsonl
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError


def read_lines(path: str | Path) -> Iterator[tuple[int, Input]]:
    """The number of each line that is not blank, and its input; image files are relative to the file's folder.

    A file that does not lie in that folder keeps its whole path.

    Raises:
        DataError: names the file, the line, and what is wrong with it.
    """
    folder = Path(path).parent
    for number, where, values in read_jsonl(path):
        item = parse_item(values, where)
        if not item.text and not item.images:
            raise DataError(f"{where}: neither text nor image")
        images = tuple(_relative(folder / image, folder) for image in item.images)
        yield number, Input(item.text, images, id=item.id or str(number))


def _relative(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def count_lines(path: str | Path) -> int:
    """Number of inputs. Checks each line and that its images exist, before hours of work and not after.

    Raises:
        DataError: a line is malformed, or an image does not exist.
    """
    count = 0
    for number, line in read_lines(path):
        count += 1
        for image in line.files:
            if not (Path(path).parent / image).is_file():
                raise DataError(f"{path}:{number}: image {Path(path).parent / image} does not exist")
    return count


def read_parts(path: str | Path, size: int) -> Iterator[Inputs]:
    """The file's inputs, at most `size` at a time; their keys begin with FILE:LINE. A blank line ends a part."""
    first, part = 1, []
    for number, line in read_lines(path):
        if part and (len(part) == size or number != first + len(part)):
            yield Inputs(str(path), part, Path(path).parent, first, separator=":")
            part = []
        first = first if part else number
        part.append(line)
    if part:
        yield Inputs(str(path), part, Path(path).parent, first, separator=":")

"""Reads the inputs of a JSONL file, for llave embed and for retrieval on the user's own data.

A line is an item (data/items.py). Files are relative to the JSONL's folder; the id defaults to the line's number.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_llave.data.items import parse_item, read_jsonl
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError


def read_inputs(path: str | Path) -> Iterator[tuple[int, Input]]:
    """Yield the number of each line that is not blank, and its input; image files are relative to the file's folder.

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
        name = item.id or str(number)
        yield number, Input(item.text, images, id=name, is_video=item.is_video, seconds=item.seconds)


def _relative(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def read_blocks(path: str | Path, size: int) -> Iterator[Inputs]:
    """Yield the file's inputs, `size` at a time, so that memory does not grow with the file; keys begin with FILE:LINE.

    Raises:
        DataError: as `read_inputs` does.
    """
    lines, first = read_inputs(path), 0
    while block := list(islice(lines, size)):
        numbers, entries = zip(*block)
        hint = f"they start from the folder of {path}"
        yield Inputs(str(path), entries, Path(path).parent, first, hint, numbers)
        first += len(block)


def count_inputs(path: str | Path, size: int, requires_files: bool = True) -> int:
    """Number of inputs. Checks each line and, if asked, that its images exist, before hours of work and not after.

    Raises:
        DataError: a line is malformed, an image does not exist, two inputs have one id, or there is no input.
    """
    hashes = []  # of ids, 8 bytes each, because the ids themselves might not fit into memory
    for block in read_blocks(path, size):
        if requires_files:
            block.require_files()
        hashes.append(np.array([hash(item.id) for item in block.entries]))
    if not hashes:
        raise DataError(f"{path} has no lines")
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    for twice in values[counts > 1][:1]:
        (first, item), (second, _), *_ = ((n, item) for n, item in read_inputs(path) if hash(item.id) == twice)
        raise DataError(f"{path}:{second}: the id {item.id!r} is that of line {first} too; an id defaults to the line")
    return int(counts.sum())

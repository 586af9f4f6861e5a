"""Reads the inputs of a folder of training shards, for llave embed --shards and for scripts of other models.

Every query, target and hard negative comes once, under the name by which training looks its embedding up
(data/stored_vectors.py).
"""

import logging
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from megatron_llave.batch import Pair, Side
from megatron_llave.data.index import Shard, read_index
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.shards import described_sides, unpack_described, well_described
from megatron_llave.data.storage import Storage
from megatron_llave.data.stored_vectors import query_name, target_name
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SHARD_BLOCK = 2048
"""Number of inputs of shards that are in memory at a time, with their images."""


def read_shard_inputs(folder: str | Path) -> Iterator[tuple[str, Side]]:
    """Yield name and input of each different query, target and hard negative in a local folder of shards.

    Of inputs with one name the first one counts. A pair that cannot be read is left out, as training does, and the
    first rank says so.

    Raises:
        DataError: the folder or its index cannot be used.
    """
    seen: set[int] = set()
    for pair in _read_all(folder, ShardReader.read, os.environ.get("RANK", "0") == "0"):
        for name, side in _sides(pair):
            if hash(name) not in seen:
                seen.add(hash(name))
                yield name, side


def _read_all(folder: str | Path, read: Callable[[ShardReader, Shard, int], Result], warns: bool) -> Iterator[Result]:
    """Yield what `read` returns for each pair, but not for those that cannot be read."""
    reader = ShardReader(Storage(str(folder), None), 1)
    for subset in read_index(folder).subsets.values():
        for shard in subset.shards:
            for number in range(shard.pairs):
                try:
                    result = read(reader, shard, number)
                except DataError as error:
                    if warns:
                        logger.warning("left out %s", error)
                    continue
                yield result


def _sides(pair: Pair) -> Iterator[tuple[str, Side]]:
    yield query_name(pair.subset, pair.query_id), pair.query
    names, sides = pair.target_ids + pair.hard_negative_ids, pair.targets + pair.hard_negatives
    for name, side in zip(names, sides):
        yield target_name(pair.subset, name), side


def read_shard_blocks(folder: str | Path, size: int) -> Iterator[Inputs]:
    """Yield the folder's inputs, `size` at a time; their images are in memory.

    Raises:
        DataError: as `read_shard_inputs` does.
    """
    sides, first = read_shard_inputs(folder), 0
    while block := list(islice(sides, size)):
        entries = [
            Input(side.text, tuple(side.images), id=name, is_video=side.is_video, seconds=side.seconds)
            for name, side in block
        ]
        yield Inputs(str(folder), entries, folder, first)
        first += len(block)


def count_shard_inputs(folder: str | Path) -> tuple[int, int]:
    """Return the number of names in a folder of shards, and how many of them have inputs that differ; reads no images.

    Images are compared by the checksums in the shards; where shards have none, inputs of equal texts count as equal. A
    pair that cannot be read is left out, as `read_shard_inputs` does, but not for what is wrong with an image. Nothing
    is said of it, since reading the inputs does.

    Raises:
        DataError: the folder or its index cannot be used, or an id has more than one line.
    """
    seen: dict[int, int] = {}
    differing: set[int] = set()
    for where, sides in _read_all(folder, _names_and_contents, warns=False):
        for name, contents in sides:
            if not name.isprintable():
                raise DataError(f"{where}: the id {name!r} is not of printable characters")
            if seen.setdefault(hash(name), contents) != contents:
                differing.add(hash(name))
    return len(seen), len(differing)


def _names_and_contents(reader: ShardReader, shard: Shard, number: int) -> tuple[str, list[tuple[str, int]]]:
    """The name of a sample for messages; name, and a hash of the contents, of each of its inputs."""
    described, where = reader.describe(shard, number)
    with well_described(where):
        query, targets, negatives = described_sides(described)
        sides = [query, *targets, *negatives]
        # Without the checksums, images that are not read are as good as right ones.
        contents = [hash((side["text"], *side.pop("crc32", ()), *side.get("seconds", ()))) for side in sides]
        images = dict.fromkeys((image for side in sides for image in side["images"]), b"")
        pair = unpack_described(described, {"__key__": "", **images}, where)
    return where, list(zip((name for name, _ in _sides(pair)), contents))

"""Reads the inputs of a folder of training shards, for tools/embed.py --shards and for scripts of other models.

Every query, target and hard negative comes once, under the name by which training looks its embedding up
(data/stored_vectors.py).
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_llave.batch import Pair, Side
from megatron_llave.data.index import read_index
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.storage import Storage
from megatron_llave.data.stored_vectors import query_name, target_name
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import DataError
from megatron_llave.planning.pair_lengths import read_descriptions

logger = logging.getLogger(__name__)


def read_shard_inputs(folder: str | Path) -> Iterator[tuple[str, Side]]:
    """Yield name and input of each different query, target and hard negative in a local folder of shards.

    Of inputs with one name the first one counts. A pair that cannot be read is left out, as training does.

    Raises:
        DataError: the folder or its index cannot be used.
    """
    seen: set[int] = set()
    reader = ShardReader(Storage(str(folder), None), 1)
    for subset in read_index(folder).subsets.values():
        for shard in subset.shards:
            for number in range(shard.pairs):
                try:
                    pair = reader.read(shard, number)
                except DataError as error:
                    logger.warning("left out %s", error)
                    continue
                for name, side in _sides(pair):
                    if hash(name) not in seen:
                        seen.add(hash(name))
                        yield name, side


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

    Raises:
        DataError: the folder or a shard cannot be used, or an id has more than one line.
    """
    seen: dict[int, int] = {}
    differing: set[int] = set()
    for subset in read_index(folder).subsets.values():
        for shard in subset.shards:
            for described, where in read_descriptions(Path(folder) / shard.file):
                for name, side in _described_sides(described, where):
                    if not name.isprintable():
                        raise DataError(f"{where}: the id {name!r} is not of printable characters")
                    contents = hash((side["text"], *side.get("crc32", ()), *side.get("seconds", ())))
                    if seen.setdefault(hash(name), contents) != contents:
                        differing.add(hash(name))
    return len(seen), len(differing)


def _described_sides(pair: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        subset = pair["subset"]
        yield query_name(subset, pair["query"]["id"]), pair["query"]
        for side in (pair["target"], *pair.get("further_targets", ()), *pair.get("hard_negatives", ())):
            yield target_name(subset, side["id"]), side
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: its .json member is malformed; prepare_data.py verify says more") from error

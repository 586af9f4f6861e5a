"""Whether mined negatives and a mined order are right for the shards that they are of (`llave prepare verify --data`).

audit.py checks the bytes of the files of negatives; this compares ids and keys with those of the pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llave.data import mined_negatives, order
from megatron_llave.data.index import INDEX_FILE, Index, Shard, read_index, require_same_shards
from megatron_llave.data.mined_negatives import MANIFEST_FILE, MinedShard, parse_manifest
from megatron_llave.data.order import ORDER_FILE, parse_order, require_same_pairs
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.shards import NEGATIVES, described_sides, unpack_pair, well_described
from megatron_llave.data.storage import Storage
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.prepare.shard_jobs import Progress


@dataclass
class _Pairs:
    """What the pairs of a subset have, as far as their JSON can be read."""

    queries: list[dict[str, str | None] | None] = field(default_factory=list)
    """For each shard, key -> query id of each pair in order, None if it cannot be read; None: the shard cannot."""
    positives: dict[str, set[str]] = field(default_factory=dict)
    """Query id -> target ids of all pairs with the query."""
    targets: set[str] = field(default_factory=set)
    """Ids of all targets and hard negatives."""
    is_complete: bool = True
    """Whether all shards can be read, so that `targets` has the ids of all that mining could read."""


def files_in(directory: str | Path) -> list[str]:
    """Which of index.json, negatives.json and order.json a folder has."""
    return [name for name in (INDEX_FILE, MANIFEST_FILE, ORDER_FILE) if (Path(directory) / name).is_file()]


def misfits(directory: str | Path, data: str | Path | None, progress: Progress) -> Iterator[str]:
    """Yield a line for each fault of what was mined.

    Args:
        directory: a folder with mined negatives or an order, or both.
        data: the local folder of shards; None: negatives are not compared with it, and an order is by itself, or with
            the shards of its folder if it lies among some.
        progress: called after each file of negatives.

    Raises:
        ConfigError: `data` is given, and the folder has neither.
        DataError: the index of the data, or the manifest of the negatives, cannot be read.
    """
    directory, found = Path(directory), files_in(directory)
    if data is not None and not {MANIFEST_FILE, ORDER_FILE} & {*found}:
        raise ConfigError(f"--data {data} is for mined negatives and orders, but {directory} holds neither of them")
    if MANIFEST_FILE in found:
        yield from _misfits_of_negatives(directory, None if data is None else Path(data), progress)
    if ORDER_FILE in found:
        beside = directory if INDEX_FILE in found else None
        yield from _misfits_of_order(directory / ORDER_FILE, beside if data is None else Path(data))


def _misfits_of_order(path: Path, data: Path | None) -> Iterator[str]:
    index = None if data is None else read_index(data, check_shards=False)
    try:
        mined = parse_order(path, str(path))
    except DataError as error:
        yield str(error)
        return
    for name in mined.subsets if index is not None else ():
        try:
            require_same_pairs(mined, index, name, str(path))
        except DataError as error:
            yield str(error)
    if not mined.subsets:
        yield f"{path} has no subsets; {order.AGAIN}"


def _misfits_of_negatives(directory: Path, data: Path | None, progress: Progress) -> Iterator[str]:
    path = directory / MANIFEST_FILE
    subsets = parse_manifest(path, str(path)).subsets
    if not subsets:
        yield f"{path} has no subsets; {mined_negatives.AGAIN}"
    if data is None:
        return
    index = read_index(data, check_shards=False)
    done, total = 0, sum(map(len, subsets.values()))
    for name, mined in subsets.items():
        try:
            made_of = [(one.shard.file, one.of) for one in mined]
            require_same_shards(index, name, made_of, str(path), mined_negatives.AGAIN)
        except DataError as error:
            yield str(error)
            continue
        pairs, reader = _Pairs(), ShardReader(Storage(str(data), None), 1)
        for shard in index.subsets[name].shards:
            try:
                _read(reader, shard, pairs)
            except DataError as error:
                pairs.queries.append(None)
                pairs.is_complete = False
                yield str(error)
        for number, one in enumerate(mined):
            yield from _misfits_of_shard(directory, one, pairs, number, (reader, index, name))
            progress("files of negatives", done := done + 1, total)


def _read(reader: ShardReader, shard: Shard, pairs: _Pairs) -> None:
    keys = reader.keys(shard)
    queries: dict[str, str | None] = dict.fromkeys(keys)
    pairs.queries.append(queries)
    for number, key in enumerate(keys):
        try:
            described, where = reader.describe(shard, number)
            with well_described(where):
                query, targets, negatives = described_sides(described)
                names = [side["id"] for side in targets]
                pairs.positives.setdefault(query["id"], set()).update(names)
                pairs.targets.update(names, (side["id"] for side in negatives))
                queries[key] = query["id"]
        except DataError:  # mining leaves it out
            continue


def _misfits_of_shard(
    directory: Path, mined: MinedShard, pairs: _Pairs, number: int, data: tuple[ShardReader, Index, str]
) -> Iterator[str]:
    """Compare a file of negatives with the pairs of its shard, as far as both can be read."""
    beside, queries = ShardReader(Storage(str(directory), None), 1), pairs.queries[number]
    path = directory / mined.shard.file
    if queries is None:
        return
    try:
        keys = beside.keys(mined.shard)
    except DataError:
        return
    reader, index, name = data
    shard, known = index.subsets[name].shards[number], set(keys)
    for key in [key for key, query in queries.items() if query is not None and key not in known]:
        if _can_be_read(reader, shard, key):
            yield f"{path} has no sample {key}, which the data's {shard.file} has; {mined_negatives.AGAIN}"
    for place, key in enumerate(keys):
        where = f"{path}: sample {key}"
        if key not in queries:
            yield f"{where} is of no pair of the data's {shard.file}; {mined_negatives.AGAIN}"
            continue
        try:
            described, _ = beside.describe(mined.shard, place)
            with well_described(where):
                wrong = _wrong_ids(described, queries[key], pairs)
        except DataError:
            continue
        yield from (f"{where}: {what}; {mined_negatives.AGAIN}" for what in wrong)


def _can_be_read(reader: ShardReader, shard: Shard, key: str) -> bool:
    try:
        unpack_pair(*reader.members(shard, key))
    except DataError:
        return False
    return True


def _wrong_ids(described: dict[str, Any], query: str | None, pairs: _Pairs) -> list[str]:
    if query is None:
        return []
    if described["query"] != query:
        return [f"is of query {described['query']!r}, the data's pair is of {query!r}"]
    wrong = []
    for number, entry in enumerate(described[NEGATIVES]):
        if entry["id"] in pairs.positives[query]:
            wrong.append(f"negative {number} has the id {entry['id']!r} of a positive of its query {query!r}")
        elif pairs.is_complete and entry["id"] not in pairs.targets:
            wrong.append(f"negative {number} has the id {entry['id']!r}, which no target of the subset has")
    return wrong

"""Pairs on disk: WebDataset tar shards, which index.py describes as a whole.

The first stage of the data pipeline, and the last step of every source. A sample is `KEY.json` (subset, ids, texts,
names and sizes of the images) and one member per image, byte for byte as it came (`KEY.query.0.jpg`, and
`KEY.negative.2.0.jpg` for the first image of hard negative 2, both counted from 0). Members are read as raw bytes:
nothing is decoded by file extension, so nothing is ever unpickled.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from webdataset import TarWriter

from megatron_llave.batch import Pair, Side
from megatron_llave.data.index import Shard, Subset
from megatron_llave.data.tar_members import KEY, find_samples, read_sample, unreadable
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN, atomic_write

SUFFIXES = {"JPEG": "jpg"}


class _HashingFile:
    """A binary file that is checksummed and counted while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write_samples(samples: Iterable[tuple[str, dict[str, bytes]]], path: str | Path) -> Shard:
    """Write (key, {suffix: bytes}) samples as one tar; the file takes its name only when it is whole.

    Raises:
        DataError: a key that WebDataset could not group, or one that comes twice.
    """
    path = Path(path)
    keys: set[str] = set()
    with atomic_write(path, only_writer=True) as temporary, open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        # A fixed mtime and owner: the same samples give the same bytes.
        with TarWriter(hashing, encoder=False, mtime=0, user="llave", group="llave") as writer:
            for key, members in samples:
                if not KEY.fullmatch(key):
                    raise DataError(f"{path}: key {key!r} must be 1 to 80 letters, digits, - or _, not __ first")
                if key in keys:
                    raise DataError(f"{path}: key {key!r} comes twice; keys must be unique in a shard")
                keys.add(key)
                writer.write({"__key__": key, **members})
    return Shard(path.name, len(keys), hashing.bytes, hashing.sha256.hexdigest())


def read_samples(path: str | Path) -> Iterator[dict[str, Any]]:
    """Stream the samples of one tar in order: `__key__` and the raw bytes of each member by its suffix.

    Raises:
        DataError: the file is missing, truncated, or no tar, or a sample's names cannot be used.
    """
    path = Path(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        for sample in find_samples(file, path):
            yield {"__key__": sample.key, **read_sample(file, path, sample)}


def pack_side(side: Side, prefix: str, where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Text, image names, sizes and CRC-32s of one side for the JSON, and its images by suffix (`<prefix>0.png`).

    Raises:
        DataError: an image whose header cannot be read; the message begins with `where`.
    """
    members: dict[str, bytes] = {}
    sizes = []
    for number, image in enumerate(side.images):
        try:
            with Image.open(io.BytesIO(image)) as header:
                image_format, size = header.format or "", header.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: image {prefix}{number} is not a picture that Pillow can read") from error
        members[f"{prefix}{number}.{SUFFIXES.get(image_format, image_format.lower())}"] = image
        sizes.append(list(size))
    described = {"text": side.text, "images": list(members), "sizes": sizes}
    if members:
        described["crc32"] = [zlib.crc32(image) for image in members.values()]
    return described, members


def unpack_side(described: Any, sample: dict[str, Any], where: str) -> Side:
    """The inverse of `pack_side`.

    Raises:
        DataError: the description is malformed, or an image that it names is missing or has another checksum.
    """
    try:
        text, names = described["text"], described["images"]
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: a side must be an object with text and images") from error
    if not isinstance(text, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: text must be a string and images a list of member names")
    for name in names:
        if name.startswith("__") or name not in sample:
            raise DataError(f"{where}: image member {name!r} is named in the JSON but not in the tar; {AGAIN}")
    images = [sample[name] for name in names]
    checksums = described.get("crc32", [])  # older shards have none
    if checksums and checksums != [zlib.crc32(image) for image in images]:
        raise DataError(f"{where}: an image's bytes are not those that its checksum was made of; {AGAIN}")
    return Side(text, images)


def unpack_json(sample: dict[str, Any], where: str) -> dict[str, Any]:
    """The JSON member of a sample.

    Raises:
        DataError: it is missing or no JSON object.
    """
    if "json" not in sample:
        raise DataError(f"{where} has no .json member; {AGAIN}")
    try:
        described = json.loads(sample["json"])
    except ValueError as error:
        raise DataError(f"{where}: its .json member is not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(described, dict):
        raise DataError(f"{where}: its .json member must be an object")
    return described


def to_json_bytes(value: Any) -> bytes:
    """Compact JSON with a fixed order of keys, so that equal values give equal bytes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def write_shard(pairs: Iterable[Pair], directory: str | Path, subset: str, number: int) -> Shard:
    """Write all of `pairs` as shard `number` of a subset, `<subset>-000000.tar`.

    Raises:
        DataError: a pair of another subset, an unusable or repeated key, or what `pack_pair` refuses.
    """
    path = Path(directory) / f"{subset}-{number:06d}.tar"

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for pair in pairs:
            where = f"{path}: pair {pair.key}"
            if pair.subset != subset:
                raise DataError(f"{where} belongs to subset {pair.subset!r}, not {subset!r}")
            yield pair.key, pack_pair(pair, where)

    return write_samples(samples(), path)


def pack_pair(pair: Pair, where: str) -> dict[str, bytes]:
    """The members of a pair's sample by suffix: its JSON, then its images.

    Raises:
        DataError: an unreadable image, or not one id per hard negative; the message begins with `where`.
    """
    if len(pair.hard_negative_ids) != len(pair.hard_negatives):
        counts = f"{len(pair.hard_negatives)} hard_negatives and {len(pair.hard_negative_ids)} hard_negative_ids"
        raise DataError(f"{where} has {counts}; there must be one id for each")
    query, query_images = pack_side(pair.query, "query.", where)
    target, target_images = pack_side(pair.target, "target.", where)
    described = {
        "subset": pair.subset,
        "query": {"id": pair.query_id, **query},
        "target": {"id": pair.target_id, **target},
    }
    images = {**query_images, **target_images}
    negatives = []
    for number, (name, side) in enumerate(zip(pair.hard_negative_ids, pair.hard_negatives)):
        negative, negative_images = pack_side(side, f"negative.{number}.", where)
        negatives.append({"id": name, **negative})
        images |= negative_images
    if negatives:
        described["hard_negatives"] = negatives
    return {"json": to_json_bytes(described), **images}


def write_subset(
    pairs: Iterable[Pair], directory: str | Path, subset: str, meta_task: str, pairs_per_shard: int = 1000
) -> Subset:
    """Write pairs as the shards of one subset; the folder is made when missing. The index is `write_index`'s.

    Raises:
        DataError: no pairs, a bad name, or what `write_shard` refuses.
    """
    if not KEY.fullmatch(subset):
        raise DataError(f"subset name {subset!r} must be letters, digits, - or _")
    Path(directory).mkdir(parents=True, exist_ok=True)
    stream = iter(pairs)
    shards: list[Shard] = []
    for first in stream:
        chunk = chain([first], islice(stream, pairs_per_shard - 1))
        shards.append(write_shard(chunk, directory, subset, len(shards)))
    if not shards:
        raise DataError(f"subset {subset!r} in {directory} would be empty; give it at least one pair")
    return Subset(meta_task, shards)


def unpack_pair(sample: dict[str, Any], where: str) -> Pair:
    """The inverse of `pack_pair`, from a sample of `read_samples`.

    Raises:
        DataError: the sample lacks its JSON or an image that the JSON names, or holds what the JSON does not name; the
            message begins with `where`.
    """
    described = unpack_json(sample, where)
    query = unpack_side(described.get("query"), sample, f"{where}, query")
    target = unpack_side(described.get("target"), sample, f"{where}, target")
    names = (described.get("subset"), described["query"].get("id"), described["target"].get("id"))
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: subset, query.id and target.id must be strings, not {names}")
    subset, query_id, target_id = names
    negatives, negative_ids = _unpack_hard_negatives(described, sample, where)
    sides = [described["query"], described["target"], *described.get("hard_negatives", [])]
    strange = sample.keys() - {"__key__", "json"} - {name for side in sides for name in side["images"]}
    if strange:
        raise DataError(f"{where}: its JSON does not name the members {', '.join(sorted(strange))}")
    return Pair(sample["__key__"], subset, query, target, query_id, target_id, negatives, negative_ids)


def _unpack_hard_negatives(
    described: dict[str, Any], sample: dict[str, Any], where: str
) -> tuple[list[Side], list[str]]:
    entries = described.get("hard_negatives", [])
    if not isinstance(entries, list):
        raise DataError(f"{where}: hard_negatives must be a list, not {entries!r}")
    sides = [unpack_side(entry, sample, f"{where}, hard negative {i}") for i, entry in enumerate(entries)]
    ids = [entry.get("id") for entry in entries]
    for number, name in enumerate(ids):
        if not isinstance(name, str):
            raise DataError(f"{where}, hard negative {number}: id must be a string, not {name!r}")
    return sides, ids

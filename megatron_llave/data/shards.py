"""The shards: WebDataset tar files of pairs, written and read. index.py has the index of a folder of them.

A sample is `KEY.json` (subset, ids, texts, scores, names and sizes of the images) and one member per image with the
bytes of the image file: `KEY.query.0.jpg`, or `KEY.negative.2.0.jpg` for the first image of the third hard negative.
Members are read as raw bytes. Nothing is decoded by file extension, so nothing is ever unpickled.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

from webdataset import TarWriter

from megatron_llave.batch import Pair, Side
from megatron_llave.data.image_files import BadImageError, open_image
from megatron_llave.data.index import Shard, Subset
from megatron_llave.data.tar_members import KEY, find_samples, read_sample, unreadable
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN, atomic_write, parse_json

SUFFIXES = {"JPEG": "jpg"}
FURTHER, NEGATIVES = "further_targets", "hard_negatives"
"""Keys of the lists in a sample's JSON."""
LARGEST_SCORE = 1e30
"""The largest magnitude of a score. float32 holds larger numbers, but not their quotient by a small temperature."""
SCORE_RANGE = f"from -{LARGEST_SCORE:g} to {LARGEST_SCORE:g}"
CHECKSUM = "json_crc32"
"""Last key of a sample's JSON, which holds the CRC-32 of the JSON without it."""


class _HashingFile:
    """A binary file whose checksum and size are computed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write_samples(samples: Iterable[tuple[str, dict[str, bytes]]], path: str | Path) -> Shard:
    """Write (key, {suffix: bytes}) samples as one tar file, which takes its name only when it is complete.

    Raises:
        DataError: a key cannot be grouped by WebDataset, or occurs twice.
    """
    path = Path(path)
    keys: set[str] = set()
    with atomic_write(path, only_writer=True) as temporary, open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        # With a fixed mtime and owner the same samples give the same bytes.
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
    """Yield the samples of a tar file in order, each as `__key__` and the raw bytes of each member by its suffix.

    Raises:
        DataError: the file is missing, truncated or not a tar file, or the names of a sample cannot be used.
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
    """Return what the JSON says of one query or target, and its images by suffix (`<prefix>0.png`).

    The JSON has the text, the names, sizes and CRC-32s of the images, and where these are a video's frames "video", and
    "seconds" if it is known when each was taken.

    Raises:
        DataError: the header of an image cannot be read; the message begins with `where`.
    """
    members: dict[str, bytes] = {}
    sizes = []
    for number, image in enumerate(side.images):
        try:
            header = open_image(image)
        except BadImageError as error:
            raise DataError(f"{where}: image {prefix}{number} is not an image: {error}") from error
        image_format = header.format or ""
        members[f"{prefix}{number}.{SUFFIXES.get(image_format, image_format.lower())}"] = image
        sizes.append(list(header.size))
    described = {"text": side.text, "images": list(members), "sizes": sizes}
    if side.is_video:
        described["video"] = True
    if side.seconds:
        described["seconds"] = list(side.seconds)
    if members:
        described["crc32"] = [zlib.crc32(image) for image in members.values()]
    return described, members


def unpack_side(described: Any, sample: dict[str, Any], where: str) -> Side:
    """Return the query or target that `pack_side` has described; `sample` holds its images.

    Raises:
        DataError: the description is malformed, or an image that it names is missing or has another checksum.
    """
    try:
        text, names = described["text"], described["images"]
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: a side must be an object with text and images") from error
    if not isinstance(text, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: text must be a string and images a list of member names")
    seconds = described.get("seconds", [])
    if not isinstance(seconds, list):
        raise DataError(f"{where}: seconds must be a list of numbers, not {seconds!r:.60}")
    for name in names:
        if name.startswith("__") or name not in sample:
            raise DataError(f"{where}: image member {name!r} is named in the JSON but not in the tar; {AGAIN}")
    images = [sample[name] for name in names]
    checksums = described.get("crc32", [])  # older shards have none
    if checksums and checksums != [zlib.crc32(image) for image in images]:
        raise DataError(f"{where}: an image's bytes are not those that its checksum was made of; {AGAIN}")
    try:
        return Side(text, images, is_video=described.get("video") is True, seconds=tuple(seconds))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def unpack_json(sample: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the JSON member of a sample.

    Raises:
        DataError: the member is missing, is not a JSON object, or is not what its checksum was made of.
    """
    if "json" not in sample:
        raise DataError(f"{where} has no .json member; {AGAIN}")
    content = sample["json"]
    described = parse_json(content, f"{where}: its .json member")
    if not isinstance(described, dict):
        raise DataError(f"{where}: its .json member must be an object")
    checksum = described.pop(CHECKSUM, None)  # older shards have none
    body, _, _ = content.rpartition(f',"{CHECKSUM}":'.encode())
    if checksum is not None and checksum != zlib.crc32(body + b"}"):
        raise DataError(f"{where}: its .json member is not what its checksum was made of; {AGAIN}")
    return described


def described_sides(described: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what a pair's JSON says of its query, of its targets and of its hard negatives.

    Raises:
        KeyError, TypeError: one is missing or of another type; `well_described` makes a clear error of them.
    """
    targets = [described["target"], *described.get(FURTHER, [])]
    return described["query"], targets, [*described.get(NEGATIVES, [])]


@contextmanager
def well_described(where: str) -> Iterator[None]:
    """Turn what a pair's malformed JSON raises where it is used into a DataError that begins with `where`."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: its .json member is malformed; llave prepare verify says more") from error


def to_json_bytes(value: dict[str, Any]) -> bytes:
    """Return compact JSON that ends with the CRC-32 of what it would be without it.

    Keys stay in their order, so that equal values give equal bytes.
    """
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return body[:-1] + f',"{CHECKSUM}":{zlib.crc32(body)}}}'.encode()


def write_shard(pairs: Iterable[Pair], directory: str | Path, subset: str, number: int) -> Shard:
    """Write all of `pairs` as shard `number` of a subset, `<subset>-000000.tar`.

    Raises:
        DataError: a pair is of another subset, a key is unusable or repeated, or `pack_pair` refuses a pair.
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
    """Return the members of a pair's sample by suffix: the JSON, then the images.

    Raises:
        DataError: an image is unreadable, or `check_pair` refuses the pair; the message begins with `where`.
    """
    check_pair(pair, where)
    query, images = pack_side(pair.query, "query.", where)
    described: dict[str, Any] = {"subset": pair.subset, "query": {"id": pair.query_id, **query}}
    sides = pair.targets + pair.hard_negatives
    prefixes = ["target.", *(f"further_target.{number}." for number in range(len(pair.further_targets)))]
    prefixes += [f"negative.{number}." for number in range(len(pair.hard_negatives))]
    entries = []
    for number, (name, side) in enumerate(zip(pair.target_ids + pair.hard_negative_ids, sides)):
        entry, of_side = pack_side(side, prefixes[number], where)
        entries.append({"id": name, **entry, **({"score": pair.scores[number]} if pair.scores else {})})
        images |= of_side
    described["target"] = entries[0]
    several = {FURTHER: entries[1 : len(pair.targets)], NEGATIVES: entries[len(pair.targets) :]}
    described |= {key: value for key, value in several.items() if value}
    return {"json": to_json_bytes(described), **images}


def check_pair(pair: Pair, where: str) -> None:
    """Raise a DataError that begins with `where` if targets, hard negatives, their ids and scores do not go together.

    That an id comes twice matters only with several targets or scores; masks handle it in plain pairs.
    """
    for kind, ids, sides in (
        (NEGATIVES, pair.hard_negative_ids, pair.hard_negatives),
        (FURTHER, pair.further_target_ids, pair.further_targets),
    ):
        if len(ids) != len(sides):
            counts = f"{len(sides)} {kind} and {len(ids)} {kind[:-1]}_ids"
            raise DataError(f"{where} has {counts}; there must be one id for each")
    num_targets = len(pair.targets)
    if not pair.scores and num_targets == 1:
        return
    repeated = [name for name, number in Counter(pair.target_ids + pair.hard_negative_ids).items() if number > 1]
    if repeated:
        raise DataError(f"{where}: the id {repeated[0]!r} comes twice among its targets and hard negatives")
    sides = f"{num_targets} targets and {len(pair.hard_negatives)} hard negatives"
    if pair.scores and len(pair.scores) != num_targets + len(pair.hard_negatives):
        raise DataError(f"{where} has {len(pair.scores)} scores for {sides}; there must be one for each, or none")
    for score in pair.scores:
        if not is_score(score):
            raise DataError(f"{where}: a score must be a number {SCORE_RANGE}, not {score!r:.60}")


def is_score(value: Any) -> bool:
    """Whether a value can be a score: a number from -LARGEST_SCORE to LARGEST_SCORE."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= LARGEST_SCORE


def write_subset(
    pairs: Iterable[Pair], directory: str | Path, subset: str, meta_task: str, pairs_per_shard: int = 1000
) -> Subset:
    """Write pairs as the shards of one subset into a folder, which is made when missing; index.json is not written.

    Raises:
        DataError: there are no pairs, the subset's name cannot be used, or `write_shard` refuses a pair.
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
    """Return the pair that `pack_pair` has turned into the members of this sample, which also has its `__key__`.

    Raises:
        DataError: the sample lacks its JSON or an image that the JSON names, or has a member that the JSON does not
            name; the message begins with `where`.
    """
    return unpack_described(unpack_json(sample, where), sample, where)


def unpack_described(described: dict[str, Any], sample: dict[str, Any], where: str) -> Pair:
    """Do the same as `unpack_pair`, with the JSON of the sample read already."""
    query = unpack_side(described.get("query"), sample, f"{where}, query")
    target = unpack_side(described.get("target"), sample, f"{where}, target")
    names = (described.get("subset"), described["query"].get("id"), described["target"].get("id"))
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: subset, query.id and target.id must be strings, not {names}")
    subset, query_id, target_id = names
    further, further_ids = unpack_list(FURTHER, "further target", described, sample, where)
    negatives, negative_ids = unpack_list(NEGATIVES, "hard negative", described, sample, where)
    entries = [*chain(*described_sides(described)[1:])]
    strange = sample.keys() - {"__key__", "json"}
    strange -= {name for side in (described["query"], *entries) for name in side["images"]}
    if strange:
        raise DataError(f"{where}: its JSON does not name the members {', '.join(sorted(strange))}")
    scores = [entry["score"] for entry in entries if "score" in entry]
    pair = Pair(sample["__key__"], subset, query, target, query_id, target_id, negatives, negative_ids)
    pair.further_targets, pair.further_target_ids, pair.scores = further, further_ids, scores
    check_pair(pair, where)
    return pair


def unpack_list(
    key: str, kind: str, described: dict[str, Any], sample: dict[str, Any], where: str
) -> tuple[list[Side], list[str]]:
    """Return the sides that the JSON lists under a key, and their ids; `sample` holds their images.

    Raises:
        DataError: the list is malformed, or as `unpack_side` does; the message begins with `where`.
    """
    entries = described.get(key, [])
    if not isinstance(entries, list):
        raise DataError(f"{where}: {key} must be a list, not {entries!r}")
    sides = [unpack_side(entry, sample, f"{where}, {kind} {i}") for i, entry in enumerate(entries)]
    ids = [entry.get("id") for entry in entries]
    for number, name in enumerate(ids):
        if not isinstance(name, str):
            raise DataError(f"{where}, {kind} {number}: id must be a string, not {name!r}")
    return sides, ids

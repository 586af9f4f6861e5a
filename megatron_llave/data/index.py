"""The index of a folder of shards, `index.json`: the subsets and their tar files with sizes and checksums.

Every source writes it last, and the training stream reads it first. shards.py reads and writes the tar files.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_llave.config.data import META_TASKS
from megatron_llave.data.tar_members import KEY
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN, VERSION, read_json, write_json
from megatron_llave.locks import lock_folder

FORMAT = "megatron_llave pairs"
INDEX_FILE = "index.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
"""Names of shards: plain, so that an index cannot name files elsewhere, and short enough for every file system."""
SHA256 = re.compile("[0-9a-f]{64}")
SMALLEST_SAMPLE = 1024
"""Bytes of the smallest sample in a tar file: a header and a block of contents."""
MOST_PAIRS = 10**7
"""The most pairs of a shard; the order of the pairs of a shard is drawn in memory."""


@dataclass(frozen=True)
class Shard:
    """The index's entry for one tar file."""

    file: str
    """Name of the file in the folder of the index."""
    pairs: int
    """Number of samples in the file."""
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """SHA-256 of the file in hexadecimal."""


@dataclass(frozen=True)
class Subset:
    """The index's entry for one subset."""

    meta_task: str
    """One of META_TASKS."""
    shards: list[Shard]
    """The shards in the order of their numbers."""

    @property
    def pairs(self) -> int:
        """Number of pairs in all shards."""
        return sum(shard.pairs for shard in self.shards)


@dataclass(frozen=True)
class Index:
    """The contents of index.json."""

    subsets: dict[str, Subset]
    """The entry of each subset by its name."""


def write_index(directory: str | Path, index: Index) -> None:
    """Write `index.json`, which marks a folder of shards as complete, so it must be written last."""
    subsets = {
        name: {"meta_task": subset.meta_task, "pairs": subset.pairs, "shards": [asdict(s) for s in subset.shards]}
        for name, subset in index.subsets.items()
    }
    write_json(Path(directory) / INDEX_FILE, {"format": FORMAT, "version": VERSION, "subsets": subsets})


@contextmanager
def fill_folder(directory: str | Path, overwrite: bool) -> Iterator[None]:
    """Lock a folder while shards are written into it; the shards that an old index names are removed, and that index.

    Raises:
        DataError: the folder holds an index and `overwrite` is false, or cannot be locked (locks.lock_folder).
    """
    directory = Path(directory)
    with lock_folder(directory):
        _clear_finished(directory, overwrite)
        yield


def _clear_finished(directory: Path, overwrite: bool) -> None:
    path = directory / INDEX_FILE
    if not path.is_file():
        return
    if not overwrite:
        raise DataError(f"{directory} already holds finished shards ({INDEX_FILE}); choose another or pass --overwrite")
    try:
        index = read_index(directory, check_shards=False)
        old = [shard.file for subset in index.subsets.values() for shard in subset.shards]
    except DataError:
        # A damaged index is no proof of which shards are its own; new shards of the same names replace them anyway.
        old = []
    # The index goes first, so that an interruption cannot leave an index that names missing shards.
    path.unlink()
    for file in old:
        (directory / file).unlink(missing_ok=True)


def read_index(directory: str | Path, check_shards: bool = True) -> Index:
    """Read `index.json` and, unless told otherwise, check that every shard exists and has the right size.

    Checksums are not computed.

    Raises:
        DataError: the folder or the index is missing or malformed; with `check_shards` also when a shard is missing,
            has another size, or is a link to another one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"data folder {directory} does not exist; llave prepare makes one")
    index = parse_index(directory / INDEX_FILE, str(directory / INDEX_FILE))
    files: dict[tuple[int, int], str] = {}
    for shard in (shard for subset in index.subsets.values() for shard in subset.shards if check_shards):
        check_size(directory, shard)
        status = (directory / shard.file).stat()
        other = files.setdefault((status.st_dev, status.st_ino), shard.file)
        if other != shard.file:  # one is a link to the other
            raise DataError(f"{directory}: shards {other} and {shard.file} are one file, which would be used twice")
    return index


def parse_index(path: Path, source: str) -> Index:
    """Read and check the index in file `path`, which came from `source`.

    Raises:
        DataError: the index is missing or malformed; the message names `source`.
    """
    hint = "the folder is unfinished or holds no shards: run llave prepare"
    value = read_json(path, FORMAT, hint)
    try:
        subsets = {
            str(name): Subset(str(subset["meta_task"]), [parse_shard(shard) for shard in subset["shards"]])
            for name, subset in value["subsets"].items()
        }
        require_different_shards(shard for subset in subsets.values() for shard in subset.shards)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{source} is malformed ({type(error).__name__}: {error}); make it again") from error
    for name, subset in subsets.items():
        if not KEY.fullmatch(name):
            raise DataError(f"{source}: subset {name!r} must be 1 to 80 letters, digits, - or _")
        if subset.meta_task not in META_TASKS:
            raise DataError(f"{source}: meta_task {subset.meta_task!r} of {name} is not one of {', '.join(META_TASKS)}")
    return Index(subsets)


def parse_shard(value: dict[str, Any]) -> Shard:
    """Return one shard of an index; raise TypeError, ValueError or KeyError if a field is missing or impossible."""
    shard = Shard(value["file"], value["pairs"], value["bytes"], value["sha256"])
    if not isinstance(shard.file, str) or type(shard.pairs) is not int or type(shard.bytes) is not int:
        raise TypeError(f"shard {value} needs file, pairs and bytes")
    if not FILE_NAME.fullmatch(shard.file):
        raise ValueError(f"shard {shard.file!r} must be a plain file name in the folder of its index")
    if not (0 <= shard.pairs * SMALLEST_SAMPLE <= shard.bytes and shard.pairs <= MOST_PAIRS):
        raise ValueError(f"shard {shard.file} of {shard.bytes} bytes cannot hold {shard.pairs} pairs")
    return shard


def require_different_shards(shards: Iterable[Shard]) -> None:
    """Raise a ValueError if two shards are the same file or have the same contents, whose pairs would be used twice."""
    files: set[str] = set()
    contents: dict[str, str] = {}
    for shard in shards:
        if shard.file in files:
            raise ValueError(f"shard {shard.file} is listed twice, so that its pairs would be used twice")
        files.add(shard.file)
        digest = str(shard.sha256).lower()
        other = contents.setdefault(digest, shard.file) if SHA256.fullmatch(digest) else shard.file
        if other != shard.file:
            raise ValueError(f"shards {other} and {shard.file} have the same contents, which would be used twice")


def require_same_shards(index: Index, name: str, made_of: Sequence[tuple[str, str]], source: str, again: str) -> None:
    """Check that what was made of the shards of subset `name`, such as mined negatives, belongs to those of an index.

    Args:
        index: that of the data.
        name: the subset.
        made_of: file and SHA-256 of each shard that it was made of.
        source: where it comes from, for the message.
        again: what to do instead, for the message.

    Raises:
        DataError: the index has no such subset, or other shards; names the first that differs.
    """
    if name not in index.subsets:
        has = ", ".join(sorted(index.subsets))[:200]
        raise DataError(f"{source} is of another data set: the data have no subset {name}, but {has}; {again}")
    shards = [(shard.file, shard.sha256) for shard in index.subsets[name].shards]
    if len(shards) != len(made_of):
        raise DataError(f"{source} is of {len(made_of)} shards of subset {name}, the data have {len(shards)}; {again}")
    for shard, found in zip(shards, made_of):
        if shard != found:
            raise DataError(f"{source} is of another {found[0]} than the data's {shard[0]}; {again}")


def check_size(directory: Path, shard: Shard) -> None:
    """Compare a shard's size on disk with the index.

    Raises:
        DataError: the file is missing, is outside the folder, or has another size.
    """
    path = directory / shard.file
    if not path.is_file():
        raise DataError(f"shard {path} is missing, though the index names it; {AGAIN}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise DataError(f"shard {path} is truncated or changed: {size} bytes, the index says {shard.bytes}; {AGAIN}")

"""What a folder of shards holds: `index.json`, its subsets and their tar files with sizes and checksums.

Written last by every source, read first by the training stream. The tars themselves are shards.py's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN, VERSION, lock_folder, read_json, write_json

FORMAT = "megatron_llave pairs"
META_TASKS = ("classification", "vqa", "retrieval", "grounding")
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar file, as the index describes it."""

    file: str
    """Name within the folder of the index."""
    pairs: int
    """Samples in the file."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Checksum of the file, hexadecimal."""


@dataclass(frozen=True)
class Subset:
    """The shards of one subset, in order."""

    meta_task: str
    """One of META_TASKS."""
    shards: list[Shard]
    """In the order of their numbers."""

    @property
    def pairs(self) -> int:
        """Pairs in all shards."""
        return sum(shard.pairs for shard in self.shards)


@dataclass(frozen=True)
class Index:
    """Everything in one folder of shards."""

    subsets: dict[str, Subset]
    """By name of the subset."""


def write_index(directory: str | Path, index: Index) -> None:
    """Write `index.json`, which makes a folder of shards a whole one: write it last."""
    subsets = {
        name: {"meta_task": subset.meta_task, "pairs": subset.pairs, "shards": [asdict(s) for s in subset.shards]}
        for name, subset in index.subsets.items()
    }
    write_json(Path(directory) / INDEX_FILE, {"format": FORMAT, "version": VERSION, "subsets": subsets})


@contextmanager
def fill_folder(directory: str | Path, overwrite: bool) -> Iterator[None]:
    """Hold a folder while it is written: made when missing, without index, and without the shards an old index names.

    Raises:
        DataError: the folder holds a finished index and `overwrite` is false, or see hold_folder.
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
        old = [s.file for subset in index.subsets.values() for s in subset.shards if Path(s.file).name == s.file]
    except DataError:
        # A damaged index names no shards that could be trusted; those of the same names are replaced anyway.
        old = []
    # The index first: an interruption must not leave one that names missing shards.
    path.unlink()
    for file in old:
        (directory / file).unlink(missing_ok=True)


def read_index(directory: str | Path, check_shards: bool = True) -> Index:
    """Read `index.json` and check that every shard is there with the size it should have (checksums are not computed).

    Raises:
        DataError: the folder or the index is missing or malformed; with `check_shards`, a shard is missing or of
            another size.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"data folder {directory} does not exist; tools/prepare_data.py makes one")
    index = parse_index(directory / INDEX_FILE, str(directory / INDEX_FILE))
    if check_shards:
        for subset in index.subsets.values():
            for shard in subset.shards:
                check_size(directory, shard)
    return index


def parse_index(path: Path, source: str) -> Index:
    """The index in file `path`, which came from `source`.

    Raises:
        DataError: it is missing or malformed; the message names `source`.
    """
    hint = "the folder is unfinished or holds no shards: run tools/prepare_data.py"
    value = read_json(path, FORMAT, hint)
    try:
        subsets = {
            str(name): Subset(str(subset["meta_task"]), [parse_shard(shard) for shard in subset["shards"]])
            for name, subset in value["subsets"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source} is malformed ({type(error).__name__}: {error}); make it again") from error
    for name, subset in subsets.items():
        if subset.meta_task not in META_TASKS:
            raise DataError(f"{source}: meta_task {subset.meta_task!r} of {name} is not one of {', '.join(META_TASKS)}")
    return Index(subsets)


def parse_shard(value: dict[str, Any]) -> Shard:
    """One shard of an index; TypeError or KeyError where a field is missing or of the wrong type."""
    shard = Shard(value["file"], value["pairs"], value["bytes"], value["sha256"])
    if not (isinstance(shard.file, str) and isinstance(shard.pairs, int) and isinstance(shard.bytes, int)):
        raise TypeError(f"shard {value} needs file, pairs and bytes")
    return shard


def check_size(directory: Path, shard: Shard) -> None:
    """Compare a shard's size on disk with the index.

    Raises:
        DataError: the file is missing, outside the folder, or of another size.
    """
    path = directory / shard.file
    if Path(shard.file).name != shard.file:
        raise DataError(f"{directory}: shard {shard.file!r} must be a plain file name in the folder of its index")
    if not path.is_file():
        raise DataError(f"shard {path} is missing, though the index names it; {AGAIN}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise DataError(f"shard {path} is truncated or changed: {size} bytes, the index says {shard.bytes}; {AGAIN}")

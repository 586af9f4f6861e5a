"""Hard negatives that lie beside the shards: their manifest, and how reading a pair takes them in (`data.negatives`).

mining/ writes such a folder: for each shard a tar file of the same name, whose sample of a pair has the pair's key and
holds its mined negatives as the pair's own would be held (data/shards.py), and negatives.json, which names the files,
the shards that they belong to, and how they were mined. Nothing of the shards is written again.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_llave.batch import Pair
from megatron_llave.config.data import DataConfig
from megatron_llave.data.index import Index, Shard, parse_shard, require_same_shards
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.shards import NEGATIVES, unpack_json, unpack_list
from megatron_llave.data.storage import open_storage
from megatron_llave.errors import DataError
from megatron_llave.files import read_json

logger = logging.getLogger(__name__)

FORMAT = "megatron_llave negatives"
MANIFEST_FILE = "negatives.json"
REPORT_FILE = "report.html"
"""Written by report/mining_report.py; nothing reads it."""
KEY = "data.negatives"
AGAIN = "mine again"


@dataclass(frozen=True)
class MinedShard:
    """A tar file of negatives and the shard that they are for, which has the same file name."""

    shard: Shard
    """The tar file; `pairs` is its number of samples, one for each pair that could be read."""
    of: str
    """SHA-256 of the shard of pairs."""


@dataclass(frozen=True)
class Manifest:
    """The contents of negatives.json that reading needs."""

    subsets: dict[str, list[MinedShard]]
    """The files of each subset, in the order of its shards."""


def is_complete(folder: Path) -> bool:
    """Whether a folder of negatives is complete.

    Raises:
        DataError: its manifest is damaged.
    """
    file = folder / MANIFEST_FILE
    return file.is_file() and read_json(file, FORMAT).get("complete") is True


def parse_manifest(path: Path, source: str) -> Manifest:
    """Read the manifest in file `path`, which came from `source`.

    Raises:
        DataError: it is missing, malformed, or that of a mining that has not ended.
    """
    value = read_json(path, FORMAT, f"{KEY} must be a folder that `llave mine negatives` has made")
    if value.get("complete") is not True:
        raise DataError(f"{source} is that of a mining that has not ended; give the command again, which continues")
    try:
        subsets = {
            str(name): [MinedShard(parse_shard(shard), str(shard["of"])) for shard in subset["shards"]]
            for name, subset in value["subsets"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{source} is malformed ({type(error).__name__}: {error}); {AGAIN}") from error
    return Manifest(subsets)


def require_fits(manifest: Manifest, index: Index, names: Sequence[str], source: str) -> None:
    """Check that negatives belong to the shards of an index; subsets that were not mined have none, which is logged.

    Raises:
        DataError: they are of another data set or of other shards; names the first that differs.
    """
    used = [name for name in names if name in manifest.subsets]
    if not used:
        has = ", ".join(sorted(manifest.subsets))[:200]
        raise DataError(f"{source} is of another data set, with the subsets {has}, of which the run uses none")
    for name in used:
        made_of = [(mined.shard.file, mined.of) for mined in manifest.subsets[name]]
        require_same_shards(index, name, made_of, source, AGAIN)
    for name in sorted(set(names) - set(used)):
        logger.warning("%s has no negatives for subset %s, which is trained without mined ones", source, name)


@dataclass(frozen=True)
class MinedNegatives:
    """Adds mined negatives to pairs; nothing is read before the first pair, so that it can be copied into workers."""

    files: dict[str, Shard]
    """Name of the shard of pairs -> its file of negatives."""
    reader: ShardReader

    @cached_property
    def identity(self) -> str:
        """A hash of the contents of all files."""
        contents = sorted(shard.sha256 for shard in self.files.values())
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]

    def join(self, pair: Pair, shard: Shard) -> Pair:
        """Return a pair of a shard with its mined negatives after its own, which is then like any pair with as many.

        Mined negatives have no score, NaN where the pair has scores.

        Raises:
            DataError: the negatives of the pair are missing or damaged.
        """
        if shard.file not in self.files:
            return pair
        members, where = self.reader.members(self.files[shard.file], pair.key)
        described = unpack_json(members, where)
        if (described.get("subset"), described.get("query")) != (pair.subset, pair.query_id):
            raise DataError(f"{where} is of another pair than that of query {pair.query_id!r}; {AGAIN}")
        sides, names = unpack_list(NEGATIVES, "hard negative", described, members, where)
        unknown = [float("nan")] * len(sides) if pair.scores else []
        return replace(
            pair,
            hard_negatives=pair.hard_negatives + sides,
            hard_negative_ids=pair.hard_negative_ids + names,
            scores=pair.scores + unknown,
        )


def open_negatives(cfg: DataConfig, index: Index, names: Iterable[str], most_open: int) -> MinedNegatives | None:
    """Open the folder or address of `data.negatives` for reading beside the subsets `names`; None: the run has none.

    Raises:
        DataError: it is incomplete, damaged, or of other shards or another data set (require_fits).
        ConfigError, Unreachable: as storage.open_storage and Storage.read.
    """
    if cfg.negatives is None:
        return None
    names = list(names)
    storage = open_storage(cfg, cfg.negatives, KEY)
    manifest = storage.read(MANIFEST_FILE, parse_manifest)
    require_fits(manifest, index, names, f"{KEY}={cfg.negatives}")
    files = {mined.shard.file: mined.shard for name in names for mined in manifest.subsets.get(name, [])}
    for shard in files.values():
        storage.check(shard)
    return MinedNegatives(files, ShardReader(storage, most_open))

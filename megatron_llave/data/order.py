"""The order in which a run takes the pairs of a subset so that batches are hard (`data.order`): file and epochs.

mining/batches.py writes such a folder: order.json has, for each subset, its shards and the numbers of all its pairs,
`cluster_size` of which after the other are a cluster; the pairs that are left over come last. An epoch shuffles the
clusters, so that each batch is made of others, and takes each pair once, as without an order (readers.py).

A subset has N pairs and clusters have K, and batches take K at a time without end, so that an epoch may end within such
a K. So that clusters are whole in a batch anyway, an epoch begins with as many pairs as the last K of the epoch before
lacks, and ends with fewer than K pairs. These two pieces are made of the pairs that are left over and, where those are
too few, of one cluster more, another one in each epoch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.config.data import DataConfig
from megatron_llave.data.index import Index, Subset, require_same_shards
from megatron_llave.data.packing import stable_hash
from megatron_llave.data.storage import open_storage
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import read_json

FORMAT = "megatron_llave order"
ORDER_FILE = "order.json"
KEY = "data.order"
AGAIN = "run `llave mine batches` again"


@dataclass(frozen=True)
class SubsetOrder:
    """The order of a subset's pairs."""

    shards: list[tuple[str, str]]
    """File and SHA-256 of each shard."""
    pairs: np.ndarray
    """[N] int64 numbers of the pairs, counted through all shards, cluster after cluster."""


@dataclass(frozen=True)
class BatchOrder:
    """The orders of the subsets of a run."""

    cluster_size: int
    subsets: dict[str, SubsetOrder]

    @cached_property
    def identity(self) -> str:
        """A hash of all orders."""
        digest = hashlib.sha256(b"%d" % self.cluster_size)
        for name, subset in sorted(self.subsets.items()):
            digest.update(name.encode() + b"\0" + subset.pairs.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def take(self, name: str, seed: int, start: int, count: int) -> np.ndarray:
        """Numbers of `count` pairs of a subset over endless epochs, after skipping the first `start`: [count] int64."""
        pairs, parts = self.subsets[name].pairs, [np.zeros(0, np.int64)]
        while count > 0:
            epoch, skip = divmod(start, len(pairs))
            stop = min(skip + count, len(pairs))
            parts.append(pairs[self._places((seed, stable_hash(name) % 2**63, epoch), len(pairs), skip, stop)])
            start, count = start + stop - skip, count - (stop - skip)
        return np.concatenate(parts)

    def _places(self, seed: tuple[int, int, int], num_pairs: int, start: int, stop: int) -> np.ndarray:
        """Where the pairs `start` to `stop` of an epoch are in the order; `seed` ends with the number of the epoch."""
        size = self.cluster_size
        clusters = np.random.default_rng(seed).permutation(num_pairs // size)
        head = -seed[-1] * num_pairs % size  # pairs that the last cluster of the epoch before lacks
        whole = max(0, (num_pairs - head) // size)
        cut = np.repeat(clusters[whole:] * size, size) + np.tile(np.arange(size), len(clusters) - whole)
        ends = np.concatenate([cut, np.arange(len(clusters) * size, num_pairs)])
        place = np.arange(start, stop)
        inner = place - head
        if whole == 0:
            return ends[place]
        in_cluster = clusters[inner // size % whole] * size + inner % size
        at_end = ends[np.where(inner < 0, place, place - whole * size) % max(len(ends), 1)] if len(ends) else in_cluster
        return np.where((inner >= 0) & (inner < whole * size), in_cluster, at_end)

    def locations(self, subset: Subset, name: str, seed: int, start: int, count: int) -> list[tuple[int, int]]:
        """Shard and number in it of the pairs of `take`."""
        ends = np.cumsum([shard.pairs for shard in subset.shards])
        numbers = self.take(name, seed, start, count)
        shards = np.searchsorted(ends, numbers, "right")
        within = numbers - (ends[shards] - np.array([shard.pairs for shard in subset.shards])[shards])
        return list(zip(shards.tolist(), within.tolist()))


def parse_order(path: Path, source: str) -> BatchOrder:
    """Read the order in file `path`, which came from `source`.

    Raises:
        DataError: it is missing or malformed, or a subset's order lacks a pair.
    """
    value = read_json(path, FORMAT, f"{KEY} must be a folder that `llave mine batches` has made")
    try:
        size = value["cluster_size"]
        if type(size) is not int or size < 1:
            raise ValueError(f"cluster_size={size!r:.40} must be a whole number above 0")
        subsets = {str(name): _parse_subset(subset) for name, subset in value["subsets"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{source} is malformed ({type(error).__name__}: {error}); {AGAIN}") from error
    for name, subset in subsets.items():
        total = len(subset.pairs)
        lacking = np.setdiff1d(np.arange(total), subset.pairs)
        if total == 0 or len(lacking):
            first = lacking[0] if len(lacking) else 0
            raise DataError(f"{source} is incomplete: the {total} entries of subset {name} lack pair {first}; {AGAIN}")
    return BatchOrder(size, subsets)


def _parse_subset(subset: dict[str, Any]) -> SubsetOrder:
    if not all(type(number) is int for number in subset["order"]):
        raise TypeError("order must be a list of whole numbers")
    shards = [(str(shard["file"]), str(shard["sha256"])) for shard in subset["shards"]]
    return SubsetOrder(shards, np.array(subset["order"], np.int64))


def require_same_pairs(order: BatchOrder, index: Index, name: str, source: str) -> None:
    """Check that the order of a subset is of the shards and pairs of an index.

    Raises:
        DataError: it is of another data set or of other shards; names the first that differs.
    """
    ordered = order.subsets[name]
    require_same_shards(index, name, ordered.shards, source, AGAIN)
    has, pairs = len(ordered.pairs), index.subsets[name].pairs
    if has != pairs:
        raise DataError(f"{source} is incomplete: it has {has} pairs of subset {name}, the data have {pairs}; {AGAIN}")


def require_fits(order: BatchOrder, index: Index, names: Sequence[str], batch_size: int, source: str) -> None:
    """Check that an order is of the shards of an index and for batches of a size.

    Raises:
        DataError: it is of another data set or of other shards; names the first that differs.
        ConfigError: batches are not made of whole clusters.
    """
    for name in names:
        if name not in order.subsets:
            has = ", ".join(sorted(order.subsets))[:200]
            raise DataError(f"{source} has no order of subset {name}, but of {has}; {AGAIN} or name data.subsets")
        require_same_pairs(order, index, name, source)
    if batch_size % order.cluster_size:
        raise ConfigError(
            f"{source} has clusters of {order.cluster_size} pairs, but train.global_batch_size / data.sub_batches is "
            f"{batch_size}, not a multiple of it; change one of them, or mine with another --cluster-size"
        )


def open_order(cfg: DataConfig, index: Index, names: Sequence[str], batch_size: int) -> BatchOrder | None:
    """Read the order that `data.order` names, for batches of `batch_size` pairs of the subsets `names`; None: no order.

    Raises:
        DataError, ConfigError, Unreachable: as parse_order, require_fits, storage.open_storage and Storage.read.
    """
    if cfg.order is None:
        return None
    order = open_storage(cfg, cfg.order, KEY).read(ORDER_FILE, parse_order)
    require_fits(order, index, names, batch_size, f"{KEY}={cfg.order}")
    return BatchOrder(order.cluster_size, {name: order.subsets[name] for name in names})

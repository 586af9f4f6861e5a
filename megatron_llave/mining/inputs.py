"""The queries and targets of a folder of shards as mining sees them: one of each, with what a query must not be given.

The shards are read once, by all ranks together, and each input is kept as a hash of its bytes alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_llave.batch import Side
from megatron_llave.data.index import Index, Shard
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.storage import Storage
from megatron_llave.data.stored_vectors import StoredVectors, query_name, target_name
from megatron_llave.distributed.collectives import from_all_ranks
from megatron_llave.errors import DataError

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Content:
    """Hashes of an input."""

    id: str
    whole: bytes
    """Of text and images."""
    seen: bytes
    """Of the images, or of the text where there are none: what an input and a negative must not have in common."""


@dataclass(frozen=True)
class PairContents:
    """Hashes of a pair that can be read."""

    key: str
    number: int
    """Number of the pair in its shard."""
    query: Content
    targets: list[Content]
    hard_negatives: list[Content]


@dataclass
class SubsetInputs:
    """The q different queries and c different targets of a subset, in the order in which they come in its shards.

    Queries are different if their ids are, targets if their texts or images are. Of inputs with one id, the first one
    counts, as in llave embed --shards.
    """

    name: str
    shards: list[Shard]
    query_ids: list[str]
    """[q]"""
    target_ids: list[str]
    """[c] the id of the first of equal targets."""
    places: np.ndarray
    """[c, 3] int64: shard, pair in it, and number among the pair's targets and then hard negatives."""
    pairs: list[list[tuple[str, str, int]]]
    """For each shard, key, query id and number of the query of each pair that can be read; the number is -1 where the
    query or a target has no embedding."""
    positives: list[list[int]]
    """[q] the numbers of the targets of all pairs with the query, at least one."""
    labels: np.ndarray
    """[c] int64: equal for targets with the same images, or without images with the same text."""
    members: np.ndarray
    """[m, 3] int64: for each target of each pair whose number in `pairs` is not -1, in their order, the number of the
    pair among all pairs of the shards, and the numbers of its query and of the target."""
    hidden_labels: list[list[int]]
    """[q] labels of the targets that a query must not be given as negatives: those of its positives, of the hard
    negatives that its pairs have already, and of the query itself; -1 is the label of no target."""

    @property
    def queries_of_pairs(self) -> np.ndarray:
        """[pairs] int64 number of the query of each pair that can be read, or -1."""
        return np.array([query for _, _, query in chain(*self.pairs)], np.int64)

    def hidden(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The targets that queries must not be given: [m] places of queries in `rows`, not falling, [m] targets."""
        wanted = [np.unique(labels) for labels in self.hidden_labels[rows]]
        label = np.concatenate([*wanted, np.zeros(0, np.int64)]).astype(np.int64)
        row = np.repeat(np.arange(len(wanted)), [len(labels) for labels in wanted])
        first, last = (np.searchsorted(self._sorted_labels, label, side) for side in ("left", "right"))
        counts = last - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(row, counts), self._by_label[np.repeat(first, counts) + within]

    def __post_init__(self) -> None:
        """Sort the targets by their labels."""
        self._by_label = np.argsort(self.labels, kind="stable")
        self._sorted_labels = self.labels[self._by_label]


def read_subsets(
    folder: str | Path, index: Index, names: Iterable[str], vectors: Sequence[StoredVectors]
) -> Iterator[SubsetInputs]:
    """Read the named subsets of a local folder of shards; a collective over all ranks, which share the shards.

    A pair that cannot be read is left out, as in training and embedding. One whose query or targets lack an embedding
    in one of `vectors` gets no negatives, and its targets become none.

    Raises:
        DataError: no pair of a subset can be used.
    """
    for name in names:
        shards = index.subsets[name].shards
        mine = []
        for turn in range(0, len(shards), dist.get_world_size()):
            number = turn + dist.get_rank()
            mine += [(number, _read(folder, shards[number]))] if number < len(shards) else []
            dist.barrier()  # no rank waits for another longer than a shard takes
        read = dict(from_all_ranks(mine))
        inputs = collect(name, shards, [read[number] for number in range(len(shards))], vectors)
        if not inputs.query_ids:
            raise DataError(f"{folder}: no pair of subset {name} can be used; llave prepare verify says more")
        yield inputs


def _read(folder: str | Path, shard: Shard) -> list[PairContents]:
    reader, pairs = ShardReader(Storage(str(folder), None), 1), []
    for number in range(shard.pairs):
        try:
            pair = reader.read(shard, number)
        except DataError:  # embedding the shards warns of it
            continue
        targets = [content(*named) for named in zip(pair.target_ids, pair.targets)]
        negatives = [content(*named) for named in zip(pair.hard_negative_ids, pair.hard_negatives)]
        pairs.append(PairContents(pair.key, number, content(pair.query_id, pair.query), targets, negatives))
    return pairs


def content(name: str, side: Side) -> Content:
    """The hashes of an input, whose images are bytes."""
    images = [hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest() for image in side.images]
    of_images, text = b"".join(images), side.text.encode()
    whole = (b"%d " % len(images), of_images, repr(side.seconds).encode(), text)
    return Content(name, _digest(*whole), _digest(b"images", of_images) if images else _digest(b"text", text))


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b" ".join(parts), digest_size=DIGEST_BYTES).digest()


def collect(
    name: str, shards: list[Shard], pairs: Sequence[Sequence[PairContents]], vectors: Sequence[StoredVectors] = ()
) -> SubsetInputs:
    """Find the different queries and targets of a subset among the pairs of each of its shards (read_subsets)."""
    first: dict[str, tuple[Content, tuple[int, int, int]]] = {}
    for shard, of_shard in enumerate(pairs):
        for pair in of_shard:
            for number, side in enumerate(chain(pair.targets, pair.hard_negatives)):
                first.setdefault(side.id, (side, (shard, pair.number, number)))
    queries: dict[str, int] = {}
    targets: dict[bytes, int] = {}
    target_ids: list[str] = []
    positives: list[dict[int, None]] = []
    hidden: list[dict[bytes, None]] = []
    numbered: list[list[tuple[str, str, int]]] = []
    members: list[tuple[int, int, int]] = []
    first_pairs = accumulate((shard.pairs for shard in shards), initial=0)
    for first_pair, of_shard in zip(first_pairs, pairs):
        numbered.append([])
        for pair in of_shard:
            used = [query_name(name, pair.query.id), *(target_name(name, side.id) for side in pair.targets)]
            if not all(of_model.has(used) for of_model in vectors):
                numbered[-1].append((pair.key, pair.query.id, -1))
                continue
            query = queries.setdefault(pair.query.id, len(queries))
            if query == len(positives):
                positives.append({})
                hidden.append({pair.query.seen: None})
            numbered[-1].append((pair.key, pair.query.id, query))
            for side in pair.targets:
                target = targets.setdefault(first[side.id][0].whole, len(targets))
                if target == len(target_ids):
                    target_ids.append(side.id)
                positives[query][target] = None
                members.append((first_pair + pair.number, query, target))
            for side in chain(pair.targets, pair.hard_negatives):
                hidden[query] |= dict.fromkeys((side.seen, first[side.id][0].seen))
    labels: dict[bytes, int] = {}
    of_target = [labels.setdefault(first[name][0].seen, len(labels)) for name in target_ids]
    return SubsetInputs(
        name,
        shards,
        list(queries),
        target_ids,
        np.array([first[name][1] for name in target_ids], np.int64).reshape(-1, 3),
        numbered,
        [list(numbers) for numbers in positives],
        np.array(of_target, np.int64),
        np.array(members, np.int64).reshape(-1, 3),
        [[labels.get(digest, -1) for digest in digests] for digests in hidden],
    )

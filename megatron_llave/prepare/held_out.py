"""Splits the user's own pairs into training and held-out ones, and makes evaluation sets of the latter.

Pairs that share an image, or the text of a side without images, are one group, and a group is held out completely or
not at all, so that nothing of an evaluation was trained on. Images are compared by their bytes. Which groups are held
out depends on the contents alone, not on the names of files, their order or any seed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import compress
from pathlib import Path

from megatron_llave.batch import MAX_IMAGE_BYTES, Pair, Side
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, input_key
from megatron_llave.files import read_bytes
from megatron_llave.prepare.shard_jobs import SourceRow
from megatron_llave.prepare.source_sides import SourceSide

MOST_HELD_OUT = 5000
"""The largest number of pairs that are held out; more of them cost time in every evaluation and tell little more."""
FEWEST_CANDIDATES = 2
CAPTIONS = "captions"
"""Name of the subset of images and their captions; the query is the caption."""

Rows = Callable[[], Iterable[tuple[str, SourceRow]]]
"""Reads the source anew and yields each row with the name of its subset."""


class HeldOut:
    """Says of each row of a source whether it is held out, and which group of rows it belongs to."""

    def __init__(self, rows: Rows, share: float, same_targets: bool) -> None:
        """Read all rows and choose.

        Args:
            rows: the source.
            share: fraction of the pairs to hold out; 0: none.
            same_targets: whether pairs with equal target texts are one group; not where targets are classes or answers.

        Raises:
            ConfigError: the share is not a fraction.
            DataError: the groups are so large that fewer than FEWEST_CANDIDATES could be held out.
        """
        if not 0 <= share < 1:
            raise ConfigError(f"--held-out {share} must be a fraction of the pairs: at least 0 and below 1")
        self.same_targets = same_targets
        self._parents: dict[bytes, bytes] = {}
        self._digests: dict[Path, bytes] = {}
        self._chosen: set[bytes] = set()
        if share:
            self._choose(rows, share)

    def _choose(self, rows: Rows, share: float) -> None:
        firsts = []
        for _, row in rows():
            keys = self._keys(row)
            for key in keys:
                self._parents[self._find(key)] = self._find(keys[0])
            firsts += keys[:1]
        groups: dict[bytes, list[bytes]] = {}
        for key in self._parents:
            groups.setdefault(self._find(key), []).append(key)
        sizes = dict.fromkeys(groups, 0)
        for key in firsts:
            sizes[self._find(key)] += 1
        wanted = min(MOST_HELD_OUT, max(FEWEST_CANDIDATES, round(share * len(firsts))))
        # Keys are hashes, so that their order is as good as random, and the smallest one stands for the contents.
        for root in sorted(groups, key=lambda root: min(groups[root])):
            if sizes[root] <= wanted:
                self._chosen.add(root)
                wanted -= sizes[root]
        if len(self._chosen) < FEWEST_CANDIDATES or len(self._chosen) == len(groups):
            raise DataError(
                f"--held-out {share}: the {len(firsts)} pairs form {len(groups)} groups without common image or text, "
                "which is too few for evaluation and training; give --held-out 0, or captions that differ"
            )

    def _find(self, key: bytes) -> bytes:
        """Return the key that stands for the group of `key`, and shorten the way to it."""
        self._parents.setdefault(key, key)
        while self._parents[key] != key:
            self._parents[key] = self._parents[self._parents[key]]
            key = self._parents[key]
        return key

    def _keys(self, row: SourceRow) -> list[bytes]:
        targets = [target for target in row.targets if self.same_targets or target.images]
        return [key for side in (row.query, *targets) for key in self._keys_of(side, row.folder)]

    def _keys_of(self, side: SourceSide, folder: str) -> list[bytes]:
        """Return a key for each image, or one for the text of a side without images."""
        if side.images:
            return [self._digest(Path(folder, image)) for image in side.images]
        words = " ".join(side.text.casefold().split())
        return [_hash(b"text", words.encode(errors="backslashreplace"))] if words else []

    def _digest(self, path: Path) -> bytes:
        if path not in self._digests:
            try:
                contents = read_bytes(path, MAX_IMAGE_BYTES)
            except DataError:  # it is skipped and counted when the pairs are made
                contents = str(path).encode(errors="backslashreplace")
            self._digests[path] = _hash(b"image", contents)
        return self._digests[path]

    def group(self, row: SourceRow) -> bytes | None:
        """Return what names the group of a row that is held out; None: the row is for training."""
        if not self._chosen:
            return None
        root = next((self._find(key) for key in self._keys(row)), None)
        return root if root in self._chosen else None

    def without_negatives(self, row: SourceRow) -> SourceRow:
        """Return a training row without those of its hard negatives that are held out."""
        if not self._chosen:
            return row
        kept = [
            self._chosen.isdisjoint(self._find(key) for key in self._keys_of(negative, row.folder))
            for negative in row.hard_negatives
        ]
        scores = compress(row.scores, [True] * len(row.targets) + kept)
        return replace(row, hard_negatives=tuple(compress(row.hard_negatives, kept)), scores=tuple(scores))


def _hash(kind: bytes, contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=16, person=kind).digest()


def build_sets(pairs: dict[str, list[Pair]], meta_task: str) -> tuple[dict[str, Side], list[EvaluationSet]]:
    """Make evaluation sets of each subset's held-out pairs, of which there is one for each group.

    Each query is ranked against the first targets of all of them, of which one is right. So a pair is left out if one
    of its further targets is the first target of another. In retrieval each first target also is a query, that is
    ranked against all queries. A subset with fewer than FEWEST_CANDIDATES different targets has no set.

    Returns:
        The inputs by key, and the sets.
    """
    inputs: dict[str, Side] = {}
    sets = []
    for subset, held_out in pairs.items():
        firsts = {input_key(pair.target) for pair in held_out}
        held_out = [pair for pair in held_out if firsts.isdisjoint(_further_keys(pair))]
        keys = [[input_key(side) for side in (pair.query, pair.target)] for pair in held_out]
        ways = [(f"{subset}_query_to_target", meta_task, 0, 1), (f"{subset}_target_to_query", meta_task, 1, 0)]
        if subset == CAPTIONS:
            ways = [("caption_to_image", *ways[0][1:]), ("image_to_caption", *ways[1][1:])]
        for name, task, source, target in ways[: 2 if meta_task == "retrieval" else 1]:
            candidates = list(dict.fromkeys(key[target] for key in keys))
            if len(candidates) < FEWEST_CANDIDATES:
                continue
            place = {key: number for number, key in enumerate(candidates)}
            queries, right = [key[source] for key in keys], [place[key[target]] for key in keys]
            sets.append(EvaluationSet(name, task, "ind", queries, candidates, right))
            for pair, key in zip(held_out, keys):
                inputs |= dict(zip(key, (pair.query, pair.target)))
    return inputs, sets


def _further_keys(pair: Pair) -> set[str]:
    """Return the keys of a pair's further targets that are not like the first one."""
    return {input_key(side) for side in pair.further_targets} - {input_key(pair.target)}


def one_of_each_group(pairs: Iterator[Pair], groups: dict[str, bytes]) -> list[Pair]:
    """Return the first pair of each group; `groups` has the group of each pair by its key."""
    first: dict[bytes, Pair] = {}
    for pair in pairs:
        first.setdefault(groups[pair.key], pair)
    return list(first.values())

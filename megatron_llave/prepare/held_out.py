"""Splits the user's own pairs into training and held-out ones, and makes evaluation sets of the latter.

Pairs that share an image, or the text of a side without images, are one group, and a group is held out completely or
not at all, so that nothing of an evaluation was trained on. Images are compared by their bytes. Which groups are held
out depends on the contents alone, not on the names of files, their order or any seed.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

from megatron_llave.batch import MAX_IMAGE_BYTES, Pair, Side
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, input_key
from megatron_llave.files import read_bytes
from megatron_llave.prepare.shard_jobs import SourceRow
from megatron_llave.prepare.source_sides import SourceSide, read_image
from megatron_llave.prepare.stored_images import StoredImage

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
        self._digests: dict[Path | StoredImage, bytes] = {}
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
            return [self._digest(Path(folder, image) if isinstance(image, str) else image) for image in side.images]
        words = " ".join(side.text.casefold().split())
        return [_hash(b"text", words.encode(errors="backslashreplace"))] if words else []

    def _digest(self, image: Path | StoredImage) -> bytes:
        if image not in self._digests:
            try:
                if isinstance(image, Path):
                    contents = read_bytes(image, MAX_IMAGE_BYTES)
                else:
                    contents = read_image(image, str(Path(image.file).parent), is_confined=False)[0]
            except DataError:  # it is skipped and counted when the pairs are made
                contents = str(image).encode(errors="backslashreplace")
            self._digests[image] = _hash(b"image", contents)
        return self._digests[image]

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


@dataclass(frozen=True)
class HeldOutPairs:
    """The held-out pairs of a subset."""

    chosen: list[Pair]
    """One of each group."""
    right: set[tuple[str, str]]
    """Keys of the query and of each target of all pairs, also of those that are not chosen."""
    num_left: int
    """Number of pairs that are not chosen."""


def one_of_each_group(pairs: Iterable[Pair], groups: dict[str, bytes]) -> HeldOutPairs:
    """Choose the first pair of each group; `groups` has the group of each pair by its key."""
    first: dict[bytes, Pair] = {}
    right: set[tuple[str, str]] = set()
    count = 0
    for count, pair in enumerate(pairs, start=1):
        first.setdefault(groups[pair.key], pair)
        query = input_key(pair.query)
        right |= {(query, input_key(target)) for target in pair.targets}
    return HeldOutPairs(list(first.values()), right, count - len(first))


def build_sets(
    pairs: dict[str, HeldOutPairs], meta_task: str
) -> tuple[dict[str, Side], list[EvaluationSet], list[str]]:
    """Make evaluation sets of each subset's held-out pairs, of which one of each group is chosen.

    Each query is ranked against the first targets of all chosen pairs. Those that are targets of a pair with the same
    query are right, and the others are wrong. In retrieval each first target also is a query, that is ranked against
    all queries. A subset with fewer than FEWEST_CANDIDATES different targets has no set.

    Returns:
        The inputs by key, the sets, and a line for each subset with held-out pairs that are in no set.
    """
    inputs: dict[str, Side] = {}
    sets: list[EvaluationSet] = []
    unused = []
    for subset, held_out in pairs.items():
        keys = [(input_key(pair.query), input_key(pair.target)) for pair in held_out.chosen]
        if len({target for _, target in keys}) < FEWEST_CANDIDATES:
            what = "different targets" if len(keys) >= FEWEST_CANDIDATES else "pairs that share no image or text"
            count, reason = len(keys) + held_out.num_left, f"a set needs at least {FEWEST_CANDIDATES} {what}"
            unused += [_unused(subset, count, reason)] if count else []
            continue
        if held_out.num_left:
            reason = "they share an image or a text with another one, and a set has one of such pairs"
            unused.append(_unused(subset, held_out.num_left, reason))
        ways = [(f"{subset}_query_to_target", keys, held_out.right)]
        if meta_task == "retrieval":
            turned = [(target, query) for query, target in keys], {(target, query) for query, target in held_out.right}
            ways.append((f"{subset}_target_to_query", *turned))
        if subset == CAPTIONS:
            ways = [(name, *way[1:]) for name, way in zip(("caption_to_image", "image_to_caption"), ways)]
        sets += [_build_set(name, meta_task, pairs_of_keys, right) for name, pairs_of_keys, right in ways]
        for pair, key in zip(held_out.chosen, keys):
            inputs |= dict(zip(key, (pair.query, pair.target)))
    return inputs, sets, unused


def _unused(subset: str, count: int, reason: str) -> str:
    return f"subset {subset}: number of held-out pairs that are in neither training nor a set: {count}; {reason}"


def _build_set(name: str, meta_task: str, keys: list[tuple[str, str]], right: set[tuple[str, str]]) -> EvaluationSet:
    """Rank the first of each pair of keys against the second ones of all; `right` has what is right beside its own."""
    place = {candidate: number for number, candidate in enumerate(dict.fromkeys(candidate for _, candidate in keys))}
    all_right: dict[str, set[int]] = {}
    for query, candidate in right:
        if candidate in place:
            all_right.setdefault(query, set()).add(place[candidate])
    positives = [place[candidate] for _, candidate in keys]
    further = [sorted(all_right[query] - {positive}) for (query, _), positive in zip(keys, positives)]
    queries = [query for query, _ in keys]
    return EvaluationSet(name, meta_task, "ind", queries, list(place), positives, further if any(further) else [])

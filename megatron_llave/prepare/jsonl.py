"""Makes shards of a user's own pairs in JSONL files; docs/data.md has the schema of a line.

llave prepare runs this once. A first pass checks every line, so that a wrong line is reported at once and not
after hours. A second pass makes the shards.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llave.config.data import META_TASKS
from megatron_llave.data.items import Item, check_keys, parse_item, read_jsonl
from megatron_llave.data.shards import SCORE_RANGE, is_score
from megatron_llave.data.tar_members import KEY
from megatron_llave.errors import DataError, one_of
from megatron_llave.prepare.own_pairs import Options, different_paths, write_own_pairs
from megatron_llave.prepare.shard_jobs import Prepared, Progress, SourceRow, check_arguments, make_id
from megatron_llave.prepare.source_sides import SourceSide

PAIR_KEYS = ("subset", "id", "query", "target", "hard_negatives", "scores")
SCORED = ("target", "hard_negatives")
LONGEST_SUBSET = 60
"""The largest number of characters in the name of a subset; the keys made from it must fit into a tar file."""


@dataclass(frozen=True)
class PairLine:
    """A line whose values are checked."""

    where: str
    """FILE:LINE, for messages."""
    subset: str
    id: str | None
    folder: Path
    """The folder that relative image paths start from."""
    query: Item
    targets: list[Item]
    """At least one."""
    hard_negatives: list[Item]
    scores: tuple[float, ...]
    """One for each target, then one for each hard negative; empty: there are none."""

    def to_row(self, number: int, common: str) -> SourceRow:
        """Return pair number `number` of its subset; ids contain image paths relative to folder `common`."""
        start = os.path.relpath(self.folder, common)
        query, *sides = (
            SourceSide(
                item.text,
                item.images,
                item.id or make_id(item.text, [path_for_id(start, image) for image in item.images]),
                item.is_video,
                item.seconds,
            )
            for item in (self.query, *self.targets, *self.hard_negatives)
        )
        key = self.id or default_key(self.subset, number)
        (target, *further), negatives = sides[: len(self.targets)], sides[len(self.targets) :]
        folder = str(self.folder)
        return SourceRow(key, self.where, folder, query, target, tuple(negatives), tuple(further), self.scores)


def path_for_id(start: str, image: str) -> str:
    """Return an image path as ids have it: from folder `start` on, and without detours."""
    return os.path.normpath(os.path.join(start, image))


def default_key(subset: str, number: int) -> str:
    """Return the key of a pair whose line has no id."""
    return f"{subset}-{number:08d}"


def prepare(
    files: Sequence[str | Path],
    directory: str | Path,
    meta_task: str = "retrieval",
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make shards, index and report of JSONL files, and the evaluation sets and the tokenizer that `options` ask for.

    Args:
        files: the files, which are read in this order.
        directory: output directory; it is made when missing.
        meta_task: the meta-task of all subsets in the files.
        options: what else the user chooses.
        progress: called after each shard.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a line does not follow the schema, and the message has its FILE:LINE; or `write_own_pairs` fails.
    """
    check_arguments(options.workers, options.max_pixels)
    one_of("--meta-task", meta_task, META_TASKS)
    paths = different_paths(files)
    progress("checking lines", 0, 1)
    if not check_lines(paths):
        raise DataError(f"{', '.join(map(str, paths))}: no line with a pair")
    return write_own_pairs(lambda: read_rows(paths), directory, meta_task, options, progress)


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[str, SourceRow]]:
    """Yield each pair of the files with the name of its subset.

    Raises:
        DataError: a line does not follow the schema; the message has FILE:LINE.
    """
    common = os.path.commonpath([path.parent.absolute() for path in paths])
    seen: Counter[str] = Counter()
    for line in _read_all(paths):
        yield line.subset, line.to_row(seen[line.subset], common)
        seen[line.subset] += 1


def check_lines(paths: Sequence[Path]) -> Counter[str]:
    """Check every line and return the number of pairs in each subset.

    Raises:
        DataError: a line does not follow the schema, or an id occurs twice in a subset; the message has FILE:LINE.
    """
    sizes: Counter[str] = Counter()
    ids: set[tuple[str, str]] = set()
    for line in _read_all(paths):
        if line.id is not None:
            _check_id(line, sizes[line.subset], ids)
            ids.add((line.subset, line.id))
        sizes[line.subset] += 1
    return sizes


def _check_id(line: PairLine, number: int, ids: set[tuple[str, str]]) -> None:
    if not KEY.fullmatch(line.id):
        raise DataError(f"{line.where}: id {line.id!r} must be 1 to 80 letters, digits, - or _, not __ first")
    if (line.subset, line.id) in ids:
        raise DataError(f"{line.where}: id {line.id!r} comes twice in subset {line.subset!r}")
    is_like_default = re.fullmatch(re.escape(line.subset) + r"-\d{8,}", line.id)
    if is_like_default and line.id != default_key(line.subset, number):
        raise DataError(
            f"{line.where}: id {line.id!r} is kept for pair {int(line.id[-8:])} of the subset; choose another"
        )


def _read_all(paths: Sequence[Path]) -> Iterator[PairLine]:
    for path in paths:
        for _, where, values in read_jsonl(path):
            yield parse_line(values, path, where)


def parse_line(values: Any, path: Path, where: str) -> PairLine:
    """Check the JSON value of one line of file `path` and return its values; `where` is FILE:LINE.

    Raises:
        DataError: the line does not follow the schema; the message has FILE:LINE and the wrong key.
    """
    check_keys(values, PAIR_KEYS, where)
    for key in ("query", "target"):
        if key not in values:
            raise DataError(f"{where}: {key} is missing")
    subset, name = values.get("subset", path.stem), values.get("id")
    if not isinstance(subset, str) or len(subset) > LONGEST_SUBSET or not KEY.fullmatch(subset):
        raise DataError(
            f"{where}: subset {subset!r} must be 1 to {LONGEST_SUBSET} letters, digits, - or _, not __ first"
        )
    if name is not None and not isinstance(name, str):
        raise DataError(f"{where}: id must be a string, not {name!r}")
    negatives, targets = values.get("hard_negatives", []), values["target"]
    if not isinstance(negatives, list):
        raise DataError(f"{where}: hard_negatives must be a list, not {str(negatives)[:60]!r}")
    if targets == []:
        raise DataError(f"{where}: target must be an item or a list of at least one")
    named = {"query": values["query"]}
    if isinstance(targets, list):
        named |= {f"target[{index}]": side for index, side in enumerate(targets)}
    else:
        named["target"], targets = targets, [targets]
    named |= {f"hard_negatives[{index}]": side for index, side in enumerate(negatives)}
    sides = {key: parse_item(side, f"{where}: {key}") for key, side in named.items()}
    _check_different(sides, path.parent.absolute(), where)
    query, *others = sides.values()
    scores = _parse_scores(values, len(targets), len(negatives), where)
    line = (where, subset, name, path.parent, query, others[: len(targets)], others[len(targets) :])
    return PairLine(*line, scores)


def _check_different(sides: dict[str, Item], folder: Path, where: str) -> None:
    """Raise a DataError if a target or hard negative equals another one, by its id or by its text and files."""
    seen: dict[Any, str] = {}
    for key, item in list(sides.items())[1:]:
        contents = item.text, *(path_for_id(str(folder), image) for image in item.images)
        for name in (contents, item.id or contents):
            other = seen.setdefault(name, key)
            if other != key:
                raise DataError(f"{where}: {key} is the same as {other}; a pair has each target and hard negative once")


def _parse_scores(values: dict[str, Any], num_targets: int, num_negatives: int, where: str) -> tuple[float, ...]:
    """Return the scores of a line, of its targets and then of its hard negatives."""
    if "scores" not in values:
        return ()
    check_keys(values["scores"], SCORED, f"{where}: scores")
    scores: list[float] = []
    for key, number in zip(SCORED, (num_targets, num_negatives)):
        if number and key not in values["scores"]:
            raise DataError(f"{where}: scores.{key} is missing; give one number for each of the {number} of {key}")
        given = values["scores"].get(key, [])
        given = given if isinstance(given, list) else [given]
        if len(given) != number:
            raise DataError(f"{where}: scores.{key} has {len(given)} numbers for {number} of {key}; give one for each")
        for score in given:
            if not is_score(score):
                raise DataError(f"{where}: scores.{key} must be numbers {SCORE_RANGE}, not {str(score)[:60]!r}")
        scores += map(float, given)
    return tuple(scores)

"""Makes a data folder of tables whose columns are the sides of pairs, as sentence-transformers trains on them.

`prepare columns` runs this once; docs/data.md has the columns. A row is a pair: a query, a target (or several), and
hard negatives, each of them a text, an image, or both, and perhaps scores. A row that cannot be a pair is counted and
listed.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from megatron_llave.config.data import META_TASKS
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.data.shards import SCORE_RANGE, is_score
from megatron_llave.data.tar_members import KEY
from megatron_llave.errors import ConfigError, DataError, one_of
from megatron_llave.options.prepare import ROLES
from megatron_llave.prepare import tables
from megatron_llave.prepare.jsonl import LONGEST_SUBSET, default_key
from megatron_llave.prepare.own_pairs import Options, write_own_pairs
from megatron_llave.prepare.shard_jobs import Prepared, Progress, SourceRow, check_limit, faulty_row, make_id
from megatron_llave.prepare.source_sides import SourceSide
from megatron_llave.prepare.stored_images import StoredImage, TableCell
from megatron_llave.prepare.tables import BOTH, IMAGE, IMAGES, NUMBER, NUMBERS, TEXT, TEXTS, Table

KNOWN = {
    "query": ("anchor", "query", "question", "sentence1"),
    "target": ("positive", "positives", "pos", "target", "answer", "sentence2"),
    "negative": ("negative", "negatives", "neg", "hard_negative", "hard_negatives"),
    "score": ("score", "scores", "label", "labels"),
}
"""Names of columns that are taken without being asked for; a negative may also be negative_1, negative_2, ..."""
CAPTIONED = ("caption", "text", "txt"), ("image", "jpg", "jpeg", "png", "webp")
"""Names of a caption and of its image, in tables without the names above."""

Given = tuple[str, tuple[str | StoredImage, ...]]
"""Text and images of a side."""


class NoPairError(ValueError):
    """A row cannot be a pair."""


@dataclass(frozen=True)
class Source:
    """Tables that make one subset."""

    subset: str
    files: list[Path]


def prepare(
    sources: Sequence[str | Path],
    directory: str | Path,
    columns: Sequence[str] = (),
    subset: str | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
    meta_task: str = "retrieval",
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make shards, index and report of tables, and the evaluation sets and the tokenizer that `options` ask for.

    Args:
        sources: files, patterns and folders (tables.find_files); each is a subset.
        directory: output directory; it is made when missing.
        columns: ROLE=COLUMN for each column that is used; empty: those whose names are known.
        subset: the name of the one subset that all sources make; None: each is named after its file or folder.
        split: the split to take of folders; None: train where there is one.
        images: the folder that relative image paths start from; None: that of their table.
        limit: the number of rows to take from the beginning of each subset; None: all.
        meta_task: the meta-task of all subsets.
        options: what else the user chooses.
        progress: called after each shard.

    Raises:
        ConfigError: an argument is out of range, or names what is not there.
        DataError: a file cannot be read or lacks a column, no row is a pair, or `write_own_pairs` fails.
    """
    one_of("--set meta_task", meta_task, META_TASKS)
    check_limit(limit)
    if subset is not None and (len(subset) > LONGEST_SUBSET or not KEY.fullmatch(subset)):
        raise ConfigError(
            f"--set subset={subset!r} must be 1 to {LONGEST_SUBSET} letters, digits, - or _, not __ first"
        )
    files = [tables.find_files(str(source), split) for source in sources]
    names = tell_apart([name_of(some) for some in files], [some[0] for some in files])
    found = [Source(subset or name, some) for name, some in zip(names, files)]
    opened = {path: tables.open_table(path) for source in found for path in source.files}
    if len(opened) < sum(len(source.files) for source in found):
        raise ConfigError("--source names a file twice")
    given = parse_roles(columns)
    roles = {path: check_roles(table, given or known_roles(table)) for path, table in opened.items()}

    def rows() -> Iterator[tuple[str, SourceRow]]:
        seen: Counter[str] = Counter()
        for source in found:
            for path in source.files:
                for row in read_pairs(opened[path], roles[path], source.subset, seen[source.subset], images):
                    if limit is not None and seen[source.subset] >= limit:
                        break
                    seen[source.subset] += 1
                    yield source.subset, row

    made = write_own_pairs(rows, directory, meta_task, options, progress)
    first = {source.subset: source.files[0] for source in reversed(found)}
    remarks = [_remark(name, opened[path], roles[path]) for name, path in first.items()]
    return replace(made, remarks=(*remarks, *made.remarks))


def _remark(subset: str, table: Table, roles: Mapping[str, list[str]]) -> str:
    """Say which columns of a subset are used for what, and which are not."""
    used = " ".join(f"{role}={name}" for role, names in roles.items() for name in names)
    others = [name for name in table.kinds if name not in {name for names in roles.values() for name in names}]
    return f"columns of {subset}: {used}" + (f"; not used: {', '.join(others)}" if others else "")


def name_of(files: Sequence[Path]) -> str:
    """Return the name of the subset that tables make: theirs without the number of a part, or else their folder's."""
    stems = {re.sub(r"-\d+-of-\d+$", "", file.stem) for file in files}
    name = stems.pop() if len(stems) == 1 else tables.TRAINING_SPLIT
    if name == tables.TRAINING_SPLIT or name == "data" != files[0].stem:
        folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
        parents = [part for part in folder.parts[1:] if part not in ("data", tables.TRAINING_SPLIT)]
        name = parents[-1] if parents else name
    return clean_name(name)


def tell_apart(names: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return names of subsets; equal ones of files in different folders get as many folders before them as needed.

    Raises:
        ConfigError: two of them cannot be told apart.
    """
    common = ("data", tables.TRAINING_SPLIT)
    folders = [
        tuple(part for part in file.absolute().parent.parts[1:] if part not in (name, *common))
        for name, file in zip(names, files)
    ]
    places = set(zip(names, folders))  # parts of a table are one subset
    twice = {name for name, count in Counter(name for name, _ in places).items() if count > 1}
    for count in range(max(map(len, folders), default=0) + 1):
        told = [
            clean_name("-".join([*folder[max(0, len(folder) - count) :], name])[-LONGEST_SUBSET:])
            if name in twice
            else name
            for name, folder in zip(names, folders)
        ]
        if len(set(told)) == len(places):
            return told
    raise ConfigError(f"--source has several tables for the subset {', '.join(sorted(twice))}; rename them")


def clean_name(name: str) -> str:
    """Return a name as the name of a subset, without the characters that it cannot have."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", name)[:LONGEST_SUBSET].strip("-") or "pairs"


def parse_roles(columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of each role that the user has named as ROLE=COLUMN."""
    roles: dict[str, list[str]] = {}
    for written in columns:
        role, sign, column = written.partition("=")
        if role not in ROLES or not sign or not column:
            raise ConfigError(f"--columns {written}: give ROLE=COLUMN, with one of the roles {', '.join(ROLES)}")
        roles.setdefault(role, []).append(column)
    several = next((role for role, names in roles.items() if len(names) > 1 and not role.startswith("negative")), None)
    if several is not None:
        raise ConfigError(f"--columns: {several} can be one column, not {' and '.join(roles[several])}")
    return roles


def known_roles(table: Table) -> dict[str, list[str]]:
    """Return the columns of each role by their names.

    Raises:
        DataError: there is no query or no target among them, or several.
    """
    names = list(table.kinds)
    roles = {role: [name for name in names if name in known] for role, known in KNOWN.items()}
    numbered = [name for name in names if re.fullmatch(r"negative_\d+", name)]
    roles["negative"] += sorted(numbered, key=lambda name: int(name.split("_")[1]))
    several = next((role for role in ("query", "target", "score") if len(roles[role]) > 1), None)
    if not roles["query"] and not roles["target"]:
        caption, image = ([name for name in names if name in known] for known in CAPTIONED)
        if len(caption) == len(image) == 1:
            return {"query": caption, "target_image": image}
    if several is not None or not roles["query"] or not roles["target"]:
        wrong = "which column is the query and which the target is not clear from their names"
        if several is not None:
            wrong = f"{' and '.join(roles[several])} could both be the {several}"
        hint = "say it with --columns, such as --columns query=COLUMN target=COLUMN negative=COLUMN"
        raise DataError(f"{table.path}: {wrong}: {', '.join(names)[:300]}; {hint}")
    return {role: columns for role, columns in roles.items() if columns}


def check_roles(table: Table, roles: Mapping[str, list[str]]) -> Mapping[str, list[str]]:
    """Return the roles.

    Raises:
        DataError: a column is missing or of a type that its role cannot have, or there is no query or no target.
    """
    for role, columns in roles.items():
        for name in columns:
            kind = table.kinds.get(name)
            if kind is None:
                raise DataError(f"{table.path} has no column {name!r}; its columns are {', '.join(table.kinds)[:300]}")
            right = (TEXT, TEXTS, IMAGE, IMAGES, *(() if role.endswith("_image") else (BOTH,)))
            right = (NUMBER, NUMBERS, TEXT) if role == "score" else right
            if role == "score" and name in table.classes:
                some = ", ".join(table.classes[name])[:100]
                hint = "name the columns that are used with --columns query=COLUMN target=COLUMN"
                raise DataError(f"{table.path}: column {name!r} has classes ({some}), which are no scores; {hint}")
            if kind not in (*right, tables.ANY) and not (kind == NUMBER and name in table.classes):
                needs = ", ".join(right[:-1]) + f" or {right[-1]}"
                raise DataError(f"{table.path}: column {name!r} is of type {kind}, but {role} must be {needs}")
    for side in ("query", "target"):
        if not {side, f"{side}_image"} & roles.keys():
            raise ConfigError(f"--columns names no {side}; add {side}=COLUMN or {side}_image=COLUMN")
    return roles


def read_pairs(
    table: Table, roles: Mapping[str, list[str]], subset: str, first: int, images: str | Path | None = None
) -> Iterator[SourceRow]:
    """Yield the rows of a table as pairs; one that cannot be a pair has its `fault`.

    Args:
        table: the table.
        roles: the columns of each role.
        subset: the subset, for the keys of the pairs.
        first: the number of its first row in the subset.
        images: the folder that relative image paths start from; None: that of the table.

    Raises:
        DataError: the file is damaged.
    """
    columns = list(dict.fromkeys(name for names in roles.values() for name in names))
    folder = str(images if images is not None else table.path.parent)
    for number, (where, values) in enumerate(tables.read_rows(table, columns), start=first):
        key = default_key(subset, number)
        try:
            query, targets, negatives, scores = _sides_of(values, roles)
        except (NoPairError, DataError) as error:
            yield faulty_row(key, where, folder, str(error))
            continue
        yield SourceRow(key, where, folder, query, targets[0], negatives, targets[1:], scores)


def _sides_of(
    row: Mapping[str, Any], roles: Mapping[str, list[str]]
) -> tuple[SourceSide, tuple[SourceSide, ...], tuple[SourceSide, ...], tuple[float, ...]]:
    """Return query, targets, hard negatives and scores of a row."""
    given = {role: [_inputs(row[name], name, role) for name in names] for role, names in roles.items()}
    query = _merged(given, "query", 0)
    texts = [text for text, _ in query if text]
    if len(texts) > 1:
        raise NoPairError(f"the query is a list of {len(texts)} texts; it must be one")
    query = [("".join(texts), tuple(image for _, images in query for image in images))]
    targets = _merged(given, "target", 0) or [("", ())]
    count = max(len(given.get("negative", ())), len(given.get("negative_image", ())))
    negatives = [_merged(given, "negative", number) or [None] for number in range(count)]
    negatives = [side for some in negatives for side in some]
    scores = _scores(row, roles, len(targets), len(negatives))
    kept = [side not in (None, ("", ())) for side in negatives]  # some rows have fewer than there are columns
    scores = compress(scores, [True] * len(targets) + kept)
    some = ([_side(*given) for given in sides] for sides in (query, targets, compress(negatives, kept)))
    (query,), targets, negatives = some
    return query, tuple(targets), tuple(negatives), tuple(scores)


def _inputs(value: Any, column: str, role: str) -> list[Given]:
    """Return what a value of a column gives for its role; empty if there is nothing."""
    if value is None or role == "score":
        return []
    if isinstance(value, list):
        return [given for item in value for given in _inputs(item, column, role) or [("", ())]]
    if isinstance(value, TableCell):
        return [("", (value,))]
    if isinstance(value, str):
        return [("", (value,) if value else ())] if role.endswith("_image") else [(value, ())]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return [("", (value["path"],))]
    if isinstance(value, dict) and {"text", "image"} & value.keys() and not role.endswith("_image"):
        parts = _inputs(value.get("text"), column, role), _inputs(value.get("image"), column, f"{role}_image")
        return [(parts[0][0][0] if parts[0] else "", tuple(image for _, images in parts[1] for image in images))]
    raise NoPairError(f"column {column!r} has {value!r:.60}, but {role} must be a text, an image, or a list of them")


def _merged(given: Mapping[str, list[list[Given]]], side: str, number: int) -> list[Given]:
    """Return the sides of the text column and of the image column that have the same number."""
    texts, images = ((given.get(role, [])[number : number + 1] or [[]])[0] for role in (side, f"{side}_image"))
    if side == "query" or not texts or not images:
        return texts + images
    if len(texts) != len(images):
        raise NoPairError(f"{side} has {len(texts)} texts for {len(images)} images; give one for each")
    return [(text, before + after) for (text, before), (_, after) in zip(texts, images)]


def _side(text: str, images: tuple[str | StoredImage, ...]) -> SourceSide:
    return SourceSide(mark_user_text(text, len(images)), images, "" if images else make_id(text, []))


def _scores(
    row: Mapping[str, Any], roles: Mapping[str, list[str]], num_targets: int, num_negatives: int
) -> tuple[float, ...]:
    """Return the scores of the targets and then of the hard negatives, or none."""
    value = row[roles["score"][0]] if "score" in roles else None
    if value is None or value == "":
        return ()
    scores = value if isinstance(value, list) else [value]
    try:
        scores = [float(score) if isinstance(score, str) else score for score in scores]
    except ValueError:
        scores = [None]
    if not all(map(is_score, scores)):
        raise NoPairError(f"the score {value!r:.60} must be a number {SCORE_RANGE}, or a list of them")
    if len(scores) != num_targets + num_negatives:
        sides = f"{num_targets} targets and {num_negatives} hard negatives"
        raise NoPairError(f"there are {len(scores)} scores for {sides}; give one for each, or leave out the column")
    return tuple(map(float, scores))

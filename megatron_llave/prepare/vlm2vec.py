"""Makes shards of the data sets in a list of VLM2Vec: the YAML file of its --dataset_config, also those of B3.

`prepare vlm2vec` runs this once. The data sets of the list have been downloaded: rows with the columns of MMEB-train
(`dataset_parser: mmeb`, or `mmeb_neg` with lists of hard negatives), or visual documents (`vidore` and `visrag`). The
weights of the list become a file `mixture.yaml`, a section `data` of a configuration.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from megatron_llave.config.parse import read_yaml
from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.data.tar_members import KEY
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import write_text
from megatron_llave.options.prepare import MMEB_SPLITS
from megatron_llave.prepare import columns, mmeb, tables
from megatron_llave.prepare.jsonl import LONGEST_SUBSET
from megatron_llave.prepare.shard_jobs import (
    PAIRS_PER_SHARD,
    Prepared,
    Progress,
    SourceRow,
    check_arguments,
    check_limit,
    cut_into_jobs,
    faulty_row,
    write_shards,
)

MMEB_PARSERS = ("mmeb", "mmeb_neg")
DOCUMENT_ROLES = {
    "vidore": {"query": ["query"], "query_image": ["image"], "target": ["answer"]},
    "visrag": {"query": ["query"], "target_image": ["image"]},
}
"""The columns of the parsers of visual documents."""
PARSERS = (*MMEB_PARSERS, *DOCUMENT_ROLES)
MIXTURE_FILE = "mixture.yaml"
NULLS = (None, "", "null", "~")


@dataclass(frozen=True)
class Listed:
    """A data set of the list."""

    name: str
    """The name of the subset that it becomes."""
    parser: str
    files: list[Path]
    image_folder: Path
    weight: float
    hard_negatives: int
    meta_task: str
    num_rows: int
    """Number of rows that are taken."""


def prepare(
    list_file: str | Path,
    directory: str | Path,
    root: str | Path = ".",
    subsets: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make shards, index and report of the data sets of a list, and the file of their weights.

    Args:
        list_file: the YAML file: name -> dataset_parser, dataset_name, subset_name, dataset_split, image_dir, weight,
            num_sample_per_subset, num_hardneg.
        directory: output directory; it is made when missing.
        root: the folder that has the downloads: <root>/<dataset_name>, or <root>/<its last part>, and image_dir.
        subsets: the names of the list to take, in this order; None: all.
        limit: number of rows to take from the beginning of each data set, if it is less than num_sample_per_subset.
        workers: number of worker processes; 1: no worker processes.
        max_pixels: images with more pixels are skipped.
        overwrite: replace a finished folder.
        progress: called after each shard.

    Raises:
        ConfigError: an argument or an entry of the list is wrong, or names what is not there.
        DataError: a file cannot be read or lacks a column, or `write_shards` fails.
    """
    check_arguments(workers, max_pixels)
    check_limit(limit)
    listed = read_list(Path(list_file), Path(root), subsets, limit)
    progress("reading the list", 0, 1)
    jobs = chain.from_iterable(
        cut_into_jobs(directory, entry.name, islice(read_rows(entry), entry.num_rows), True, max_pixels)
        for entry in listed
    )
    num_jobs = sum(-(-entry.num_rows // PAIRS_PER_SHARD) for entry in listed)
    meta_tasks = {entry.name: entry.meta_task for entry in listed}

    def write_mixture() -> list[dict[str, Any]]:
        write_text(Path(directory) / MIXTURE_FILE, mixture_of(listed, str(directory)))
        return []

    return write_shards(jobs, num_jobs, directory, meta_tasks, workers, overwrite, progress, write_mixture)


def mixture_of(listed: Sequence[Listed], directory: str) -> str:
    """Return a section `data` of a configuration that draws the data sets as the list says."""
    data: dict[str, Any] = {"path": directory}
    if hard_negatives := max(entry.hard_negatives for entry in listed):
        data["hard_negatives"] = hard_negatives
    data["subsets"] = {entry.name: {"weight": entry.weight} for entry in listed}
    return yaml.safe_dump({"data": data}, sort_keys=False, allow_unicode=True)


def read_list(path: Path, root: Path, subsets: Sequence[str] | None = None, limit: int | None = None) -> list[Listed]:
    """Return the data sets of a list; the arguments are those of `prepare`.

    Raises:
        ConfigError: an entry is wrong, or names what is not there.
        DataError: a file cannot be read or lacks a column.
    """
    entries = read_yaml(path)
    unknown = next((name for name in subsets or () if name not in entries), None)
    if unknown is not None or not entries:
        hint = f" {unknown}; it has {', '.join(map(str, entries))[:300]}" if entries else ""
        raise ConfigError(f"{path} has no data set{hint}")
    chosen = dict.fromkeys(subsets or entries)
    return [_entry(str(name), entries[name], f"{path}: {name}", root, limit) for name in chosen]


def _entry(name: str, given: Any, where: str, root: Path, limit: int | None) -> Listed:
    if len(name) > LONGEST_SUBSET or not KEY.fullmatch(name):
        raise ConfigError(f"{where}: a name must be 1 to {LONGEST_SUBSET} letters, digits, - or _, not __ first")
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must have keys such as dataset_parser and weight, not {given!r:.60}")
    given = {key: value for key, value in given.items() if value not in NULLS}  # scalars are still text
    parser, folder = given.get("dataset_parser"), given.get("image_dir")
    if parser not in PARSERS:
        right = f"dataset_parser must be {', '.join(PARSERS[:-1])} or {PARSERS[-1]}, not {parser!r}"
        raise ConfigError(f"{where}: {right}; choose others with --subsets, or write its pairs for the command jsonl")
    weight = _number(given, "weight", where, float, 1.0)
    if not 0 < weight < float("inf"):
        raise ConfigError(f"{where}: weight must be above 0, not {weight}")
    limits = [_number(given, "num_sample_per_subset", where, int, limit), limit]
    limit = min((number for number in limits if number is not None), default=None)
    files = _downloaded({"dataset_split": MMEB_SPLITS[0]} | given if parser in MMEB_PARSERS else given, where, root)
    num_rows = sum(count_rows(tables.open_table(file), parser) for file in files)
    num_rows = num_rows if limit is None else min(limit, num_rows)
    negatives = _number(given, "num_hardneg", where, int, 0)
    meta_task = mmeb.SUBSETS.get(given.get("subset_name") or name, "retrieval")
    return Listed(name, parser, files, root / (folder or ""), weight, negatives, meta_task, num_rows)


def _number(given: Mapping[str, Any], key: str, where: str, kind: Callable[[str], Any], default: Any) -> Any:
    if given.get(key) is None:
        return default
    try:
        number = kind(given[key])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {key} must be a number, not {given[key]!r:.60}") from error
    if number < 0:
        raise ConfigError(f"{where}: {key} must be at least 0, not {number}")
    return number


def _downloaded(given: Mapping[str, Any], where: str, root: Path) -> list[Path]:
    """Return the tables of an entry."""
    name, subset = given.get("dataset_path") or given.get("dataset_name"), given.get("subset_name")
    if not isinstance(name, str) or not isinstance(subset, str | None):
        raise ConfigError(f"{where}: dataset_name must be the name of a data set or a folder, not {name!r:.60}")
    places = [root / name, root / Path(name).name]
    place = next((place for place in places if os.path.exists(place)), None)
    if place is None:
        raise ConfigError(
            f"{where}: neither {places[0]} nor {places[1]} exists; download {name}, or say --data-basedir"
        )
    if os.path.isfile(place):
        return tables.find_files(str(place))
    inside = place / subset if subset else place
    files = [inside.with_name(f"{inside.name}{suffix}") for suffix in tables.SUFFIXES] if subset else []
    file = next((file for file in files if os.path.isfile(file)), None)
    if not os.path.isdir(inside) and file is None:
        raise ConfigError(f"{where}: {place} has no folder {subset} and no {subset}.parquet or .jsonl")
    return tables.find_files(str(inside), given.get("dataset_split")) if os.path.isdir(inside) else [file]


def count_rows(table: tables.Table, parser: str) -> int:
    """Return the number of rows of a table.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    needed = DOCUMENT_ROLES.get(parser)
    for name in [name for names in needed.values() for name in names] if needed else mmeb.COLUMNS:
        if name not in table.kinds:
            raise DataError(f"{table.path} has no column {name!r}; its columns are {', '.join(table.kinds)[:300]}")
    return tables.count_rows(table)


def read_rows(entry: Listed) -> Iterator[SourceRow]:
    """Yield the rows of a data set in order; one that cannot be a pair has its `fault`.

    Raises:
        DataError: a file is damaged.
    """
    number = 0
    for file in entry.files:
        table = tables.open_table(file)
        read = partial(columns.read_pairs, roles=DOCUMENT_ROLES.get(entry.parser, {}), images=entry.image_folder)
        rows = (
            read(table, subset=entry.name, first=number)
            if entry.parser in DOCUMENT_ROLES
            else _pairs(entry, table, number)
        )
        for row in rows:
            yield row
            number += 1


def _pairs(entry: Listed, table: tables.Table, first: int) -> Iterator[SourceRow]:
    names = [name for name in mmeb.COLUMNS + mmeb.NEGATIVE_COLUMNS if name in table.kinds]
    for number, (where, row) in enumerate(tables.read_rows(table, names), start=first):
        try:
            yield replace(mmeb.to_row(row, entry.name, number, where, str(entry.image_folder)), row=where)
        except DataError as error:
            yield faulty_row(f"{entry.name}-{number:08d}", where, str(entry.image_folder), str(error))

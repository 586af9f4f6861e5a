"""Makes shards of MMEB-train, the training half of the MMEB benchmark: Parquet or JSON rows and an image folder.

llave prepare runs this once. It reads the columns that the official LLaVE repository reads (qry,
qry_image_path, pos_text, pos_image_path) in the order of the file, and also the hard negatives, which that ignores: one
of a row, or a list.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import MAX_JSON_BYTES, parse_json, read_bytes
from megatron_llave.options.prepare import MMEB_SPLITS
from megatron_llave.prepare.shard_jobs import (
    PAIRS_PER_SHARD,
    Prepared,
    Progress,
    SourceRow,
    check_arguments,
    check_limit,
    cut_into_jobs,
    make_id,
    write_shards,
)
from megatron_llave.prepare.source_sides import SourceSide

SUBSETS = {
    **dict.fromkeys(("ImageNet_1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"), "classification"),
    **dict.fromkeys(("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"), "vqa"),
    **dict.fromkeys(("VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t"), "retrieval"),
    **dict.fromkeys(("MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA"), "retrieval"),
    "MSCOCO": "grounding",
}
"""The meta-task of each of the 20 training subsets, with the spelling of the training data (ImageNet_1K)."""

COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")


@dataclass(frozen=True)
class Table:
    """The files that hold the rows of one subset."""

    subset: str
    files: list[Path]
    """The Parquet files in order, or one JSON file."""
    num_rows: int
    """Number of rows that are taken."""


def prepare(
    source: str | Path,
    directory: str | Path,
    split: str = "original",
    subsets: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make shards, index and report of MMEB-train.

    Args:
        source: folder with `<subset>/<split>-00000-of-00001.parquet` (or `<subset>.json`) and the images.
        directory: output directory; it is made when missing.
        split: original or diverse_instruction.
        subsets: the subsets to take, in this order; None: all that the source has, sorted by name.
        limit: number of rows to take from the beginning of each subset, skipped rows included; None: all.
        workers: number of worker processes; 1: no worker processes.
        max_pixels: images with more pixels are skipped.
        overwrite: replace a finished folder.
        progress: called after each shard.

    Raises:
        ConfigError: an argument is out of range, or a subset is unknown.
        DataError: the source is incomplete or malformed, or `write_shards` fails.
    """
    check_arguments(workers, max_pixels)
    if split not in MMEB_SPLITS:
        raise ConfigError(f"split {split!r} is not one of {', '.join(MMEB_SPLITS)}")
    check_limit(limit)
    source = Path(source)
    tables = [find_table(source, subset, split, limit) for subset in _chosen(source, subsets)]
    jobs = (
        job
        for table in tables
        for job in cut_into_jobs(directory, table.subset, read_rows(table, source), True, max_pixels)
    )
    num_jobs = sum(-(-table.num_rows // PAIRS_PER_SHARD) for table in tables)
    meta_tasks = {table.subset: SUBSETS[table.subset] for table in tables}
    return write_shards(jobs, num_jobs, directory, meta_tasks, workers, overwrite, progress)


def _chosen(source: Path, subsets: Sequence[str] | None) -> list[str]:
    """Return the subsets that were asked for, or all that the source has."""
    if not source.is_dir():
        raise DataError(f"--source {source} is not a folder; it must be that of MMEB-train")
    if subsets is None:
        folders = {path.parent.name for path in source.glob("*/*.parquet")}
        subsets = sorted(folders | {path.stem for path in source.glob("*.json")})
        if not subsets:
            raise DataError(f"{source} holds no <subset>/<split>-00000-of-00001.parquet and no <subset>.json")
    for subset in subsets:
        if subset not in SUBSETS:
            raise ConfigError(
                f"{source}: {subset!r} is no training subset of MMEB, which are {', '.join(SUBSETS)}; choose some with "
                "--subsets, or make shards of other data with the command jsonl"
            )
    return list(dict.fromkeys(subsets))


def find_table(source: Path, subset: str, split: str, limit: int | None) -> Table:
    """Return the files of a split of a subset: Parquet, or else JSON, which has the split `original` only.

    Raises:
        DataError: there are no files, one of several Parquet files is missing, or a file cannot be read or lacks a
            column.
    """
    matches = {path: match for path in (source / subset).glob("*.parquet") if (match := _PART.fullmatch(path.name))}
    parts = {match[2]: path for path, match in matches.items() if match[1] == split}
    record_file = source / f"{subset}.json"
    if parts:
        totals = {match[3] for match in matches.values() if match[1] == split}
        wanted = [f"{number:05d}" for number in range(int(max(totals)))]
        if len(totals) > 1 or sorted(parts) != wanted:
            message = f"has parts {', '.join(sorted(parts))} of {' and '.join(sorted(totals))} of split {split}"
            raise DataError(f"{source / subset} {message}; complete the download")
        files = [parts[number] for number in wanted]
        num_rows = sum(map(_count_rows, files))
    elif split == "original" and record_file.is_file():
        files = [record_file]
        num_rows = len(_load_records(record_file))
    else:
        others = ", ".join(sorted({match[1] for match in matches.values()})) or "none"
        raise DataError(
            f"{source / subset} has no {split}-00000-of-00001.parquet (splits there: {others}), nor is there a "
            f"{record_file.name} for split original; choose with --split and --subsets"
        )
    return Table(subset, files, num_rows if limit is None else min(limit, num_rows))


def read_rows(table: Table, source: Path) -> Iterator[SourceRow]:
    """Yield the rows that are taken, in order; of Parquet files only a thousand rows are in memory at a time.

    Raises:
        DataError: a file is damaged, or a value is not a string.
    """
    values = chain.from_iterable(map(_read_values, table.files))
    for number, row in enumerate(islice(values, table.num_rows)):
        yield to_row(row, table.subset, number, f"subset {table.subset} of {source}, row {number}", str(source))


def to_row(row: dict[str, Any], subset: str, number: int, where: str, folder: str) -> SourceRow:
    """Return the pair of a row with COLUMNS and perhaps NEGATIVE_COLUMNS; `where` begins messages.

    Raises:
        DataError: a value is not a string, or the lists of hard negatives differ in length.
    """
    query, target = _side(row, *COLUMNS[:2], where), _side(row, *COLUMNS[2:], where)
    return SourceRow(f"{subset}-{number:08d}", number, folder, query, target, _negatives(row, where))


def _negatives(row: dict[str, Any], where: str) -> tuple[SourceSide, ...]:
    """Return the hard negatives: one, or those of lists, as in the mined data of VLM2Vec (branch b3)."""
    values = [row.get(column) or "" for column in NEGATIVE_COLUMNS]
    lengths = [len(value) for value in values if isinstance(value, list)]
    if len(set(lengths)) > 1:
        raise DataError(f"{where}: neg_text has {lengths[0]} values and neg_image_path {lengths[1]}")
    length = lengths[0] if lengths else 1
    columns = [value if isinstance(value, list) else [value] * length for value in values]
    sides = [_side(dict(zip(NEGATIVE_COLUMNS, both)), *NEGATIVE_COLUMNS, where) for both in zip(*columns)]
    return tuple(side for side in sides if side.text or side.images)


def _side(row: dict[str, Any], text_column: str, image_column: str, where: str) -> SourceSide:
    text, image = row.get(text_column) or "", row.get(image_column) or ""
    for column, value in ((text_column, text), (image_column, image)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {column} must be a string, not {str(value)[:60]!r}")
    images = (image,) if image else ()
    return SourceSide(text, images, make_id(text, images))


def _read_values(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".json":
        yield from _load_records(path)
        return
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in COLUMNS + NEGATIVE_COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=PAIRS_PER_SHARD, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _count_rows(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(names)}")
    return num_rows


def _load_records(path: Path) -> list[dict[str, Any]]:
    records = parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} must be a list of objects with {', '.join(COLUMNS)}")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not set(COLUMNS) <= record.keys():
            raise DataError(f"{path}: record {number} must be an object with {', '.join(COLUMNS)}")
    return records


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({' '.join(str(error).split())}); download it again")

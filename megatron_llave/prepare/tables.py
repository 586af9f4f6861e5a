"""The one reader of tables that hold pairs: Parquet, Arrow, CSV, TSV and JSON lines, and the folders they come in.

A folder may be one that `save_to_disk` of Hugging Face's datasets has written, or a downloaded data set. pyarrow alone
reads them: nothing of a file is executed, and no package of a hub is needed. Rows come one after the other, and images
are left where they are (stored_images.py), so that memory does not grow with the table.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_llave.data.items import read_jsonl
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import MAX_JSON_BYTES, parse_json, read_bytes, read_json, read_lines
from megatron_llave.prepare.stored_images import READ_ERRORS, TableCell, open_arrow, unreadable

BINARY, CSV, JSON = (".parquet", ".arrow"), (".csv", ".tsv"), (".jsonl", ".json")
SUFFIXES = BINARY + CSV + JSON
ROWS_AT_ONCE = 1000
NO_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "_stats.json")
"""Ends of the names of files beside the tables of a data set; the last one is of img2dataset."""
TRAINING_SPLIT = "train"
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")

TEXT, TEXTS, NUMBER, NUMBERS = "text", "list of texts", "number", "list of numbers"
IMAGE, IMAGES = "image", "list of images"
BOTH = "text and image"
"""Kind of a struct with the fields `text` and `image`, as sentence-transformers takes them."""
ANY = "any"
"""Kind of the columns of JSON lines, whose values are looked at one by one."""


@dataclass(frozen=True)
class Table:
    """A file with rows."""

    path: Path
    kinds: dict[str, str]
    """The kind of each column, in order; of others than those above it is the name of the Arrow type."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """The names of the numbers in the columns that are a ClassLabel of the package datasets."""


def find_files(source: str, split: str | None = None) -> list[Path]:
    """Return the tables of a source in order.

    Args:
        source: a file, a pattern with `*`, a folder of tables, or one that `save_to_disk` has written.
        split: which split of a folder; None: `train` if the folder has one of that name, else everything.

    Raises:
        ConfigError: there is no such split, or nothing of that name.
        DataError: the folder holds no tables, tables of several kinds, or a description that cannot be followed.
    """
    path = Path(source)
    if os.path.isdir(path):
        return _in_folder(path, split)
    files = [path] if os.path.isfile(path) else [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ConfigError(f"--source {source} is no file, no folder, and no pattern that names a file")
    unknown = next((file for file in files if file.suffix not in SUFFIXES), None)
    if unknown is not None:
        raise DataError(f"{unknown} is no table: the name must end in {', '.join(SUFFIXES)}")
    return files


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    if os.path.isfile(folder / "dataset_dict.json"):
        values = read_json(folder / "dataset_dict.json")
        splits = values.get("splits") if isinstance(values, dict) else None
        if not isinstance(splits, list) or not all(map(_is_inside, splits)):
            raise DataError(f"{folder / 'dataset_dict.json'} must list its own folders as splits; save the set again")
        return _in_folder(folder / _choose(splits, split, folder), None)
    if os.path.isfile(folder / "state.json"):
        return _saved_files(folder)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES and not path.name.endswith(NO_TABLES) and path.is_file()
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    splits = {file: _splits_of(file, folder) for file in files}
    known = dict.fromkeys(name for names in splits.values() for name in names)
    if split is not None or TRAINING_SPLIT in known:
        chosen = _choose(list(known), split, folder)
        files = [file for file in files if chosen in splits[file]]
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) != 1:
        found = f"tables that end in {' and in '.join(suffixes)}" if suffixes else f"no {', '.join(SUFFIXES)}"
        raise DataError(f"{folder} holds {found}; name the files or give a pattern, such as '{folder}/*.parquet'")
    _check_parts(files)
    return files


def _splits_of(file: Path, folder: Path) -> list[str]:
    """Return the splits that a table of a data set may be of: its name without a part's number, the end of that, as in
    the cache of datasets (json-train.arrow), and the name of its folder.
    """
    name = _PART.sub("", file.stem)
    return [name, name.rpartition("-")[2], *([file.parent.name] if file.parent != folder else [])]


def _check_parts(files: Sequence[Path]) -> None:
    """Raise a DataError if one of several files such as train-00000-of-00003.parquet is missing."""
    parts: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        if match := _PART.search(file.stem):
            parts.setdefault((file.parent, file.stem[: match.start()], match[2]), set()).add(int(match[1]))
    for (folder, stem, total), numbers in parts.items():
        missing = next((number for number in range(min(int(total), len(numbers) + 1)) if number not in numbers), None)
        if missing is not None:
            name = f"{stem}-{missing:05d}-of-{total}{files[0].suffix}"
            raise DataError(f"{folder / name} is missing; complete the download, or name the files")


def _choose(splits: list[str], split: str | None, folder: Path) -> str:
    if split is None and (TRAINING_SPLIT in splits or len(splits) == 1):
        split = TRAINING_SPLIT if TRAINING_SPLIT in splits else splits[0]
    if split not in splits:
        given = "no split is chosen (--set split=NAME, or dataset_split of a list)"
        given = given if split is None else f"split {split} is not there"
        raise ConfigError(f"{given}: the splits of {folder} are {', '.join(splits) or 'not known'}")
    return split


def _is_inside(name: Any) -> bool:
    """Whether a description names something that lies in its own folder, and no other place of the machine."""
    return isinstance(name, str) and Path(name).name == name


def _saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder that `save_to_disk` has written."""
    file = folder / "state.json"
    state = read_json(file)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or [None]]
    wrong = next((name for name in names if not _is_inside(name)), "")
    if wrong != "":
        raise DataError(f"{file} names {wrong!r} as a data file, not a file of its folder; save it again")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} is of a selection whose rows are listed apart; save it with a newer datasets")
    return [folder / name for name in names]


def open_table(path: Path) -> Table:
    """Return the columns of a table. Of JSON, whose rows need not have all keys, every row is read for them.

    Raises:
        DataError: the file cannot be read or has no columns.
    """
    if path.suffix in CSV:
        return _not_empty(Table(path, dict.fromkeys(filter(None, read_csv(path)[0]), TEXT)))
    if path.suffix in JSON:
        return _not_empty(Table(path, dict.fromkeys((name for _, row in _json_rows(path) for name in row), ANY)))
    try:
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
        else:
            with open_arrow(path) as (schema, _):
                pass
        kinds = {column.name: kind_of(column.type) for column in schema}
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    return _not_empty(Table(path, kinds, _class_names(schema)))


def _not_empty(table: Table) -> Table:
    if not table.kinds:
        raise DataError(f"{table.path} is empty: it has no columns")
    return table


def kind_of(kind: pa.DataType) -> str:
    """Return the kind of a column by its Arrow type."""
    types = pa.types
    if types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind) or str(kind) == "string_view":
        return TEXT
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return NUMBER
    if types.is_binary(kind) or types.is_large_binary(kind) or str(kind) == "binary_view":
        return IMAGE
    if types.is_struct(kind):
        fields = {field.name: kind_of(field.type) for field in kind}
        if fields.get("bytes") in (IMAGE, TEXT) and fields.get("path") == TEXT:  # an Arrow null counts as a text
            return IMAGE
        return BOTH if fields.get("text") == TEXT and fields.get("image") == IMAGE else str(kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return {TEXT: TEXTS, NUMBER: NUMBERS, IMAGE: IMAGES}.get(kind_of(kind.value_type), str(kind))
    return str(kind)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of each ClassLabel, which the package datasets keeps beside the schema."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = described["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # written by another program


def count_rows(table: Table) -> int:
    """Return the number of rows of a table; for a Parquet file none of them is read.

    Raises:
        DataError: the file is damaged.
    """
    if table.path.suffix not in BINARY:
        return sum(1 for _ in read_rows(table, []))
    try:
        if table.path.suffix == ".parquet":
            return pq.read_metadata(table.path).num_rows
        with open_arrow(table.path) as (_, batches):
            return sum(map(len, batches))
    except READ_ERRORS as error:
        raise unreadable(table.path, error) from error


def read_rows(table: Table, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row is, FILE:LINE or FILE with the number of the row from 0, and its values by column.

    The value of an IMAGE is a TableCell, that of IMAGES a list of them, and that of BOTH a dictionary; None: there is
    none. Values of a ClassLabel are its names.

    Raises:
        DataError: the file is damaged; the message names it, and the line where it has lines.
    """
    if table.path.suffix in CSV:
        names, lines = read_csv(table.path)
        yield from ((where, {name: values[names.index(name)] for name in columns}) for where, values in lines)
    elif table.path.suffix in JSON:
        yield from ((where, {name: row.get(name) for name in columns}) for where, row in _json_rows(table.path))
    else:
        try:
            yield from _binary_rows(table, columns)
        except READ_ERRORS as error:
            raise error if isinstance(error, DataError) else unreadable(table.path, error) from error


def _binary_rows(table: Table, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for part in _parquet_parts(table, columns) if table.path.suffix == ".parquet" else _arrow_parts(table, columns):
        for row in zip(*(part.values(table, name) for name in columns)):
            yield f"{table.path}, row {number}", dict(zip(columns, row))
            number += 1


@dataclass(frozen=True)
class _Part:
    """Some rows of a row group or record batch."""

    group: int
    first: int
    """Number of the first row in its group."""
    size: int
    columns: dict[str, pa.Array]
    """What has been read: not the bytes of images."""

    def values(self, table: Table, name: str) -> list[Any]:
        """Return the values of a column as `read_rows` gives them."""
        column, kind = self.columns.get(name), table.kinds[name]
        if kind == IMAGE:
            return self._cells(table, name, column)
        if kind == IMAGES:
            return [
                None if size is None else [replace(cell, item=item) for item in range(size)]
                for cell, size in zip(self._cells(table, name, None), pc.list_value_length(column).to_pylist())
            ]
        if kind == BOTH:
            fields = {column.type.field(number).name for number in range(column.type.num_fields)}
            texts = pc.struct_field(column, "text").to_pylist()
            image = pc.struct_field(column, "image") if "image" in fields else None
            both = zip(texts, self._cells(table, name, image, "image"))
            return [{"text": text, "image": cell} for text, cell in both]
        classes, values = table.classes.get(name), column.to_pylist()
        if classes and kind == NUMBER:
            return [classes[value] if value is not None and 0 <= value < len(classes) else None for value in values]
        return values

    def _cells(self, table: Table, name: str, column: pa.Array | None, *field: str) -> list[TableCell | None]:
        """Return an image of each row; one that is not read here is taken to be there."""
        valid = [True] * self.size if column is None else column.is_valid().to_pylist()
        file, column = str(table.path), (name, *field)
        rows = range(self.first, self.first + self.size)
        return [TableCell(file, column, self.group, row) if is_there else None for row, is_there in zip(rows, valid)]


def _arrow_parts(table: Table, columns: Sequence[str]) -> Iterator[_Part]:
    with open_arrow(table.path) as (_, batches):
        for group, batch in enumerate(batches):
            batch = batch.select(columns)
            batch.validate(full=True)  # offsets of a damaged file would lead out of its memory
            for first in range(0, len(batch), ROWS_AT_ONCE):
                part = batch.slice(first, ROWS_AT_ONCE)
                yield _Part(group, first, len(part), dict(zip(columns, part.columns)))


def _parquet_parts(table: Table, columns: Sequence[str]) -> Iterator[_Part]:
    with pq.ParquetFile(table.path, buffer_size=2**20, pre_buffer=False) as file:
        paths = [file.schema.column(number).path for number in range(len(file.schema))]
        chosen = [path for path in paths for name in columns if _is_read(path, name, table.kinds[name])]
        for group in range(file.num_row_groups):
            first, size = 0, file.metadata.row_group(group).num_rows
            if not chosen:
                yield from (
                    _Part(group, row, min(ROWS_AT_ONCE, size - row), {}) for row in range(0, size, ROWS_AT_ONCE)
                )
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=chosen):
                yield _Part(group, first, len(batch), dict(zip(batch.schema.names, batch.columns)))
                first += len(batch)


def _is_read(path: str, name: str, kind: str) -> bool:
    """Whether a column of a Parquet file, with its dotted path, is read for a column of the table: not image bytes."""
    if path != name and not path.startswith(f"{name}."):
        return False
    if kind in (IMAGE, BOTH):
        return path != name and not path.endswith((".bytes", ".image"))
    return kind != IMAGES or not path.endswith(".bytes")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file with one in each line, or of a .json file that is a list of them."""
    if path.suffix == ".json" and next(read_lines(path), (0, b""))[1].lstrip().startswith(b"["):
        values = parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))
        rows = ((f"{path}, row {number}", value) for number, value in enumerate(values))
    else:
        rows = ((where, value) for _, where, value in read_jsonl(path))
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be an object with the columns as keys, not {row!r:.60}")
        yield where, row


def read_csv(file: Path) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """Return the names in the first line of a CSV or TSV file, and an iterator of FILE:LINE and values of the others.

    Values are separated by tabs if the first line has one, else by commas, else by semicolons.

    Raises:
        DataError: the file cannot be read, a name comes twice, or a line is malformed; the message has FILE:LINE.
    """
    lines = text_lines(file)
    first = next(lines, "")
    separator = next((mark for mark in "\t,;" if mark in first), ",")
    try:
        names = [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
    except csv.Error as error:
        raise DataError(f"{file}:1: {error}") from error
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        shown = ", ".join(names)[:200]
        raise DataError(f"{file}:1: {twice!r} is the name of two columns of {shown!r}; rename one")
    return names, _csv_rows(file, names, csv.reader(lines, delimiter=separator, strict=True), separator)


def _csv_rows(file: Path, names: list[str], reader: Any, separator: str) -> Iterator[tuple[str, list[str]]]:
    try:
        for values in reader:
            where = f"{file}:{reader.line_num + 1}"
            if len(values) == len(names):
                yield where, [value.strip() for value in values]
            elif values:
                hint = f"put quotation marks around a value that has {separator!r} in it"
                raise DataError(f"{where}: has {len(values)} values, but the first line has {len(names)} names; {hint}")
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num + 1}: {error}") from error


def text_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield from stream
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text") from error

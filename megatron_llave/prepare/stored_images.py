"""Images that lie inside of another file: members of a tar, and values of Parquet and Arrow tables.

A source yields where they lie; the bytes are read by the process that writes the shard, so that no more of them are in
memory than that needs. Nothing of a file is executed: a value is bytes or the path of an image file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llave.batch import MAX_IMAGE_BYTES
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN

ROWS_AT_ONCE = 16
"""Number of rows of a Parquet file whose images are in memory at a time."""
OPEN_COLUMNS = 8
"""Number of columns, each with a page of a Parquet file, that are kept open."""
ARROW_FILE = b"ARROW1"
"""What an Arrow file begins with; one that does not is a stream, as the package datasets writes it."""
READ_ERRORS = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True)
class TarMember:
    """An image that is a member of a tar."""

    file: str
    name: str
    """The name of the member, for messages."""
    offset: int
    """Of its first byte in the file."""
    size: int

    def __str__(self) -> str:
        """Say where the image is, for messages."""
        return f"{self.file}: {self.name}"

    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            DataError: the tar has been changed or cannot be read.
        """
        if self.size > MAX_IMAGE_BYTES:
            return b""  # no image file is so large; it counts as a corrupt one
        try:
            with open(self.file, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise unreadable(self.file, error) from error
        if len(data) != self.size:
            raise DataError(f"{self} is cut short; {AGAIN}")
        return data


@dataclass(frozen=True)
class TableCell:
    """An image that is a value of a table: bytes, or a struct of `bytes` and `path` as the package datasets writes."""

    file: str
    column: tuple[str, ...]
    """The name of the column, for a field of a struct followed by that of the field."""
    group: int
    """Number of the row group of a Parquet file, or of the record batch of an Arrow file."""
    row: int
    """Number of the row in its group."""
    item: int | None = None
    """Which item of a list; None: the value is no list."""

    def __str__(self) -> str:
        """Say where the image is, for messages."""
        item = "" if self.item is None else f"[{self.item}]"
        return f"{self.file}: row {self.row} of group {self.group}, column {'.'.join(self.column)}{item}"

    def read(self) -> bytes | str | None:
        """Return the bytes of the image file, or its path; None: the value has neither.

        Raises:
            DataError: the file has been changed or cannot be read.
        """
        try:
            status = os.stat(self.file)
            reader = _cells(self.file, (status.st_size, status.st_mtime_ns), self.column[0])
            value = reader.find(self.group, self.row)
            for field in self.column[1:]:
                value = value[field]
            if self.item is not None:
                value = value.values[self.item]
            value = value.as_py()
        except (*READ_ERRORS, IndexError, KeyError, TypeError) as error:
            raise unreadable(self.file, error) from error
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return value or None


StoredImage = TarMember | TableCell


class _Cells:
    """Finds values of a column in a table; rows that are asked for in order are read once."""

    def __init__(self, file: str, column: str) -> None:
        self.file, self.column = file, column
        self._start(0)

    def _start(self, group: int) -> None:
        self._batches = read_batches(Path(self.file), [self.column], group)
        self._group, self._first, self._rows = group, 0, None

    def find(self, group: int, row: int) -> Any:
        """Return the value of a row of a row group or record batch as a scalar of pyarrow."""
        if group != self._group or row < self._first:
            self._start(group)
        while self._rows is None or row >= self._first + len(self._rows):
            self._first += 0 if self._rows is None else len(self._rows)
            self._rows = next(self._batches, None)
            if self._rows is None:
                raise IndexError(f"group {group} has no row {row}")
        return self._rows.column(self.column)[row - self._first]


@lru_cache(maxsize=OPEN_COLUMNS)
def _cells(file: str, state: tuple[int, int], column: str) -> _Cells:
    """Return the reader of a column; `state` tells whether the file has been changed since."""
    return _Cells(file, column)


def read_batches(path: Path, columns: list[str] | None, group: int, rows: int = ROWS_AT_ONCE) -> Iterator[Any]:
    """Yield the record batches of a row group of a Parquet file, or the one record batch of an Arrow file.

    Args:
        path: the file; one whose name does not end in .parquet is an Arrow file.
        columns: columns of Parquet to read, a field of a struct with its dotted name; None: all.
        group: number of the row group or record batch.
        rows: the largest number of rows of Parquet in a batch.

    Raises:
        OSError, ValueError, pa.ArrowException: the file cannot be read.
    """
    if path.suffix == ".parquet":
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield from file.iter_batches(rows, row_groups=[group], columns=columns)
        return
    with open_arrow(path) as (_, batches):
        for batch in islice(batches, group, group + 1):
            batch.validate(full=True)  # offsets of a damaged file would lead out of its memory
            yield batch


@contextmanager
def open_arrow(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield the schema and the record batches of an Arrow file, of either of its two forms; nothing is copied.

    Raises:
        OSError, ValueError, pa.ArrowException: the file cannot be read.
    """
    with pa.memory_map(str(path)) as source:
        if source.read(len(ARROW_FILE)) == ARROW_FILE:
            reader = pa.ipc.open_file(source)
            yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            yield reader.schema, iter(reader)


def unreadable(path: str | Path, error: Exception) -> DataError:
    """Return the error for a table or tar that cannot be read."""
    return DataError(f"{path} cannot be read ({' '.join(str(error).split())}); {AGAIN}")

"""The index of a folder of images: its files on disk, and the searches in it.

An index folder holds `manifest.json` and the folder `images-HEX` that it names, which has

- `files.parquet`: each file of the images' folder with its path (bytes), size, time, SHA-256, the number of its row,
  or -1 and the reason why it has none;
- `vectors.npy`, float32 [n, d]: one row of unit length for each different content, in the order of the first path;
- with a small form, `small.npy` [n, dims] float32 or int8, and `scales.npy` [n] float32 for int8.

A build writes a new folder, and then the manifest by one rename: readers see the old index or the new one, and whoever
has opened the old one keeps it.
"""

import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llave.errors import CheckpointError, DataError
from megatron_llave.files import VERSION, read_json, sha256_of, whole_folder, write_json
from megatron_llave.search.prompts import Prompts
from megatron_llave.search.scan import ImageFile
from megatron_llave.search.vectors import SmallVectors, recall, search, shorten

FORMAT = "megatron_llave image index"
MANIFEST = "manifest.json"
FILES, VECTORS, SMALL, SCALES = "files.parquet", "vectors.npy", "small.npy", "scales.npy"
FOLDER = "images-"
ATTEMPTS = 5
"""How often an index is opened while builds replace it."""
SCHEMA = pa.schema(
    [
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("digest", pa.binary()),
        ("row", pa.int64()),
        ("problem", pa.string()),
    ]
)
NO_ROW = -1
ROWS = 65536
"""Vectors that are shortened at a time."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    pictures: str
    """Folder of the images, absolute, with half surrogate pairs for bytes that are not UTF-8."""
    checkpoint: str
    """Folder of the weights, absolute: of a run that trains on, the checkpoint of the index."""
    model: dict[str, str]
    """Identity of the model: weights, tokenizer, precision, ..."""
    prompts: Prompts
    folder: str
    """images-HEX, the folder of the files."""
    images: int
    """Different images, each of which has a row."""
    files: int
    """Files with a row."""
    unreadable: int
    """Files without one."""
    width: int
    """d."""
    sha256: dict[str, str]
    """Of each file of the folder."""
    decoder: str = ""
    """Version of the library that has decoded the images: another one may read what this one could not."""
    overrides: list[str] = field(default_factory=list)
    """With which the model was loaded, but for its parallel layout: a query may have another one."""
    average: bool = False
    """Whether the averaged weights were loaded."""
    vectors: str = "float32"
    """What is searched: float32 or int8."""
    dims: int = 0
    """How many numbers of each vector are searched; 0: all."""
    recall: dict[str, float] = field(default_factory=dict)
    """Share of the exact neighbours that the search finds; empty: it is exact."""

    @property
    def is_exact(self) -> bool:
        """Whether a search compares the query with all of each vector of the model."""
        return self.vectors == "float32" and not self.dims

    @property
    def kind(self) -> str:
        """How the search is done, for people."""
        if self.is_exact:
            return "exact"
        recall = self.recall.get("recall@10")
        found = "recall not measured" if recall is None else f"finds {100 * recall:.1f} % of the ten nearest images"
        form = ", ".join(
            filter(None, ["int8" * (self.vectors == "int8"), self.dims and f"{self.dims} of {self.width} numbers"])
        )
        return f"approximate ({form}; {found})"


@dataclass(frozen=True)
class Hit:
    """An image that a search has found."""

    row: int
    similarity: float


class ImageIndex:
    """An opened index; `open_index` makes it."""

    def __init__(
        self, folder: Path, manifest: Manifest, files: pa.Table, vectors: np.ndarray, small: SmallVectors | None
    ) -> None:
        """Hold what was read."""
        self.folder, self.manifest, self.table, self.vectors, self.small = folder, manifest, files, vectors, small

    def __len__(self) -> int:
        """Number of different images."""
        return len(self.vectors)

    @cached_property
    def files(self) -> list[ImageFile]:
        """All files, by path."""
        return read_files(self.table)

    @cached_property
    def rows_of_files(self) -> np.ndarray:
        """[files] int64, the row of each file; NO_ROW for those without."""
        return self.table["row"].to_numpy()

    @cached_property
    def _files_by_row(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.rows_of_files, kind="stable")
        return order, np.searchsorted(self.rows_of_files[order], np.arange(len(self) + 1))

    def files_of(self, row: int) -> list[ImageFile]:
        """The files that hold an image, by path; several if it was copied."""
        order, starts = self._files_by_row
        return [self.files[number] for number in order[starts[row] : starts[row + 1]].tolist()]

    @cached_property
    def row_of_digest(self) -> dict[bytes, int]:
        """The row of each content."""
        return {file.digest: row for file, row in zip(self.files, self.rows_of_files.tolist()) if row != NO_ROW}

    def search(self, query: np.ndarray, k: int) -> list[Hit]:
        """Find the k images that are most similar to a query [d] float32 of unit length, best first."""
        rows, similar = search(query[None], self.vectors, self.small, k)
        return [Hit(row, similarity) for row, similarity in zip(rows[0].tolist(), similar[0].tolist())]


def read_files(table: pa.Table) -> list[ImageFile]:
    """The files of a table that `write_files` wrote."""
    columns = (table[name].to_pylist() for name in ("path", "size", "mtime_ns", "digest", "problem"))
    return [ImageFile(*values) for values in zip(*columns)]


def open_index(folder: str | Path) -> ImageIndex:
    """Open an index; its vectors are mapped into memory.

    Raises:
        DataError: there is none, or one of its files is damaged; the message names it.
    """
    folder = Path(folder)
    for attempt in range(ATTEMPTS):
        manifest = read_manifest(folder)
        try:
            return _open(folder, manifest)
        except FileNotFoundError as error:  # a build has replaced it between the two
            missing = error.filename
    raise DataError(f"{missing} is missing, so that {folder} is damaged; llave search build --rebuild makes it again")


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of an index alone.

    Raises:
        DataError: there is none, or it is damaged or of another version.
    """
    path = Path(folder) / MANIFEST
    values = read_json(path, FORMAT, "llave search build makes an index")
    try:
        values = {key: value for key, value in values.items() if key not in ("format", "version")}
        manifest = Manifest(**{**values, "prompts": Prompts(**values["prompts"])})
        _require_types(manifest)
        _require_types(manifest.prompts)
        if os.path.basename(manifest.folder) != manifest.folder or not manifest.folder.startswith(FOLDER):
            raise ValueError(f"its folder is {manifest.folder!r}")
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); llave search build --rebuild makes it again") from error
    return manifest


def _require_types(record: Manifest | Prompts) -> None:
    """Raise a TypeError unless each value, and each value of a mapping or list, is of its field's type."""
    for name, hint in get_type_hints(type(record)).items():
        value, inner = getattr(record, name), get_args(hint)
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        is_right = isinstance(value, get_origin(hint) or hint) and all(isinstance(x, inner[-1]) for x in inside)
        if not is_right or hint is int and isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}")


def _open(folder: Path, manifest: Manifest) -> ImageIndex:
    place = folder / manifest.folder
    for name, digest in manifest.sha256.items():
        if sha256_of(place / name) != digest:
            raise DataError(f"{place / name} is damaged; llave search build --rebuild makes it again")
    try:
        table = pq.read_table(place / FILES, schema=SCHEMA)
        vectors = np.load(place / VECTORS, mmap_mode="r", allow_pickle=False)
        small = None
        if not manifest.is_exact:
            scales = np.load(place / SCALES, allow_pickle=False) if manifest.vectors == "int8" else None
            small = SmallVectors(np.load(place / SMALL, mmap_mode="r", allow_pickle=False), scales)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, SyntaxError, TokenError, pa.ArrowException) as error:
        raise DataError(f"{place} cannot be read: {' '.join(str(error).split())[:200]}") from error
    expected = (manifest.images, manifest.width)
    if vectors.shape != expected or vectors.dtype != np.float32 or small is not None and len(small) != len(vectors):
        raise DataError(f"{place / VECTORS} holds {vectors.dtype} {list(vectors.shape)} and not {list(expected)}")
    return ImageIndex(folder, manifest, table, vectors, small)


def write_index(
    folder: str | Path,
    manifest: Manifest,
    files: Sequence[ImageFile],
    rows: Sequence[int],
    blocks: Iterable[np.ndarray],
) -> Manifest:
    """Replace the index in a folder whose lock the caller holds, and measure the recall of a small form.

    Args:
        folder: of the index.
        manifest: what is known of it, with `images` and `width`; the rest of what describes the files is set here.
        files: all files, by path.
        rows: the row of each, or NO_ROW.
        blocks: the vectors [images, width] float32, in parts.

    Returns:
        The manifest as it was written.

    Raises:
        DataError: it cannot be written, as on a full disk; the old index stays.
    """
    folder = Path(folder)
    name = f"{FOLDER}{secrets.token_hex(4)}"
    count = sum(row != NO_ROW for row in rows)
    try:
        with whole_folder(folder / name, "image index") as place:
            write_files(place / FILES, files, rows)
            vectors = _write_vectors(place / VECTORS, manifest, blocks)
            found = {} if manifest.is_exact else _write_small(place, manifest, vectors)
            digests = {path.name: sha256_of(path) for path in sorted(place.iterdir())}
        manifest = replace(
            manifest, folder=name, files=count, unreadable=len(files) - count, sha256=digests, recall=found
        )
        write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **asdict(manifest)})
    except (CheckpointError, OSError, pa.ArrowException) as error:
        shutil.rmtree(folder / name, ignore_errors=True)
        raise DataError(f"{folder}: the index cannot be written: {error}") from error
    remove_old(folder, name)
    return manifest


def _write_vectors(path: Path, manifest: Manifest, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Write the vectors in order, not through a memory map, which ends the process on a full disk; return them."""
    shape = manifest.images, manifest.width
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f4").data)
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    assert vectors.shape == shape, "the blocks hold as many vectors as the manifest says"
    return vectors


def _write_small(place: Path, manifest: Manifest, vectors: np.ndarray) -> dict[str, float]:
    """Write the small form of the vectors; return its recall."""
    dims = manifest.dims or manifest.width
    parts = [shorten(vectors[start : start + ROWS], dims, manifest.vectors) for start in range(0, len(vectors), ROWS)]
    parts = parts or [shorten(vectors, dims, manifest.vectors)]
    rows = np.concatenate([part.rows for part in parts])
    scales = None if parts[0].scales is None else np.concatenate([part.scales for part in parts])
    np.save(place / SMALL, rows, allow_pickle=False)
    if scales is not None:
        np.save(place / SCALES, scales, allow_pickle=False)
    return recall(vectors, SmallVectors(rows, scales))


def write_files(path: Path, files: Sequence[ImageFile], rows: Sequence[int]) -> None:
    """Write the table of the files."""
    columns = [
        [file.path for file in files],
        [file.size for file in files],
        [file.mtime_ns for file in files],
        [file.digest for file in files],
        list(rows),
        [file.problem.encode(errors="backslashreplace").decode() for file in files],
    ]
    arrays = [pa.array(values, entry.type) for values, entry in zip(columns, SCHEMA)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), path)


def remove_old(folder: Path, kept: str) -> None:
    """Remove the folders of earlier builds, finished or not; the caller holds the lock."""
    for path in folder.glob(f"{FOLDER}*"):
        if path.name != kept:
            shutil.rmtree(path, ignore_errors=True)


def about(manifest: Manifest) -> dict[str, Any]:
    """What a page or a --json tells of an index."""
    return {
        "images": manifest.images,
        "files": manifest.files,
        "unreadable": manifest.unreadable,
        "checkpoint": manifest.checkpoint,
        "pictures": manifest.pictures,
        "search": manifest.kind,
        "exact": manifest.is_exact,
        "prompts": asdict(manifest.prompts),
    }

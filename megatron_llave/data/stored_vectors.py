"""Embeddings of the training inputs by another model, looked up by name: the model of `loss.reward: stored`, and the
teacher of `loss.soft_labels: stored`.

They are files like those of llave embed --shards: a .npy file [n, d] with the name of each row on a line of the .ids
file beside it, which is mapped into memory, or a Parquet file with columns id and embedding, which is read whole. d is
that of the other model. The index of names, 16 bytes per row, is made once and shared with the data workers by fork.
A name is SUBSET/query/ID or SUBSET/target/ID.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.config.loss import LossConfig
from megatron_llave.data.packing import EncodedPair, stable_hash
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN, read_lines

SUFFIXES = (".npy", ".parquet")
ROWS_IN_IDENTITY = 256
"""Rows that tell one model's embeddings from another's; all rows would be gigabytes."""


def query_name(subset: str, query_id: str) -> str:
    """Return the name of a query; ids are those of a subset, and a query may have the id of a target."""
    return f"{subset}/query/{query_id}"


def target_name(subset: str, target_id: str) -> str:
    """Return the name of a target or hard negative, which share their ids."""
    return f"{subset}/target/{target_id}"


def names_in_row(pairs: Sequence[EncodedPair]) -> list[str]:
    """Return the names of the inputs of a micro batch in the order in which `pack_pairs` puts them into the row."""
    queries = [query_name(pair.pair.subset, pair.pair.query_id) for pair in pairs]
    targets = [target_name(pair.pair.subset, name) for pair in pairs for name in pair.target_ids]
    return (
        queries + targets + [target_name(pair.pair.subset, name) for pair in pairs for name in pair.hard_negative_ids]
    )


def with_stored(batch: PairBatch, rows: Tensor, loss: LossConfig) -> PairBatch:
    """Return a micro batch with what the loss of its subset takes from the stored embeddings [b + a + m, d] of its row.

    This is `stored` for reward=stored, and for soft_labels=stored the cosines of each query with its targets and hard
    negatives in place of the scores of the data.
    """
    scores = batch.scores
    if loss.soft_labels == "stored":
        query, others = rows[: batch.num_pairs], rows[batch.num_pairs :]
        scores = (query[torch.cat([batch.rows_of_targets, batch.hard_rows])] * others).sum(1)
    return replace(batch, stored=rows if loss.reward == "stored" else None, scores=scores)


@dataclass(frozen=True)
class StoredVectors:
    """Embeddings of a file or of all files of a folder; `open_vectors` makes them."""

    path: Path
    files: list[np.ndarray]
    """[n_i, d] of any floating-point type."""
    hashes: np.ndarray
    """int64 [n], sorted hashes of the names."""
    places: np.ndarray
    """int64 [n], the number of the row of each of these hashes in all files."""

    @cached_property
    def identity(self) -> str:
        """A hash that copies and other formats of the same embeddings share, and those of another model do not."""
        chosen = np.linspace(0, len(self.hashes) - 1, min(len(self.hashes), ROWS_IN_IDENTITY)).astype(np.int64)
        digest = hashlib.sha256(self.hashes.tobytes())
        digest.update(self._read(self.places[chosen]).tobytes())
        return digest.hexdigest()[:16]

    @property
    def width(self) -> int:
        """Return d."""
        return self.files[0].shape[1]

    def rows(self, names: Sequence[str]) -> Tensor:
        """Return [len(names), d] float32 of unit length.

        Raises:
            DataError: a name has no embedding, or one that is not finite or zero.
        """
        return self.rows_at(self.find(names), names)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Return the numbers [len(names)] int64 of the rows of these names, for `rows_at`.

        Raises:
            DataError: a name has no embedding.
        """
        found, is_there = self._look_up(names)
        for missing in np.flatnonzero(~is_there)[:1].tolist():
            hint = "embed the shards of data.path with llave embed --shards"
            raise DataError(f"{self.path} has no embedding of {names[missing]!r} among its {len(self.hashes)}; {hint}")
        return self.places[found]

    def has(self, names: Sequence[str]) -> bool:
        """Whether all of these names have an embedding."""
        return bool(self._look_up(names)[1].all())

    def _look_up(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return places in `hashes` [len(names)] int64, and whether the hash of each name is there."""
        wanted = np.array([stable_hash(name) for name in names], np.int64)
        found = np.searchsorted(self.hashes, wanted).clip(max=len(self.hashes) - 1)
        return found, self.hashes[found] == wanted

    def rows_at(self, places: np.ndarray, names: Sequence[str]) -> Tensor:
        """Return the rows that `find` has found, [n, d] float32 of unit length; their names are for messages.

        Raises:
            DataError: an embedding is not finite or zero.
        """
        rows = torch.from_numpy(self._read(places))
        lengths = rows.double().norm(dim=1, keepdim=True)
        for wrong in (~(lengths.isfinite() & (lengths > 0))).flatten().nonzero()[:1].flatten().tolist():
            raise DataError(f"{self.path}: the embedding of {names[wrong]!r} is not finite or zero")
        return (rows / lengths).float()

    def _read(self, places: np.ndarray) -> np.ndarray:
        """[len(places), d] float32, the rows with these numbers in all files."""
        ends = np.cumsum([len(file) for file in self.files])
        rows = np.empty((len(places), self.width), np.float32)
        of_file = np.searchsorted(ends, places, side="right")
        for number in np.unique(of_file).tolist():
            chosen, file = of_file == number, self.files[number]
            rows[chosen] = file[places[chosen] - (ends[number] - len(file))]
        return rows


def open_vectors(path: str | Path) -> StoredVectors:
    """Open a file of embeddings, or all of a folder.

    Raises:
        DataError: there is none, a file is damaged, names and rows do not match, or a name comes twice; one line.
    """
    path = Path(path)
    paths = sorted(x for x in path.iterdir() if x.suffix in SUFFIXES) if path.is_dir() else [path]
    if not paths or paths[0].suffix not in SUFFIXES:
        raise DataError(f"loss.stored_embeddings={path} is no .npy or .parquet file, nor a folder of such files")
    files, hashes = zip(*(_open_npy(x) if x.suffix == ".npy" else _open_parquet(x) for x in paths))
    for file, rows, names in zip(paths, files, hashes):
        if rows.ndim != 2 or rows.dtype.kind != "f" or 0 in rows.shape or rows.shape[1] != files[0].shape[-1]:
            wide = f" and as wide as those of {paths[0]}" if file != paths[0] else ""
            right = f"embeddings [n, d] of floating-point numbers, at least one{wide}"
            raise DataError(f"{file} holds {rows.dtype} {list(rows.shape)} and not {right}")
        if len(names) != len(rows):
            raise DataError(f"{file} has {len(rows)} embeddings and {len(names)} ids")
    unsorted = np.concatenate(hashes)
    places = np.argsort(unsorted, kind="stable")
    if (np.diff(unsorted[places]) == 0).any():
        raise DataError(f"{path}: two embeddings have the same id")
    return StoredVectors(path, list(files), unsorted[places], places)


def _open_npy(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rows, mapped into memory, and the hashes of their names."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:  # all of which a damaged header can raise
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} is no .npy file of embeddings: {why}; {AGAIN}") from error
    lines = (line.decode(errors="replace").rstrip("\r\n") for _, line in read_lines(path.with_suffix(".ids")))
    return rows, np.fromiter(map(stable_hash, lines), np.int64)


def _open_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = pq.read_table(path, columns=["id", "embedding"]).combine_chunks()
        rows = pc.list_flatten(table["embedding"]).to_numpy().reshape(len(table), -1)
        return rows, np.fromiter(map(stable_hash, table["id"].cast(pa.string()).to_pylist()), np.int64)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no Parquet file with columns id and embedding: {reason}") from error

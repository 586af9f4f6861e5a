"""Writes embeddings to a .npy or Parquet file, part by part, for llave embed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from megatron_llave.errors import DataError
from megatron_llave.files import atomic_write

SUFFIXES = (".npy", ".parquet")
Write = Callable[[list[str], Tensor], None]


@contextmanager
def embedding_file(path: str | Path, num_rows: int, width: int, model: str) -> Iterator[Write]:
    """Open a file of embeddings for writing; it takes its name when it is complete.

    .npy: float32 [num_rows, width]; a text file beside it that ends in .ids has the id of each row on a line. Parquet:
    columns id (string) and embedding (fixed-size list of float32), one row group per part, `model` in the schema's
    metadata.

    Yields:
        write(ids, embeddings [n, width]) for each part in turn.

    Raises:
        DataError: the suffix is unknown, or the file cannot be written (full disk); no part of it remains then.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} must end in {' or '.join(SUFFIXES)}")
    open_file = _open_npy if path.suffix == ".npy" else _open_parquet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, only_writer=True) as temporary, open_file(temporary, num_rows, width, model) as write:
            yield write
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be written: {reason}") from error


@contextmanager
def _open_npy(path: Path, num_rows: int, width: int, model: str) -> Iterator[Write]:
    # Written in order, not through a memory map: on a full disk a memory map ends the process without an error.
    names = path.with_name(path.name.removeprefix(".").removesuffix(".partial")).with_suffix(".ids")
    with atomic_write(names, only_writer=True) as temporary, open(path, "wb") as file, open(temporary, "wb") as id_file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(file, header)

        def write(ids: list[str], embeddings: Tensor) -> None:
            file.write(embeddings.cpu().numpy().astype("<f4").tobytes())
            id_file.writelines(f"{name}\n".encode() for name in ids)

        yield write


@contextmanager
def _open_parquet(path: Path, num_rows: int, width: int, model: str) -> Iterator[Write]:
    fields = [("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata={"model": model})
    with pq.ParquetWriter(path, schema) as writer:

        def write(ids: list[str], embeddings: Tensor) -> None:
            values = pa.array(embeddings.cpu().numpy().ravel())
            rows = pa.FixedSizeListArray.from_arrays(values, width)
            writer.write_table(pa.table([pa.array(ids, pa.string()), rows], schema=schema))

        yield write

"""Embeds a stream of inputs into one file, block by block, so that a command that was interrupted continues.

llave embed embeds JSONL files and shards so, and mining the queries and targets of shards (mining/store.py).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track

from megatron_llave.embedding.cache import CachedEmbedder, EmbeddingCache
from megatron_llave.embedding.embedder import LoadedModel, embed_parts
from megatron_llave.embedding.inputs import Inputs
from megatron_llave.embedding.vector_files import embedding_file
from megatron_llave.errors import BadInputError, DataError, NotFiniteError
from megatron_llave.files import write_json, write_text
from megatron_llave.locks import lock_folder

IDS = "ids.json"
"""File with the ids of a block, beside its embeddings."""
ROWS = 4096
"""Number of embeddings that are in memory at a time; a row group of Parquet has as many."""


@dataclass(frozen=True)
class Source:
    """Inputs that are read in blocks, the same ones each time."""

    path: str
    """The file or folder, for messages."""
    blocks: Callable[[], Iterator[Inputs]]
    """Reads the blocks from the first on."""
    block: int
    """Number of inputs of each block but the last."""
    num_rows: int
    """Number of inputs in all."""
    checkpoint: str
    """What a Parquet file says that its embeddings are from."""
    skip_bad: bool = False
    """Whether an input that cannot be read is left out, and is not an error."""


@dataclass(frozen=True)
class FileEmbedder:
    """Embeds a JSONL file or the inputs of shards block by block, each of which is read once.

    What is embedded stays in a folder until the output is complete, and the ids beside it.
    """

    model: LoadedModel
    source: Source
    folder: Path
    identity: dict[str, str]

    def caches(self) -> Iterator[tuple[CachedEmbedder, Inputs]]:
        """Yield what embeds each block, and the block."""
        for number, block in enumerate(self.source.blocks()):
            embed = partial(embed_parts, self.model, skip_bad=self.source.skip_bad)
            folder, requires_files = self.folder / f"{number:05d}", not self.source.skip_bad
            replicas = self.model.groups.dp
            yield CachedEmbedder(embed, folder, self.identity, replicas, requires_files=requires_files), block

    def embed(self) -> "Embedded":
        """Embed what is missing; the result is complete on the first rank alone."""
        done = Embedded([], 0, [], 0)
        total = -(-self.source.num_rows // self.source.block)
        for embedder, block in track(self.caches(), "embedding", total=total, disable=dist.get_rank() > 0):
            (cache,) = embedder.embed([block])
            if dist.get_rank() == 0:
                skipped = list(self.skipped(cache))
                _write_ids(cache)
                done.caches.append(cache.without_inputs())
                done.num_embedded += cache.num_embedded
                done.kept += len(block) - len(skipped)
                done.skipped += skipped
        return done

    def skipped(self, cache: EmbeddingCache) -> Iterator[dict[str, str]]:
        """Yield id and problem of each input that could not be read; it is read again for its problem."""
        keys = list(cache.inputs)
        for start, rows in _slices_of(cache):
            for number in (start + np.flatnonzero(~rows.any(axis=1))).tolist():
                problem = self.problem_of(cache.inputs, keys[number])
                yield {"input": keys[number], "id": cache.inputs.entries[number].id, "problem": problem}

    def problem_of(self, block: Inputs, key: str) -> str:
        """Read an input again that could not be read, and return why."""
        try:
            self.model.encoder.encode(block[key])
        except DataError as error:
            return str(error)
        return f"it can be read now; delete {self.folder} and give the command again"


@dataclass
class Embedded:
    """What the first rank writes the output of, so that it need not read the inputs again while the others wait."""

    caches: list[EmbeddingCache]
    """The embeddings of each block, without its inputs; IDS in their folder has the ids."""
    kept: int
    """Number of rows that are not skipped."""
    skipped: list[dict[str, str]]
    """Id and problem of each input that could not be read."""
    num_embedded: int
    """Number of inputs that were embedded now, and not by an earlier command that was interrupted."""

    def rows(self) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Yield ids and embeddings of up to ROWS inputs at a time, without those that could not be read."""
        for cache in self.caches:
            names = json.loads((cache.folder / IDS).read_bytes())
            for start, rows in _slices_of(cache):
                kept = rows.any(axis=1)
                yield list(compress(names[start:], kept)), torch.from_numpy(rows[kept])


def _write_ids(cache: EmbeddingCache) -> None:
    """Write the ids of a block's inputs beside its embeddings."""
    try:
        write_json(cache.folder / IDS, [item.id for item in cache.inputs.entries])
    except OSError as error:
        raise DataError(f"{cache.folder / IDS} cannot be written: {error.strerror or error}") from error


def _slices_of(cache: EmbeddingCache) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the embeddings [up to ROWS, d] of a cache in their order, each time with the number of the first row."""
    end = cache.bounds[-1]
    for start in range(0, end, ROWS):
        yield start, cache.rows(np.arange(start, min(start + ROWS, end)))


def embed_into_file(model: LoadedModel, source: Source, out: str | Path) -> Embedded:
    """Embed a source's inputs into a file, .npy or .parquet (vector_files.py); all ranks call it.

    What is embedded stays in the folder `<out>.parts` until the file is complete; the same call continues from there.
    Inputs that were left out are listed in `<out>.skipped.jsonl`.

    Returns:
        What was embedded, which is complete on the first rank alone.

    Raises:
        DataError: an input cannot be read, another process embeds into the file, or the disk is full.
        NotFiniteError: an embedding is not finite.
    """
    folder, is_writer = Path(f"{out}.parts"), dist.get_rank() == 0
    with lock_folder(folder) if is_writer else nullcontext():
        embedder = FileEmbedder(model, source, folder, model.identity())
        try:
            done = embedder.embed()
        except NotFiniteError:
            raise
        except DataError as error:
            hint = "; --skip-bad leaves such inputs out" if isinstance(error, BadInputError) else ""
            raise DataError(f"{error}; what is embedded stays in {folder} for the same command{hint}") from error
        if is_writer:
            try:
                _finish(embedder, done, Path(out))
            except OSError as error:
                raise DataError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
    dist.barrier()
    return done


def _finish(embedder: FileEmbedder, done: Embedded, out: Path) -> None:
    """Write the output, and the list of inputs that were left out; then remove the folder of what was embedded."""
    listed, skipped, source = Path(f"{out}.skipped.jsonl"), done.skipped, embedder.source
    if not skipped and done.kept == 0:
        raise DataError(f"{source.path}: no pair can be read; llave prepare verify says more")
    if skipped and (done.kept == 0 or not source.skip_bad):
        hint = "; no input can be read" if source.skip_bad else "; --skip-bad leaves it out"
        raise DataError(f"input {skipped[0]['input']}: {skipped[0]['problem']}{hint}")
    listed.unlink(missing_ok=True)
    if skipped:
        write_text(listed, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped))
    with embedding_file(out, done.kept, embedder.model.cfg.model.language.hidden_size, source.checkpoint) as write:
        for ids, embeddings in done.rows():
            write(ids, embeddings)
    shutil.rmtree(embedder.folder)

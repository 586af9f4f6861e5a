"""Embed texts and images with a checkpoint, or all inputs of a JSONL file or of a folder of training shards.

`llave embed --help` explains the command; megatron_llave/options/embed.py has its options.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track

from megatron_llave.batch import Side
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.cache import CachedEmbedder, EmbeddingCache
from megatron_llave.embedding.embedder import LoadedModel, embed, embed_parts, load_model
from megatron_llave.embedding.inputs import Inputs
from megatron_llave.embedding.jsonl import count_inputs, read_blocks
from megatron_llave.embedding.shard_inputs import count_shard_inputs, read_shard_blocks
from megatron_llave.embedding.vector_files import SUFFIXES, embedding_file
from megatron_llave.errors import (
    BadInputError,
    ConfigError,
    DataError,
    NotFiniteError,
    exit_with_one_line,
)
from megatron_llave.files import write_json, write_text
from megatron_llave.launch import procs
from megatron_llave.locks import lock_folder
from megatron_llave.options import embed as options
from megatron_llave.training.logger import quiet_dependencies

BLOCK = 65536
"""Number of inputs of a JSONL file that are in memory at a time."""
SHARD_BLOCK = 2048
"""Number of inputs of shards that are in memory at a time, with their images."""
IDS = "ids.json"
"""File with the ids of a block, beside its embeddings."""
ROWS = 4096
"""Number of embeddings that are in memory at a time; a row group of Parquet has as many."""


def main(argv: list[str] | None = None) -> None:
    """Load the model at the parallel layout asked for and embed; the first rank prints or writes."""
    args = options.parse(argv)
    with exit_with_one_line():
        procs.require_as_started(args.procs)
        quiet_dependencies()
        source = args.jsonl or args.shards
        if [bool(args.jsonl), bool(args.shards), bool(args.text or args.image)].count(True) != 1:
            raise ConfigError("give either --jsonl, or --shards, or --text and --image, as many as you like")
        if source and not args.out:
            raise ConfigError(f"{'--jsonl' if args.jsonl else '--shards'} needs --out FILE.npy or FILE.parquet")
        if args.out and Path(args.out).suffix not in SUFFIXES:
            raise ConfigError(f"--out {args.out} must end in {' or '.join(SUFFIXES)}")
        require_names([*args.text, *args.image], args.out or "")
        num_rows = count(args) if source else 0
        model = load_model(args.checkpoint, overrides=args.overrides, average=args.average)
        among = ""
        if source:
            among = embed_file(model, args, num_rows)
        else:
            embed_arguments(model, args)
        model.print_image_notes(among)
        process_groups.destroy_distributed()


def require_names(names: list[str], out: str) -> None:
    """Raise a ConfigError unless each of the command line's inputs can stand in the output as the name of its row."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{name!a} is not UTF-8 text; name its file otherwise, or write a --jsonl") from error
        if out.endswith(".npy") and len(name.splitlines()) > 1:
            ids = Path(out).with_suffix(".ids")
            raise ConfigError(f"{name!a} has more than one line, but is to be one of {ids}; --out a .parquet")


def count(args: argparse.Namespace) -> int:
    """Return the number of inputs of --jsonl or --shards, after a check that reads no images."""
    if args.jsonl:
        return count_inputs(args.jsonl, BLOCK, requires_files=not args.skip_bad)
    num_rows, differing = count_shard_inputs(args.shards)
    if differing and os.environ.get("RANK", "0") == "0":
        print(f"{differing} of {num_rows} ids have inputs that differ; the first of each is embedded")
    return num_rows


@dataclass(frozen=True)
class FileEmbedder:
    """Embeds a JSONL file or the inputs of shards block by block, each of which is read once.

    What is embedded stays in a folder until the output is complete, and the ids beside it.
    """

    model: LoadedModel
    blocks: Callable[[], Iterator[Inputs]]
    """Reads the blocks from the first on."""
    block: int
    """Number of inputs of each block but the last."""
    folder: Path
    identity: dict[str, str]
    skip_bad: bool

    def caches(self) -> Iterator[tuple[CachedEmbedder, Inputs]]:
        """Yield what embeds each block, and the block."""
        for number, block in enumerate(self.blocks()):
            embed = partial(embed_parts, self.model, skip_bad=self.skip_bad)
            folder, requires_files = self.folder / f"{number:05d}", not self.skip_bad
            replicas = self.model.groups.dp
            yield CachedEmbedder(embed, folder, self.identity, replicas, requires_files=requires_files), block

    def embed(self, num_rows: int) -> "Embedded":
        """Embed what is missing; the result is complete on the first rank alone."""
        done = Embedded([], 0, [], 0)
        total = -(-num_rows // self.block)
        for embedder, block in track(self.caches(), "embedding", total=total, disable=dist.get_rank() > 0):
            (cache,) = embedder.embed([block])
            if dist.get_rank() == 0:
                skipped = list(self.skipped(cache))
                write_ids(cache)
                done.caches.append(cache.without_inputs())
                done.num_embedded += cache.num_embedded
                done.kept += len(block) - len(skipped)
                done.skipped += skipped
        return done

    def skipped(self, cache: EmbeddingCache) -> Iterator[dict[str, str]]:
        """Yield id and problem of each input that could not be read; it is read again for its problem."""
        keys = list(cache.inputs)
        for start, rows in slices_of(cache):
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
            for start, rows in slices_of(cache):
                kept = rows.any(axis=1)
                yield list(compress(names[start:], kept)), torch.from_numpy(rows[kept])


def write_ids(cache: EmbeddingCache) -> None:
    """Write the ids of a block's inputs beside its embeddings."""
    try:
        write_json(cache.folder / IDS, [item.id for item in cache.inputs.entries])
    except OSError as error:
        raise DataError(f"{cache.folder / IDS} cannot be written: {error.strerror or error}") from error


def slices_of(cache: EmbeddingCache) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the embeddings [up to ROWS, d] of a cache in their order, each time with the number of the first row."""
    end = cache.bounds[-1]
    for start in range(0, end, ROWS):
        yield start, cache.rows(np.arange(start, min(start + ROWS, end)))


def embed_file(model: LoadedModel, args: argparse.Namespace, num_rows: int) -> str:
    """Embed a JSONL file or the inputs of shards; a command that was interrupted continues when it is given again.

    Return which inputs were embedded now, if not all.
    """
    folder, is_writer = Path(f"{args.out}.parts"), dist.get_rank() == 0
    with lock_folder(folder) if is_writer else nullcontext():
        size = BLOCK if args.jsonl else SHARD_BLOCK
        blocks = partial(read_blocks, args.jsonl, size) if args.jsonl else partial(read_shard_blocks, args.shards, size)
        embedder = FileEmbedder(model, blocks, size, folder, model.identity(), args.skip_bad)
        try:
            done = embedder.embed(num_rows)
        except NotFiniteError:
            raise
        except DataError as error:
            hint = "; --skip-bad leaves such inputs out" if isinstance(error, BadInputError) else ""
            raise DataError(f"{error}; what is embedded stays in {folder} for the same command{hint}") from error
        if is_writer:
            try:
                finish(embedder, done, args)
            except OSError as error:
                raise DataError(f"{error.filename or args.out} cannot be written: {error.strerror or error}") from error
    dist.barrier()
    num_rows = done.kept + len(done.skipped)
    return f" in the {done.num_embedded} inputs embedded now" if done.num_embedded < num_rows else ""


def finish(embedder: FileEmbedder, done: Embedded, args: argparse.Namespace) -> None:
    """Write the output, and the list of inputs that were left out; then remove the folder of what was embedded."""
    listed, skipped = Path(f"{args.out}.skipped.jsonl"), done.skipped
    if not skipped and done.kept == 0:
        raise DataError(f"{args.shards}: no pair can be read; prepare_data.py verify says more")
    if skipped and (done.kept == 0 or not args.skip_bad):
        hint = "; no input can be read" if args.skip_bad else "; --skip-bad leaves it out"
        raise DataError(f"input {skipped[0]['input']}: {skipped[0]['problem']}{hint}")
    listed.unlink(missing_ok=True)
    if skipped:
        write_text(listed, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped))
    write_rows(done.rows(), args.out, done.kept, embedder.model, args.checkpoint)
    if skipped:
        print(f"{len(skipped)} of {done.kept + len(skipped)} inputs were left out: {listed}")
    shutil.rmtree(embedder.folder)


def embed_arguments(model: LoadedModel, args: argparse.Namespace) -> None:
    """Embed the command line's inputs: the texts, then the images."""
    names = [*args.text, *args.image]
    sides = [Side(mark_user_text(text, 0), []) for text in args.text]
    sides += [Side.read(mark_user_text(args.instruction, 1), image) for image in args.image]
    rows = embed(model, {f"{index} ({name})": side for index, (name, side) in enumerate(zip(names, sides), 1)})
    if dist.get_rank() == 0:
        write_rows([(names, rows)], args.out, len(names), model, args.checkpoint)


def write_rows(
    parts: Iterable[tuple[list[str], torch.Tensor]], out: str | None, num_rows: int, model: LoadedModel, source: str
) -> None:
    """Write ids and embeddings into a file, or print them."""
    width = model.cfg.model.language.hidden_size
    if not out:
        for ids, embeddings in parts:
            for name, row in zip(ids, embeddings.tolist()):
                print(json.dumps({"input": name, "embedding": row}, ensure_ascii=False))
        return
    with embedding_file(out, num_rows, width, source) as write:
        for ids, embeddings in parts:
            write(ids, embeddings)
    print(f"{num_rows} embeddings of {width} numbers: {out}")

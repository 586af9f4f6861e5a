"""Embed texts and images with a checkpoint, or all inputs of a JSONL file or of a folder of training shards.

`llave embed --help` explains the command; megatron_llave/options/embed.py has its options.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llave.batch import Side
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import LoadedModel, embed, load_model
from megatron_llave.embedding.jsonl import count_inputs, read_blocks
from megatron_llave.embedding.shard_inputs import SHARD_BLOCK, count_shard_inputs, read_shard_blocks
from megatron_llave.embedding.vector_files import SUFFIXES, embedding_file
from megatron_llave.embedding.whole_files import Source, embed_into_file
from megatron_llave.errors import ConfigError, exit_with_one_line
from megatron_llave.launch import procs
from megatron_llave.options import embed as options
from megatron_llave.training.logger import quiet_dependencies

BLOCK = 65536
"""Number of inputs of a JSONL file that are in memory at a time."""


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


def embed_file(model: LoadedModel, args: argparse.Namespace, num_rows: int) -> str:
    """Embed a JSONL file or the inputs of shards; a command that was interrupted continues when it is given again.

    Return which inputs were embedded now, if not all.
    """
    if args.jsonl:
        path, size, blocks = args.jsonl, BLOCK, partial(read_blocks, args.jsonl, BLOCK)
    else:
        path, size, blocks = args.shards, SHARD_BLOCK, partial(read_shard_blocks, args.shards, SHARD_BLOCK)
    done = embed_into_file(model, Source(path, blocks, size, num_rows, args.checkpoint, args.skip_bad), args.out)
    num_rows = done.kept + len(done.skipped)
    if dist.get_rank() == 0:
        print_written(done.kept, model, args.out)
        if done.skipped:
            print(f"{len(done.skipped)} of {num_rows} inputs were left out: {args.out}.skipped.jsonl")
    return f" in the {done.num_embedded} inputs embedded now" if done.num_embedded < num_rows else ""


def print_written(num_rows: int, model: LoadedModel, out: str) -> None:
    """Say what a file holds."""
    print(f"{num_rows} embeddings of {model.cfg.model.language.hidden_size} numbers: {out}")


def embed_arguments(model: LoadedModel, args: argparse.Namespace) -> None:
    """Embed the command line's inputs: the texts, then the images."""
    names = [*args.text, *args.image]
    sides = [Side(mark_user_text(text, 0), []) for text in args.text]
    sides += [Side.read(mark_user_text(args.instruction, 1), image) for image in args.image]
    rows = embed(model, {f"{index} ({name})": side for index, (name, side) in enumerate(zip(names, sides), 1)})
    if dist.get_rank() == 0:
        write_rows(names, rows, args.out, model, args.checkpoint)


def write_rows(names: list[str], rows: torch.Tensor, out: str | None, model: LoadedModel, source: str) -> None:
    """Write the embeddings of the command line's inputs into a file, or print them."""
    if not out:
        for name, row in zip(names, rows.tolist()):
            print(json.dumps({"input": name, "embedding": row}, ensure_ascii=False))
        return
    with embedding_file(out, len(names), rows.shape[1], source) as write:
        write(names, rows)
    print_written(len(names), model, out)

"""Make a folder of training shards, inspect one, or verify one: `prepare_data.py COMMAND ...`. See docs/data.md.

This is the first tool of a run. Its sources are `openmoji`, the data that comes with pip packages (extra `demo`);
`mmeb`, the published MMEB-train; the user's own: images with captions (`folder` and `csv`; docs/own_data.md) or any
pairs (`jsonl`); and the data of other trainers (`columns`, `swift`, `vlm2vec` and `webdataset`; docs/formats.md).
`tokenizer` trains a tokenizer, and `clips` makes short videos for an evaluation.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_llave.commands.mined_tables import inspect_mined
from megatron_llave.commands.prepare_sources import add_sources
from megatron_llave.commands.prepare_tables import inspection_notes, inspection_tables, print_noticed
from megatron_llave.commands.progress import progress_bar
from megatron_llave.config.presets import PRESETS
from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.data.index import INDEX_FILE
from megatron_llave.data.order import ORDER_FILE
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line
from megatron_llave.prepare import audit, mined_audit
from megatron_llave.prepare.openmoji import clips
from megatron_llave.prepare.shard_jobs import check_arguments
from megatron_llave.prepare.tokenizer import TRAINED_FILE, VOCABULARY, texts_of, write_trained


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; `run` of what it parses is the function of the command."""
    parser = OneLineParser(description="Make training shards, inspect them, and verify them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sources(commands)
    _add_tokenizer(commands)
    clips = commands.add_parser("clips", help="short videos of moving emoji, for llave evaluate video")
    clips.add_argument("--out", required=True, metavar="DIR", help="output directory")
    clips.add_argument("--count", type=int, default=60, metavar="N", help="number of videos (60)")
    clips.add_argument("--overwrite", action="store_true", help="replace a finished output directory")
    clips.set_defaults(run=run_clips)
    look = commands.add_parser("inspect", help="print what a folder of shards, mined negatives or a mined order holds")
    look.add_argument("directory", metavar="DIR")
    look.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model; with --preset, counts tokens")
    look.add_argument("--preset", choices=tuple(PRESETS), help="model whose tokens per image are counted")
    look.set_defaults(run=run_inspect)
    what = "check a folder of shards, mined negatives or a mined order, each byte of it; status 1 if any is bad"
    check = commands.add_parser("verify", help=what)
    check.add_argument("directory", metavar="DIR")
    shards = "local folder of the shards that mined negatives or an order are of, whose pairs are compared with them"
    check.add_argument("--data", metavar="SHARDS", help=shards)
    check.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"larger images are problems ({MAX_PIXELS})"
    )
    check.add_argument("--workers", type=int, default=1, metavar="N", help="number of processes (1)")
    check.set_defaults(run=run_verify)
    return parser


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("tokenizer", help="train a tokenizer on the texts of a folder of shards, or of a file")
    train.add_argument("--source", required=True, metavar="PATH", help="folder of shards, or file with a text per line")
    train.add_argument("--out", metavar="FILE", help="SentencePiece model to write (tokenizer.model in the folder)")
    size = f"largest number of pieces; that of the model is model.language.vocab_size ({VOCABULARY})"
    train.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N", help=size)
    train.add_argument("--overwrite", action="store_true", help="replace an existing file")
    train.set_defaults(run=run_tokenizer)


def run_tokenizer(given: argparse.Namespace) -> int:
    """Train a tokenizer; returns the exit status."""
    source = Path(given.source)
    if given.out is None and not source.is_dir():
        raise ConfigError("--source is no folder, so that --out FILE.model is needed")
    file = Path(given.out or source / TRAINED_FILE)
    if file.suffix != ".model":
        raise ConfigError(f"--out {file} must end in .model")
    if file.exists() and not given.overwrite:
        raise ConfigError(f"{file} exists already; choose another or pass --overwrite")
    print(f"wrote {file}: {write_trained(texts_of(source), file, given.vocabulary)} pieces")
    return 0


def run_clips(given: argparse.Namespace) -> int:
    """Make videos of moving emoji; returns the exit status."""
    count = clips.make_clips(given.out, given.count, given.overwrite)
    print(f"wrote {count} videos and {given.out}/{clips.MANIFEST}")
    return 0


def run_inspect(given: argparse.Namespace) -> int:
    """Print what a folder of shards, or what was mined of one, holds; returns the exit status."""
    found = mined_audit.files_in(given.directory)
    mined = [name for name in found if name != INDEX_FILE]
    if mined and INDEX_FILE not in found and (given.tokenizer or given.preset):
        raise ConfigError(f"--tokenizer and --preset are for a folder of shards, but {given.directory} has {mined[0]}")
    for name in mined:
        inspect_mined(Path(given.directory) / name)
    return 0 if mined and INDEX_FILE not in found else _inspect_shards(given)


def _inspect_shards(given: argparse.Namespace) -> int:
    with progress_bar() as report:
        inspection = audit.inspect(given.directory, given.tokenizer, given.preset, report)
    console = Console()
    for table in inspection_tables(inspection):
        console.print(table)
    for note in inspection_notes(inspection):
        print(note)
    print_noticed(given.directory, inspection.noticed)
    return 0


def run_verify(given: argparse.Namespace) -> int:
    """Print every problem of a folder of shards, or of what was mined of one; returns 1 if there is any, else 0."""
    problems = 0
    has_shards = mined_audit.files_in(given.directory) != [ORDER_FILE]
    noticed: dict[tuple[str, str], list[str]] = {}
    check_arguments(given.workers, given.max_pixels)
    with progress_bar() as report:
        checks = audit.verify(given.directory, given.workers, given.max_pixels, report) if has_shards else ()
        for subset, check in checks:
            problems += len(check.problems)
            print("".join(f"{problem}\n" for problem in check.problems), end="", flush=True)
            for note, image in check.noticed:
                noticed.setdefault((subset, note), []).append(image)
        for problem in mined_audit.misfits(given.directory, given.data, report):
            problems += 1
            print(problem, flush=True)
    table = Table("subset", "images", "noticed", "the first of them")
    for (subset, note), images in noticed.items():
        table.add_row(subset, str(len(images)), note, images[0])
    if table.rows:
        Console().print(table)
    right = "every checksum and member is right" if has_shards else "each pair comes once"
    right += f", and it is of the shards in {given.data}" if given.data else ""
    print(f"{problems} problems" if problems else f"{given.directory} is complete: {right}")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> None:
    """Entry point. `verify` ends the process with status 1 if it finds a problem."""
    with exit_with_one_line():
        given = build_parser().parse_args(argv)
        status = given.run(given)
    if status:
        sys.exit(status)

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
from megatron_llave.commands.prepare_sources import SOURCES
from megatron_llave.commands.prepare_tables import inspection_notes, inspection_tables, print_noticed
from megatron_llave.commands.progress import progress_bar
from megatron_llave.data.index import INDEX_FILE
from megatron_llave.data.order import ORDER_FILE
from megatron_llave.errors import ConfigError, exit_with_one_line
from megatron_llave.options import prepare as options
from megatron_llave.prepare import audit, mined_audit
from megatron_llave.prepare.openmoji import clips
from megatron_llave.prepare.shard_jobs import check_arguments
from megatron_llave.prepare.tokenizer import TRAINED_FILE, texts_of, write_trained


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
        # First, because data that cannot be compared end the command.
        for problem in mined_audit.misfits(given.directory, given.data, report):
            problems += 1
            print(problem, flush=True)
        checks = audit.verify(given.directory, given.workers, given.max_pixels, report) if has_shards else ()
        for subset, check in checks:
            problems += len(check.problems)
            print("".join(f"{problem}\n" for problem in check.problems), end="", flush=True)
            for note, image in check.noticed:
                noticed.setdefault((subset, note), []).append(image)
    table = Table("subset", "images", "noticed", "the first of them")
    for (subset, note), images in noticed.items():
        table.add_row(subset, str(len(images)), note, images[0])
    if table.rows:
        Console().print(table)
    right = "every checksum and member is right" if has_shards else "each pair comes once"
    right += f", and it is of the shards in {given.data}" if given.data else ""
    print(f"{problems} problems" if problems else f"{given.directory} is complete: {right}")
    return 1 if problems else 0


RUN = {
    **SOURCES,
    "tokenizer": run_tokenizer,
    "clips": run_clips,
    "inspect": run_inspect,
    "verify": run_verify,
}
"""The function of each command, which takes the parsed command line and returns the exit status."""


def main(argv: list[str] | None = None) -> None:
    """Entry point. `verify` ends the process with status 1 if it finds a problem."""
    with exit_with_one_line():
        given = options.parse(argv)
        status = RUN[given.command](given)
    if status:
        sys.exit(status)

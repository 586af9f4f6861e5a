"""Make a folder of training shards, look into one, or check one: `prepare_data.py COMMAND ...`. See docs/data.md.

The first tool of a run. Sources: openmoji, the data that comes with pip (extra `demo`); mmeb, MMEB-train as released;
jsonl, the user's own pairs.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_llave.config.presets import PRESETS
from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.data.index import META_TASKS, Index, Subset
from megatron_llave.errors import exit_with_one_line
from megatron_llave.prepare import audit, jsonl, mmeb
from megatron_llave.prepare.openmoji import clips, prepare
from megatron_llave.prepare.shard_jobs import REPORT_FILE

MODALITIES = ("text", "image", "both")
MOST_WORKERS = 8
"""Processes unless told otherwise: each holds some 300 MB."""
BAR = 24
"""Characters of the longest bar of a histogram."""

Report = Callable[[str, int, int], None]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` of the result is the command's own function."""
    parser = argparse.ArgumentParser(description="Make training shards, look into them, check them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_openmoji(commands)
    _add_mmeb(commands)
    _add_jsonl(commands)
    clips = commands.add_parser("clips", help="short videos of moving emoji, for tools/evaluate.py video")
    clips.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    clips.add_argument("--count", type=int, default=60, metavar="N", help="videos (60)")
    clips.add_argument("--overwrite", action="store_true", help="replace a finished folder")
    clips.set_defaults(run=run_clips)
    look = commands.add_parser("inspect", help="subsets, pairs, modalities, lengths of a folder of shards")
    look.add_argument("directory", metavar="DIR")
    look.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model: with --preset, lengths in tokens")
    look.add_argument("--preset", choices=tuple(PRESETS), help="model whose tile grids count")
    look.set_defaults(run=run_inspect)
    check = commands.add_parser(
        "verify", help="every checksum and member of a folder of shards; status 1 if one is bad"
    )
    check.add_argument("directory", metavar="DIR")
    check.set_defaults(run=run_verify)
    return parser.parse_args(arguments)


def _add_openmoji(commands: argparse._SubParsersAction) -> None:
    emoji = commands.add_parser("openmoji", help="emoji pictures and names from pip packages; no download")
    emoji.add_argument("--image-size", type=int, default=56, metavar="PIXELS", help="side of every picture (56)")
    emoji.add_argument("--seed", type=int, default=0, help="of augmentations, canvases and order (0)")
    emoji.add_argument("--pairs-scale", type=float, default=1.0, metavar="X", help="share of the pairs to make (1.0)")
    emoji.add_argument("--hard-negatives", type=int, default=0, metavar="N", help="wrong targets of each pair (0)")
    _add_output(emoji, default_workers=2)
    emoji.set_defaults(run=run_openmoji)


def _add_mmeb(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("mmeb", help="MMEB-train: Parquet or JSON rows and the image folder")
    train.add_argument("--source", required=True, metavar="DIR", help="folder with SUBSET/SPLIT-*.parquet and images")
    train.add_argument("--split", choices=mmeb.SPLITS, default="original", help="(original)")
    train.add_argument("--subsets", nargs="+", metavar="NAME", help="those to take (all that are there)")
    train.add_argument("--limit", type=int, metavar="N", help="rows of each subset, the first ones (all)")
    _add_image_limit(train)
    _add_output(train, default_workers=min(MOST_WORKERS, os.cpu_count() or 1))
    train.set_defaults(run=run_mmeb)


def _add_jsonl(commands: argparse._SubParsersAction) -> None:
    own = commands.add_parser("jsonl", help="your own pairs, one JSON object a line (docs/data.md)")
    own.add_argument(
        "--source", required=True, nargs="+", metavar="FILE", help="JSONL files; images are relative to them"
    )
    own.add_argument("--meta-task", choices=META_TASKS, default="retrieval", help="of their subsets (retrieval)")
    _add_image_limit(own)
    _add_output(own, default_workers=min(MOST_WORKERS, os.cpu_count() or 1))
    own.set_defaults(run=run_jsonl)


def _add_image_limit(command: argparse.ArgumentParser) -> None:
    limit = f"larger images are skipped ({MAX_PIXELS})"
    command.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=limit)


def _add_output(command: argparse.ArgumentParser, default_workers: int) -> None:
    workers = f"processes; the result does not depend on it ({default_workers})"
    command.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    command.add_argument("--workers", type=int, default=default_workers, metavar="N", help=workers)
    command.add_argument("--overwrite", action="store_true", help="replace a finished folder")


def run_openmoji(given: argparse.Namespace) -> int:
    """Make the embedded data."""
    with progress_bar() as report:
        index = prepare.prepare(
            given.out,
            image_size=given.image_size,
            seed=given.seed,
            workers=given.workers,
            pairs_scale=given.pairs_scale,
            overwrite=given.overwrite,
            hard_negatives=given.hard_negatives,
            progress=report,
        )
    return _print_made(given.out, index, {})


def run_mmeb(given: argparse.Namespace) -> int:
    """Make shards of MMEB-train."""
    with progress_bar() as report:
        made = mmeb.prepare(
            given.source,
            given.out,
            split=given.split,
            subsets=given.subsets,
            limit=given.limit,
            workers=given.workers,
            max_pixels=given.max_pixels,
            overwrite=given.overwrite,
            progress=report,
        )
    return _print_made(given.out, made.index, made.skipped)


def run_jsonl(given: argparse.Namespace) -> int:
    """Make shards of the user's own pairs."""
    with progress_bar() as report:
        made = jsonl.prepare(
            given.source,
            given.out,
            meta_task=given.meta_task,
            workers=given.workers,
            max_pixels=given.max_pixels,
            overwrite=given.overwrite,
            progress=report,
        )
    return _print_made(given.out, made.index, made.skipped)


def run_clips(given: argparse.Namespace) -> int:
    """Make videos of emoji."""
    count = clips.make_clips(given.out, given.count, given.overwrite)
    print(f"wrote {count} videos and {given.out}/{clips.MANIFEST}")
    return 0


def run_inspect(given: argparse.Namespace) -> int:
    """Print what a folder holds."""
    with progress_bar() as report:
        found = audit.inspect(given.directory, given.tokenizer, given.preset, report)
    console = Console()
    for table in inspection_tables(found):
        console.print(table)
    for note in inspection_notes(found):
        print(note)
    return 0


def run_verify(given: argparse.Namespace) -> int:
    """Print every problem of a folder; 1 if there is any."""
    problems = 0
    with progress_bar() as report:
        for problem in audit.verify(given.directory, report):
            problems += 1
            print(problem, flush=True)
    print(f"{problems} problems" if problems else f"{given.directory} is whole: every checksum and member is right")
    return 1 if problems else 0


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on stderr, and the function that moves it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Redirecting stdout would send what is printed meanwhile to the bar's own stream.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _print_made(directory: str, index: Index, skipped: dict[str, Counter[str]]) -> int:
    console = Console()
    console.print(summary(index.subsets))
    reasons = Table("subset", "left out", "reason")
    for name, counts in skipped.items():
        for reason, count in counts.most_common():
            reasons.add_row(name, str(count), reason)
    if reasons.rows:
        console.print(reasons)
        print(f"each one is listed in {directory}/{REPORT_FILE}")
    print(f"wrote {directory}")
    return 0


def summary(subsets: dict[str, Subset]) -> Table:
    """One row per subset and a total."""
    table = Table("subset", "meta-task", show_footer=True)
    sizes = {name: sum(shard.bytes for shard in subset.shards) / 1e6 for name, subset in subsets.items()}
    table.columns[0].footer = "total"
    table.add_column("pairs", justify="right", footer=str(sum(subset.pairs for subset in subsets.values())))
    table.add_column("shards", justify="right", footer=str(sum(len(subset.shards) for subset in subsets.values())))
    table.add_column("MB", justify="right", footer=f"{sum(sizes.values()):.1f}")
    for name, subset in subsets.items():
        table.add_row(name, subset.meta_task, str(subset.pairs), str(len(subset.shards)), f"{sizes[name]:.1f}")
    return table


def inspection_tables(found: audit.Inspection) -> list[Table]:
    """Subsets, their modalities, and a histogram of each length that was measured."""
    modalities = Table("subset", title="sides with text, image, both")
    for name in ("query", "target", "hard negatives"):
        modalities.add_column(f"pairs with {name}" if name == "hard negatives" else name, justify="right")
    for name, counts in found.subsets.items():
        sides = [" / ".join(str(side[modality]) for modality in MODALITIES) for side in (counts.query, counts.target)]
        mark = "*" if counts.counted < counts.subset.pairs else ""
        modalities.add_row(name + mark, *sides, str(counts.with_hard_negatives))
    tables = [summary({name: counts.subset for name, counts in found.subsets.items()}), modalities]
    return tables + [_histogram_table(measure, lengths) for measure, lengths in found.lengths.items()]


def _histogram_table(measure: str, lengths: dict[str, Counter[int]]) -> Table:
    title = {"characters": "characters of the texts", "pixels": "longer side of the images, pixels"}
    table = Table(title=title.get(measure, f"{measure} of the sequences"), show_footer=True)
    table.add_column("", footer="mean\nlongest")
    for kind, counter in lengths.items():
        mean = sum(length * count for length, count in counter.items()) / counter.total()
        table.add_column(kind, justify="right", footer=f"{mean:.1f}\n{max(counter)}")
    table.add_column("")
    ranges = audit.histogram(lengths)
    most = max(sum(counts.values()) for _, _, counts in ranges)
    for first, last, counts in ranges:
        bar = "#" * -(-BAR * sum(counts.values()) // most)
        table.add_row(f"{first} - {last}" if last else "0", *(str(counts[kind]) for kind in lengths), bar)
    return table


def inspection_notes(found: audit.Inspection) -> list[str]:
    """What the tables do not say by themselves."""
    notes = []
    for name, counts in found.subsets.items():
        if counts.counted < counts.subset.pairs:
            notes.append(f"* {name}: {counts.counted} of its {counts.subset.pairs} pairs were looked at")
    if found.not_encodable:
        notes.append(f"{found.not_encodable} sides have more placeholders than images; training leaves their pairs out")
    return notes


def main(arguments: list[str] | None = None) -> None:
    """Entry point; verify ends the process with status 1 where it finds a problem."""
    with exit_with_one_line():
        given = parse_arguments(arguments)
        status = given.run(given)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

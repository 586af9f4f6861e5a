"""Make a folder of training shards, inspect one, or verify one: `prepare_data.py COMMAND ...`. See docs/data.md.

This is the first tool of a run. Its sources are `openmoji`, the data that comes with pip packages (extra `demo`),
`mmeb`, the published MMEB-train, and the user's own: images with captions (`folder` and `csv`; docs/own_data.md) or any
pairs (`jsonl`). `tokenizer` trains a tokenizer, and `clips` makes short videos for an evaluation.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_llave.config.presets import PRESETS
from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.data.index import META_TASKS, Subset
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line
from megatron_llave.prepare import audit, captions, jsonl, mmeb
from megatron_llave.prepare.openmoji import clips, prepare
from megatron_llave.prepare.own_pairs import TRAIN, Options
from megatron_llave.prepare.shard_jobs import REPORT_FILE, Prepared, check_arguments
from megatron_llave.prepare.tokenizer import TRAINED_FILE, VOCABULARY, texts_of, write_trained

MODALITIES = ("text", "image", "both")
MOST_WORKERS = 8
"""Upper limit of the default number of processes, which is otherwise that of cores; each needs some 300 MB."""
DEFAULT_WORKERS = min(MOST_WORKERS, os.cpu_count() or 1)
BAR = 24
"""Number of characters of the longest bar of a histogram."""

HELD_OUT = 0.1
"""Default fraction of images with captions that are held out."""
NEXT = "bash examples/pretrain_llave_tiny.sh --config examples/own_data.yaml data.path={} train.output=runs/own"
"""The command that trains on a folder of one's own."""

Report = Callable[[str, int, int], None]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` of the result is the function of the command."""
    parser = OneLineParser(description="Make training shards, inspect them, and verify them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_openmoji(commands)
    _add_mmeb(commands)
    _add_folder(commands)
    _add_csv(commands)
    _add_jsonl(commands)
    _add_tokenizer(commands)
    clips = commands.add_parser("clips", help="short videos of moving emoji, for tools/evaluate.py video")
    clips.add_argument("--out", required=True, metavar="DIR", help="output directory")
    clips.add_argument("--count", type=int, default=60, metavar="N", help="number of videos (60)")
    clips.add_argument("--overwrite", action="store_true", help="replace a finished output directory")
    clips.set_defaults(run=run_clips)
    look = commands.add_parser("inspect", help="print subsets, pairs, modalities and lengths of a folder of shards")
    look.add_argument("directory", metavar="DIR")
    look.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model; with --preset, counts tokens")
    look.add_argument("--preset", choices=tuple(PRESETS), help="model whose tokens per image are counted")
    look.set_defaults(run=run_inspect)
    check = commands.add_parser(
        "verify", help="check every checksum and member of a folder of shards; status 1 if any is bad"
    )
    check.add_argument("directory", metavar="DIR")
    check.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"larger images are problems ({MAX_PIXELS})"
    )
    check.add_argument("--workers", type=int, default=1, metavar="N", help="number of processes (1)")
    check.set_defaults(run=run_verify)
    return parser.parse_args(argv)


def _add_openmoji(commands: argparse._SubParsersAction) -> None:
    emoji = commands.add_parser("openmoji", help="emoji images and names from pip packages; no download")
    emoji.add_argument("--image-size", type=int, default=56, metavar="PIXELS", help="side of every image (56)")
    emoji.add_argument("--seed", type=int, default=0, help="seed of augmentations, canvases and order (0)")
    emoji.add_argument("--pairs-scale", type=float, default=1.0, metavar="X", help="fraction of pairs to make (1.0)")
    emoji.add_argument("--hard-negatives", type=int, default=0, metavar="N", help="hard negatives per pair (0)")
    _add_output(emoji, default_workers=2)
    emoji.set_defaults(run=run_openmoji)


def _add_mmeb(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("mmeb", help="MMEB-train: Parquet or JSON rows, and their image folder")
    train.add_argument("--source", required=True, metavar="DIR", help="folder with SUBSET/SPLIT-*.parquet and images")
    train.add_argument("--split", choices=mmeb.SPLITS, default="original", help="split to read (original)")
    train.add_argument("--subsets", nargs="+", metavar="NAME", help="subsets to use (all in the folder)")
    train.add_argument("--limit", type=int, metavar="N", help="use only the first N rows of each subset (all)")
    _add_image_limit(train)
    _add_output(train, default_workers=DEFAULT_WORKERS)
    train.set_defaults(run=run_mmeb)


def _add_folder(commands: argparse._SubParsersAction) -> None:
    images = commands.add_parser("folder", help="a folder of your own images with captions (docs/own_data.md)")
    images.add_argument("--source", required=True, metavar="DIR", help="folder of images, with subfolders")
    where = "auto: metadata.jsonl, captions.txt or photo.txt beside photo.jpg; names: the names of the images (auto)"
    images.add_argument("--captions", choices=captions.SOURCES, default="auto", help=where)
    _add_own(images, held_out=HELD_OUT)
    images.set_defaults(run=run_folder)


def _add_csv(commands: argparse._SubParsersAction) -> None:
    table = commands.add_parser("csv", help="CSV or TSV files with columns of image paths and captions")
    files = "files with a line of names first; image paths are relative to their folder"
    table.add_argument("--source", required=True, nargs="+", metavar="FILE", help=files)
    known = ", ".join(" ".join(pair) for pair in captions.COLUMNS)
    table.add_argument("--columns", nargs=2, default=(), metavar=("IMAGE", "CAPTION"), help=f"their names ({known})")
    _add_own(table, held_out=HELD_OUT)
    table.set_defaults(run=run_csv)


def _add_jsonl(commands: argparse._SubParsersAction) -> None:
    pairs = commands.add_parser("jsonl", help="your own pairs, one JSON object per line (docs/data.md)")
    files = "JSONL files; image paths are relative to their folder"
    pairs.add_argument("--source", required=True, nargs="+", metavar="FILE", help=files)
    pairs.add_argument("--meta-task", choices=META_TASKS, default="retrieval", help="for all subsets (retrieval)")
    _add_own(pairs, held_out=0)
    pairs.set_defaults(run=run_jsonl)


def _add_own(command: argparse.ArgumentParser, held_out: float) -> None:
    share = f"fraction of the pairs that are held out as evaluation sets ({held_out:g})"
    command.add_argument("--held-out", type=float, default=held_out, metavar="X", help=share)
    kept = "tokenizer file, data folder, checkpoint or Hugging Face folder to copy the tokenizer from (train one)"
    command.add_argument("--tokenizer", default=TRAIN, metavar="FROM", help=kept)
    _add_image_limit(command)
    _add_output(command, default_workers=DEFAULT_WORKERS)


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("tokenizer", help="train a tokenizer on the texts of a folder of shards, or of a file")
    train.add_argument("--source", required=True, metavar="PATH", help="folder of shards, or file with a text per line")
    train.add_argument("--out", metavar="FILE", help="SentencePiece model to write (tokenizer.model in the folder)")
    size = f"largest number of pieces; that of the model is model.language.vocab_size ({VOCABULARY})"
    train.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N", help=size)
    train.add_argument("--overwrite", action="store_true", help="replace an existing file")
    train.set_defaults(run=run_tokenizer)


def _add_image_limit(command: argparse.ArgumentParser) -> None:
    limit = f"skip images with more pixels ({MAX_PIXELS})"
    command.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=limit)


def _add_output(command: argparse.ArgumentParser, default_workers: int) -> None:
    workers = f"number of processes; the result does not depend on it ({default_workers})"
    command.add_argument("--out", required=True, metavar="DIR", help="output directory")
    command.add_argument("--workers", type=int, default=default_workers, metavar="N", help=workers)
    command.add_argument("--overwrite", action="store_true", help="replace a finished output directory")


def run_openmoji(given: argparse.Namespace) -> int:
    """Make the bundled OpenMoji data; returns the exit status."""
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
    return _print_made(given.out, Prepared(index, {}, {}))


def run_mmeb(given: argparse.Namespace) -> int:
    """Make shards of MMEB-train; returns the exit status."""
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
    return _print_made(given.out, made)


def run_folder(given: argparse.Namespace) -> int:
    """Make a data folder of a folder of images with captions; returns the exit status."""
    with progress_bar() as report:
        made = captions.prepare_folder(given.source, given.out, given.captions, _options(given), report)
    return _print_own(given.out, made)


def run_csv(given: argparse.Namespace) -> int:
    """Make a data folder of CSV or TSV files; returns the exit status."""
    with progress_bar() as report:
        made = captions.prepare_csv(given.source, given.out, given.columns, _options(given), report)
    return _print_own(given.out, made)


def run_jsonl(given: argparse.Namespace) -> int:
    """Make a data folder of the user's own pairs; returns the exit status."""
    with progress_bar() as report:
        made = jsonl.prepare(given.source, given.out, given.meta_task, _options(given), report)
    return _print_own(given.out, made)


def _options(given: argparse.Namespace) -> Options:
    return Options(given.held_out, given.tokenizer, given.workers, given.max_pixels, given.overwrite)


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
    """Print what a folder of shards holds; returns the exit status."""
    with progress_bar() as report:
        inspection = audit.inspect(given.directory, given.tokenizer, given.preset, report)
    console = Console()
    for table in inspection_tables(inspection):
        console.print(table)
    for note in inspection_notes(inspection):
        print(note)
    _print_noticed(given.directory, inspection.noticed)
    return 0


def run_verify(given: argparse.Namespace) -> int:
    """Print every problem of a folder of shards; returns 1 if there is any, else 0."""
    problems = 0
    noticed: dict[tuple[str, str], list[str]] = {}
    check_arguments(given.workers, given.max_pixels)
    with progress_bar() as report:
        for subset, check in audit.verify(given.directory, given.workers, given.max_pixels, report):
            problems += len(check.problems)
            print("".join(f"{problem}\n" for problem in check.problems), end="", flush=True)
            for note, image in check.noticed:
                noticed.setdefault((subset, note), []).append(image)
    table = Table("subset", "images", "noticed", "the first of them")
    for (subset, note), images in noticed.items():
        table.add_row(subset, str(len(images)), note, images[0])
    if table.rows:
        Console().print(table)
    print(f"{problems} problems" if problems else f"{given.directory} is complete: every checksum and member is right")
    return 1 if problems else 0


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show a progress bar on stderr, and yield the function that moves it: (description, done, total)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # If rich redirected stdout, whatever is printed meanwhile would go to the stream of the bar.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _print_made(directory: str, made: Prepared) -> int:
    console = Console()
    console.print(summary(made.index.subsets))
    reasons = Table("subset", "skipped", "reason")
    for name, counts in made.skipped.items():
        for reason, count in counts.most_common():
            reasons.add_row(name, str(count), reason)
    if reasons.rows:
        console.print(reasons)
        print(f"{directory}/{REPORT_FILE} lists each of them")
    _print_noticed(directory, made.noticed)
    print(f"wrote {directory}")
    return 0


def _print_own(directory: str, made: Prepared) -> int:
    """Print what was made, the evaluation sets, and the command that comes next."""
    status = _print_made(directory, made)
    table = Table("held out", "meta-task", "queries", "candidates", "chance (%)")
    for held_out in made.evaluation:
        counts = (str(len(held_out.queries)), str(len(held_out.candidates)), f"{held_out.chance:.3g}")
        table.add_row(held_out.name, held_out.meta_task, *counts)
    if table.rows:
        Console().print(table)
    print("".join(f"{line}\n" for line in made.unused), end="")
    print(f"next: {NEXT.format(directory)}")
    return status


def _print_noticed(directory: str, noticed: dict[str, Counter[str]]) -> None:
    """Print how many images lose something when they are read, if there are any."""
    table = Table("subset", "images", "noticed")
    for name, counts in noticed.items():
        for note, count in counts.most_common():
            table.add_row(name, str(count), note)
    if table.rows:
        Console().print(table)
        print(f"{directory}/{REPORT_FILE} names each of them; data.image_background and data.image_corrections apply")


def summary(subsets: dict[str, Subset]) -> Table:
    """A table with one row per subset, and a total."""
    table = Table("subset", "meta-task", show_footer=True)
    sizes = {name: sum(shard.bytes for shard in subset.shards) / 1e6 for name, subset in subsets.items()}
    table.columns[0].footer = "total"
    table.add_column("pairs", justify="right", footer=str(sum(subset.pairs for subset in subsets.values())))
    table.add_column("shards", justify="right", footer=str(sum(len(subset.shards) for subset in subsets.values())))
    table.add_column("MB", justify="right", footer=f"{sum(sizes.values()):.1f}")
    for name, subset in subsets.items():
        table.add_row(name, subset.meta_task, str(subset.pairs), str(len(subset.shards)), f"{sizes[name]:.1f}")
    return table


def inspection_tables(inspection: audit.Inspection) -> list[Table]:
    """Tables of the subsets and of their modalities, and a histogram of each length that was measured."""
    modalities = Table("subset", title="queries and targets with text / image / both")
    counted = {"hard negatives": "with_hard_negatives", "several targets": "with_several_targets"}
    counted |= {"scores": "with_scores"}
    counted = {
        f"pairs with {name}": field
        for name, field in counted.items()
        if field == "with_hard_negatives" or any(getattr(counts, field) for counts in inspection.subsets.values())
    }
    for name in ("query", "target", *counted):
        modalities.add_column(name, justify="right")
    for name, counts in inspection.subsets.items():
        sides = [" / ".join(str(side[modality]) for modality in MODALITIES) for side in (counts.query, counts.target)]
        mark = "*" if counts.counted < counts.subset.pairs else ""
        modalities.add_row(name + mark, *sides, *(str(getattr(counts, field)) for field in counted.values()))
    tables = [summary({name: counts.subset for name, counts in inspection.subsets.items()}), modalities]
    return tables + [_histogram_table(measure, lengths) for measure, lengths in inspection.lengths.items()]


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


def inspection_notes(inspection: audit.Inspection) -> list[str]:
    """Lines that explain what the tables do not show: sampled subsets, and inputs that cannot be encoded."""
    notes = []
    for name, counts in inspection.subsets.items():
        if counts.counted < counts.subset.pairs:
            notes.append(f"* {name}: {counts.counted} of its {counts.subset.pairs} pairs were read")
    if inspection.not_encodable:
        notes.append(
            f"{inspection.not_encodable} inputs have more placeholders than images; training drops their pairs"
        )
    return notes


def main(argv: list[str] | None = None) -> None:
    """Entry point. `verify` ends the process with status 1 if it finds a problem."""
    with exit_with_one_line():
        given = parse_arguments(argv)
        status = given.run(given)
    if status:
        sys.exit(status)

"""The sources of `prepare`: their options, and what runs each of them."""

import argparse
import os
from typing import Any

from megatron_llave.commands.prepare_tables import print_made, print_own
from megatron_llave.commands.progress import progress_bar
from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.data.index import META_TASKS
from megatron_llave.errors import ConfigError
from megatron_llave.prepare import captions, columns, jsonl, mmeb, swift, vlm2vec, webdataset
from megatron_llave.prepare.openmoji import prepare
from megatron_llave.prepare.own_pairs import TRAIN, Options
from megatron_llave.prepare.shard_jobs import Prepared

MOST_WORKERS = 8
"""Upper limit of the default number of processes, which is otherwise that of cores; each needs some 300 MB."""
DEFAULT_WORKERS = min(MOST_WORKERS, os.cpu_count() or 1)
HELD_OUT = 0.1
"""Default fraction of images with captions that are held out."""
SETTINGS = {
    "subset": "name of the one subset that all sources make (named after the files)",
    "split": "split of a folder (train where there is one, else everything)",
    "images": "folder that relative image paths start from (that of their file)",
    "meta_task": f"{', '.join(META_TASKS[:-1])} or {META_TASKS[-1]}, for all subsets (retrieval)",
    "tokenizer": "tokenizer file, data folder, checkpoint or Hugging Face folder to copy it from (train one)",
    "query_prompt": "instruction before the text of each query (none)",
    "target_prompt": "the same for each target and hard negative (none; images with captions: docs/data.md)",
    "max_pixels": f"skip images with more pixels ({MAX_PIXELS})",
}
"""What `--set` can set."""
Commands = argparse._SubParsersAction


def add_sources(commands: Commands) -> None:
    """Add the command of each source; `run` of the parsed arguments is its function."""
    _add_openmoji(commands)
    _add_mmeb(commands)
    _add_folder(commands)
    _add_csv(commands)
    _add_jsonl(commands)
    _add_columns(commands)
    _add_swift(commands)
    _add_vlm2vec(commands)
    _add_webdataset(commands)


def _add_openmoji(commands: Commands) -> None:
    emoji = commands.add_parser("openmoji", help="emoji images and names from pip packages; no download")
    emoji.add_argument("--image-size", type=int, default=56, metavar="PIXELS", help="side of every image (56)")
    emoji.add_argument("--seed", type=int, default=0, help="seed of augmentations, canvases and order (0)")
    emoji.add_argument("--pairs-scale", type=float, default=1.0, metavar="X", help="fraction of pairs to make (1.0)")
    emoji.add_argument("--hard-negatives", type=int, default=0, metavar="N", help="hard negatives per pair (0)")
    _add_output(emoji, default_workers=2)
    emoji.set_defaults(run=run_openmoji)


def _add_mmeb(commands: Commands) -> None:
    train = commands.add_parser("mmeb", help="MMEB-train: Parquet or JSON rows, and their image folder")
    train.add_argument("--source", required=True, metavar="DIR", help="folder with SUBSET/SPLIT-*.parquet and images")
    train.add_argument("--split", choices=mmeb.SPLITS, default="original", help="split to read (original)")
    train.add_argument("--subsets", nargs="+", metavar="NAME", help="subsets to use (all in the folder)")
    train.add_argument("--limit", type=int, metavar="N", help="use only the first N rows of each subset (all)")
    _add_image_limit(train)
    _add_output(train, default_workers=DEFAULT_WORKERS)
    train.set_defaults(run=run_mmeb)


def _add_folder(commands: Commands) -> None:
    images = commands.add_parser("folder", help="a folder of your own images with captions (docs/own_data.md)")
    images.add_argument("--source", required=True, metavar="DIR", help="folder of images, with subfolders")
    where = "auto: metadata.jsonl, captions.txt or photo.txt beside photo.jpg; names: the names of the images; "
    where += "classes: the names of their folders are their classes; column=NAME: that of metadata.jsonl (auto)"
    images.add_argument("--captions", default="auto", metavar="WHERE", help=where)
    _add_own(images, HELD_OUT)
    images.set_defaults(run=run_folder)


def _add_csv(commands: Commands) -> None:
    table = commands.add_parser("csv", help="CSV or TSV files with columns of image paths and captions")
    files = "files with a line of names first; image paths are relative to their folder"
    table.add_argument("--source", required=True, nargs="+", metavar="FILE", help=files)
    known = ", ".join(" ".join(pair) for pair in captions.COLUMNS)
    table.add_argument("--columns", nargs=2, default=(), metavar=("IMAGE", "CAPTION"), help=f"their names ({known})")
    _add_own(table, HELD_OUT)
    table.set_defaults(run=run_csv)


def _add_jsonl(commands: Commands) -> None:
    pairs = commands.add_parser("jsonl", help="your own pairs, one JSON object per line (docs/data.md)")
    files = "JSONL files; image paths are relative to their folder"
    pairs.add_argument("--source", required=True, nargs="+", metavar="FILE", help=files)
    pairs.add_argument("--meta-task", choices=META_TASKS, default="retrieval", help="for all subsets (retrieval)")
    _add_own(pairs, 0)
    pairs.set_defaults(run=run_jsonl)


def _add_columns(commands: Commands) -> None:
    table = commands.add_parser(
        "columns",
        help="columns of Parquet, Arrow, CSV or JSON, as sentence-transformers and datasets have (docs/formats.md)",
    )
    where = "tables, patterns, folders of tables, or folders of save_to_disk; each is a subset"
    table.add_argument("--source", required=True, nargs="+", metavar="PATH", help=where)
    roles = f"which column is what, of {', '.join(columns.ROLES)} (by their names)"
    table.add_argument("--columns", nargs="+", default=(), metavar="ROLE=COLUMN", help=roles)
    _add_limit(table, "rows of each subset")
    _add_own(table, 0, "subset", "split", "images", "meta_task", "tokenizer")
    table.set_defaults(run=run_columns)


def _add_swift(commands: Commands) -> None:
    lines = commands.add_parser("swift", help="embedding data of ms-swift: positive_messages (docs/formats.md)")
    lines.add_argument("--source", required=True, nargs="+", metavar="FILE", help="JSONL files; each is a subset")
    _add_limit(lines, "lines of each file")
    _add_own(lines, 0, "images", "meta_task", "tokenizer")
    lines.set_defaults(run=run_swift)


def _add_limit(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--limit", type=int, metavar="N", help=f"use only the first N {what} (all)")


def _add_vlm2vec(commands: Commands) -> None:
    sets = commands.add_parser("vlm2vec", help="data sets of a --dataset_config of VLM2Vec or B3 (docs/formats.md)")
    sets.add_argument("--source", required=True, metavar="LIST.yaml", help="YAML file that names data sets and weights")
    where = "folder with the downloads, that dataset_name and image_dir are relative to (the working directory)"
    sets.add_argument("--data-basedir", default=".", metavar="DIR", help=where)
    sets.add_argument("--subsets", nargs="+", metavar="NAME", help="names of the list to use (all)")
    sets.add_argument(
        "--limit", type=int, metavar="N", help="use only the first N rows of each (num_sample_per_subset)"
    )
    _add_image_limit(sets)
    _add_output(sets, default_workers=DEFAULT_WORKERS)
    sets.set_defaults(run=run_vlm2vec)


def _add_webdataset(commands: Commands) -> None:
    tars = commands.add_parser("webdataset", help="tars of images with captions, as of img2dataset (docs/formats.md)")
    where = "tars, folders of tars, and patterns such as 'data/{00000..00099}.tar'"
    tars.add_argument("--source", required=True, nargs="+", metavar="PATH", help=where)
    where = "auto: KEY.txt, or else caption of KEY.json; column=NAME: that of KEY.json (auto)"
    tars.add_argument("--captions", default="auto", metavar="WHERE", help=where)
    _add_limit(tars, "samples")
    _add_own(tars, HELD_OUT, "tokenizer")
    tars.set_defaults(run=run_webdataset)


def _add_own(command: argparse.ArgumentParser, held_out: float, *keys: str) -> None:
    """Add the options of all sources of one's own; `keys` are further settings of `--set`."""
    share = f"fraction of the pairs that are held out as evaluation sets ({held_out:g})"
    command.add_argument("--held-out", type=float, default=held_out, metavar="X", help=share)
    if "tokenizer" not in keys:
        command.add_argument("--tokenizer", default=TRAIN, metavar="FROM", help=SETTINGS["tokenizer"])
        command.add_argument("--max-pixels", type=int, help=argparse.SUPPRESS)  # as --set takes it
    keys = (*keys, "query_prompt", "target_prompt", "max_pixels")
    settings = "; ".join(f"{key}: {SETTINGS[key]}" for key in keys)
    command.add_argument("--set", nargs="+", default=(), metavar="KEY=VALUE", help=f"further settings. {settings}")
    command.set_defaults(keys=keys)
    _add_output(command, default_workers=DEFAULT_WORKERS)


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
    return print_made(given.out, Prepared(index, {}, {}))


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
    return print_made(given.out, made)


def run_folder(given: argparse.Namespace) -> int:
    """Make a data folder of a folder of images with captions; returns the exit status."""
    with progress_bar() as report:
        where, column = _captions(given)
        made = captions.prepare_folder(given.source, given.out, where, _options(given), report, column)
    return print_own(given.out, made)


def run_csv(given: argparse.Namespace) -> int:
    """Make a data folder of CSV or TSV files; returns the exit status."""
    with progress_bar() as report:
        made = captions.prepare_csv(given.source, given.out, given.columns, _options(given), report)
    return print_own(given.out, made)


def run_jsonl(given: argparse.Namespace) -> int:
    """Make a data folder of the user's own pairs; returns the exit status."""
    with progress_bar() as report:
        made = jsonl.prepare(given.source, given.out, given.meta_task, _options(given), report)
    return print_own(given.out, made)


def run_columns(given: argparse.Namespace) -> int:
    """Make a data folder of tables; returns the exit status."""
    with progress_bar() as report:
        made = columns.prepare(
            given.source,
            given.out,
            given.columns,
            limit=given.limit,
            options=_options(given),
            progress=report,
            **_settings(given, "subset", "split", "images", "meta_task"),
        )
    return print_own(given.out, made)


def run_swift(given: argparse.Namespace) -> int:
    """Make a data folder of the JSONL files of ms-swift; returns the exit status."""
    with progress_bar() as report:
        more = {"limit": given.limit, "options": _options(given), "progress": report}
        made = swift.prepare(given.source, given.out, **more, **_settings(given, "images", "meta_task"))
    return print_own(given.out, made)


def run_vlm2vec(given: argparse.Namespace) -> int:
    """Make shards of the data sets of a list; returns the exit status."""
    with progress_bar() as report:
        made = vlm2vec.prepare(
            given.source,
            given.out,
            root=given.data_basedir,
            subsets=given.subsets,
            limit=given.limit,
            workers=given.workers,
            max_pixels=given.max_pixels,
            overwrite=given.overwrite,
            progress=report,
        )
    status = print_made(given.out, made)
    print(f"{given.out}/{vlm2vec.MIXTURE_FILE} has the weights of the list, as a section of a configuration")
    return status


def run_webdataset(given: argparse.Namespace) -> int:
    """Make a data folder of tars of images with captions; returns the exit status."""
    with progress_bar() as report:
        where, column = _captions(given)
        if where != "auto":
            raise ConfigError(f"--captions {where} must be auto or column=NAME")
        made = webdataset.prepare(given.source, given.out, column, given.limit, _options(given), report)
    return print_own(given.out, made)


def _options(given: argparse.Namespace) -> Options:
    settings = {"tokenizer": TRAIN} | _settings(given, "tokenizer", "query_prompt", "target_prompt", "max_pixels")
    if "tokenizer" not in given.keys:
        more = {"tokenizer": given.tokenizer, "max_pixels": given.max_pixels}
        settings |= {key: value for key, value in more.items() if value is not None}
    return Options(given.held_out, workers=given.workers, overwrite=given.overwrite, **settings)


def _settings(given: argparse.Namespace, *wanted: str) -> dict[str, Any]:
    """Return those of the wanted settings that --set has."""
    settings: dict[str, Any] = {}
    for word in given.set:
        key, sign, value = word.partition("=")
        if key not in given.keys or not sign:
            raise ConfigError(f"--set {word}: give KEY=VALUE, with one of the keys {', '.join(given.keys)}")
        if key == "max_pixels" and not value.isdecimal():
            raise ConfigError(f"--set {word}: max_pixels must be a whole number")
        settings[key] = int(value) if key == "max_pixels" else value
    return {key: value for key, value in settings.items() if key in wanted}


def _captions(given: argparse.Namespace) -> tuple[str, str | None]:
    """Return where captions are, and their column if it is named."""
    where, sign, column = given.captions.partition("=")
    return ("auto", column) if where == "column" and sign and column else (given.captions, None)

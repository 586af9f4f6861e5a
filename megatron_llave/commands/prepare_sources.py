"""The sources of `prepare`: what runs each of them; options/prepare.py has their options."""

import argparse
from typing import Any

from megatron_llave.commands.prepare_tables import print_made, print_own
from megatron_llave.commands.progress import progress_bar
from megatron_llave.errors import ConfigError
from megatron_llave.options.prepare import TRAIN
from megatron_llave.prepare import captions, columns, jsonl, mmeb, swift, vlm2vec, webdataset
from megatron_llave.prepare.openmoji import prepare
from megatron_llave.prepare.own_pairs import Options
from megatron_llave.prepare.shard_jobs import Prepared


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


SOURCES = {
    "openmoji": run_openmoji,
    "mmeb": run_mmeb,
    "folder": run_folder,
    "csv": run_csv,
    "jsonl": run_jsonl,
    "columns": run_columns,
    "swift": run_swift,
    "vlm2vec": run_vlm2vec,
    "webdataset": run_webdataset,
}
"""The function of each source."""


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

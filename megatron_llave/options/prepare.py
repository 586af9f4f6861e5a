"""The options of `llave prepare`: its sources, and what looks at what was made."""

import argparse
import os
from collections.abc import Sequence

from megatron_llave.config.data import META_TASKS, DataConfig
from megatron_llave.config.presets import PRESETS
from megatron_llave.errors import OneLineParser

CAPTION_COLUMNS = (("filepath", "title"), ("file_name", "text"), ("image", "caption"))
"""Names of the columns of image paths and captions: those of open_clip, of Hugging Face's imagefolder, and plain."""
SIDES = ("query", "target", "negative")
ROLES = (*SIDES, *(f"{side}_image" for side in SIDES), "score")
"""What a column can be; those that end in _image hold paths of images, or images."""
MMEB_SPLITS = ("original", "diverse_instruction")
"""Of MMEB-train."""
TRAIN = "train"
"""Instead of the path of a tokenizer: train one on the texts of the training pairs."""
VOCABULARY = 1200
"""Number of pieces of a tokenizer; that of the preset `tiny`."""
MAX_PIXELS = DataConfig.max_image_pixels
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description="Make training shards, inspect them, and verify them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sources(commands)
    _add_tokenizer(commands)
    clips = commands.add_parser("clips", help="short videos of moving emoji, for llave evaluate video")
    clips.add_argument("--out", required=True, metavar="DIR", help="output directory")
    clips.add_argument("--count", type=int, default=60, metavar="N", help="number of videos (60)")
    clips.add_argument("--overwrite", action="store_true", help="replace a finished output directory")
    look = commands.add_parser("inspect", help="print what a folder of shards, mined negatives or a mined order holds")
    look.add_argument("directory", metavar="DIR")
    look.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json or .model; with --preset, counts tokens")
    look.add_argument("--preset", choices=tuple(PRESETS), help="model whose tokens per image are counted")
    what = "check a folder of shards, mined negatives or a mined order, each byte of it; status 1 if any is bad"
    check = commands.add_parser("verify", help=what)
    check.add_argument("directory", metavar="DIR")
    shards = "local folder of the shards that mined negatives or an order are of, whose pairs are compared with them"
    check.add_argument("--data", metavar="SHARDS", help=shards)
    check.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"larger images are problems ({MAX_PIXELS})"
    )
    check.add_argument("--workers", type=int, default=1, metavar="N", help="number of processes (1)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)


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


def _add_mmeb(commands: Commands) -> None:
    train = commands.add_parser("mmeb", help="MMEB-train: Parquet or JSON rows, and their image folder")
    train.add_argument("--source", required=True, metavar="DIR", help="folder with SUBSET/SPLIT-*.parquet and images")
    train.add_argument("--split", choices=MMEB_SPLITS, default="original", help="split to read (original)")
    train.add_argument("--subsets", nargs="+", metavar="NAME", help="subsets to use (all in the folder)")
    train.add_argument("--limit", type=int, metavar="N", help="use only the first N rows of each subset (all)")
    _add_image_limit(train)
    _add_output(train, default_workers=DEFAULT_WORKERS)


def _add_folder(commands: Commands) -> None:
    images = commands.add_parser("folder", help="a folder of your own images with captions (docs/own_data.md)")
    images.add_argument("--source", required=True, metavar="DIR", help="folder of images, with subfolders")
    where = "auto: metadata.jsonl, captions.txt or photo.txt beside photo.jpg; names: the names of the images; "
    where += "classes: the names of their folders are their classes; column=NAME: that of metadata.jsonl (auto)"
    images.add_argument("--captions", default="auto", metavar="WHERE", help=where)
    _add_own(images, HELD_OUT)


def _add_csv(commands: Commands) -> None:
    table = commands.add_parser("csv", help="CSV or TSV files with columns of image paths and captions")
    files = "files with a line of names first; image paths are relative to their folder"
    table.add_argument("--source", required=True, nargs="+", metavar="FILE", help=files)
    known = ", ".join(" ".join(pair) for pair in CAPTION_COLUMNS)
    table.add_argument("--columns", nargs=2, default=(), metavar=("IMAGE", "CAPTION"), help=f"their names ({known})")
    _add_own(table, HELD_OUT)


def _add_jsonl(commands: Commands) -> None:
    pairs = commands.add_parser("jsonl", help="your own pairs, one JSON object per line (docs/data.md)")
    files = "JSONL files; image paths are relative to their folder"
    pairs.add_argument("--source", required=True, nargs="+", metavar="FILE", help=files)
    pairs.add_argument("--meta-task", choices=META_TASKS, default="retrieval", help="for all subsets (retrieval)")
    _add_own(pairs, 0)


def _add_columns(commands: Commands) -> None:
    table = commands.add_parser(
        "columns",
        help="columns of Parquet, Arrow, CSV or JSON, as sentence-transformers and datasets have (docs/formats.md)",
    )
    where = "tables, patterns, folders of tables, or folders of save_to_disk; each is a subset"
    table.add_argument("--source", required=True, nargs="+", metavar="PATH", help=where)
    roles = f"which column is what, of {', '.join(ROLES)} (by their names)"
    table.add_argument("--columns", nargs="+", default=(), metavar="ROLE=COLUMN", help=roles)
    _add_limit(table, "rows of each subset")
    _add_own(table, 0, "subset", "split", "images", "meta_task", "tokenizer")


def _add_swift(commands: Commands) -> None:
    lines = commands.add_parser("swift", help="embedding data of ms-swift: positive_messages (docs/formats.md)")
    lines.add_argument("--source", required=True, nargs="+", metavar="FILE", help="JSONL files; each is a subset")
    _add_limit(lines, "lines of each file")
    _add_own(lines, 0, "images", "meta_task", "tokenizer")


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


def _add_webdataset(commands: Commands) -> None:
    tars = commands.add_parser("webdataset", help="tars of images with captions, as of img2dataset (docs/formats.md)")
    where = "tars, folders of tars, and patterns such as 'data/{00000..00099}.tar'"
    tars.add_argument("--source", required=True, nargs="+", metavar="PATH", help=where)
    where = "auto: KEY.txt, or else caption of KEY.json; column=NAME: that of KEY.json (auto)"
    tars.add_argument("--captions", default="auto", metavar="WHERE", help=where)
    _add_limit(tars, "samples")
    _add_own(tars, HELD_OUT, "tokenizer")


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


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("tokenizer", help="train a tokenizer on the texts of a folder of shards, or of a file")
    train.add_argument("--source", required=True, metavar="PATH", help="folder of shards, or file with a text per line")
    train.add_argument("--out", metavar="FILE", help="SentencePiece model to write (tokenizer.model in the folder)")
    size = f"largest number of pieces; that of the model is model.language.vocab_size ({VOCABULARY})"
    train.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N", help=size)
    train.add_argument("--overwrite", action="store_true", help="replace an existing file")

"""Makes a data folder of images with captions: in a folder of images, or in CSV or TSV files; see docs/own_data.md.

tools/prepare_data.py runs this once. The query of a pair is the caption, and the target is the image.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_llave.data.image_files import IMAGE_SUFFIXES
from megatron_llave.data.items import read_jsonl
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.prepare.held_out import CAPTIONS
from megatron_llave.prepare.jsonl import default_key
from megatron_llave.prepare.openmoji.tasks import REPRESENT_IMAGE
from megatron_llave.prepare.own_pairs import Options, write_own_pairs
from megatron_llave.prepare.shard_jobs import Prepared, Progress, SourceRow, make_id
from megatron_llave.prepare.source_sides import SourceSide

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "captions.txt", "captions.csv", "captions.tsv")
"""Files that can hold the captions of a folder; the first one that is there is read."""
COLUMNS = (("filepath", "title"), ("file_name", "text"), ("image", "caption"))
"""Names of the columns of image paths and captions: those of open_clip, of Hugging Face's imagefolder, and plain."""
SOURCES = ("auto", "names")
"""Where the captions of a folder are: in files, or in the names of the images."""

Caption = tuple[str, str, str]
"""Path of an image relative to its folder, its caption or "", and where it is written, for messages."""


def prepare_folder(
    folder: str | Path,
    directory: str | Path,
    captions: str = "auto",
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make a data folder of a folder of images. An image without a caption is skipped and counted.

    Args:
        folder: images, also in subfolders, with one of CAPTION_FILES, or with `photo.txt` beside `photo.jpg`.
        directory: output directory; it is made when missing.
        captions: `auto`: as above; `names`: `red_car-01.jpg` is "red car".
        options: what else the user chooses.
        progress: called after each step.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder has no images or no captions, a file of captions is malformed, or `write_own_pairs` fails.
    """
    folder = Path(folder)
    if captions not in SOURCES:
        raise ConfigError(f"--captions {captions} must be {' or '.join(SOURCES)}")
    if not folder.is_dir():
        raise DataError(f"--source {folder} is not a folder")
    if Path(directory).resolve() == folder.resolve():
        raise ConfigError(f"--out {directory} is the folder of the images; choose another")
    file = next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)
    images = find_images(folder, Path(directory))
    if captions == "names" or file is None:
        if not images:
            raise DataError(f"{folder} has no images: no file that ends in {', '.join(sorted(IMAGE_SUFFIXES))}")
        beside = {image: image.with_suffix(".txt") for image in images}
        if captions == "auto" and not any(text.is_file() for text in beside.values()):
            raise DataError(
                f"{folder} has {len(images)} images but no captions: neither {', '.join(CAPTION_FILES)} nor photo.txt "
                "beside photo.jpg; --captions names takes them from the names of the images"
            )
    if captions == "names":
        read = partial(_from_names, folder, images)
    else:
        read = partial(_of_folder, folder, file, images) if file else partial(_from_texts, folder, beside)
    return _write([read], [folder], directory, options, progress)


def prepare_csv(
    files: Sequence[str | Path],
    directory: str | Path,
    columns: Sequence[str] = (),
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make a data folder of CSV or TSV files with a column of image paths and one of captions.

    Args:
        files: the files, each with a first line of names; image paths are relative to the folder of their file.
        directory: output directory; it is made when missing.
        columns: names of the column of image paths and of that of captions; empty: one of COLUMNS.
        options: what else the user chooses.
        progress: called after each step.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a file is malformed or lacks a column; the message has FILE:LINE; or `write_own_pairs` fails.
    """
    paths = [Path(file) for file in files]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("--source names a file twice")
    if len(set(columns)) < len(columns):
        raise ConfigError(f"--columns {' '.join(columns)}: a column cannot be both image and caption")
    parts = [partial(read_table, path, columns) for path in paths]
    return _write(parts, [path.parent for path in paths], directory, options, progress)


def _write(
    parts: Sequence[Callable[[], Iterator[Caption]]],
    folders: list[Path],
    directory: str | Path,
    options: Options,
    progress: Progress,
) -> Prepared:
    common = os.path.commonpath([folder.absolute() for folder in folders])

    def rows() -> Iterator[tuple[str, SourceRow]]:
        number = 0
        for read, folder in zip(parts, folders):
            for image, caption, where in read():
                query = SourceSide(mark_user_text(caption, 0), (), make_id(caption, []))
                target = SourceSide(REPRESENT_IMAGE, (image,), make_id("", [os.path.relpath(folder / image, common)]))
                yield CAPTIONS, SourceRow(default_key(CAPTIONS, number), where, str(folder), query, target)
                number += 1

    return write_own_pairs(rows, directory, "retrieval", options, progress)


def find_images(folder: Path, directory: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, sorted by path; hidden files and `directory` are left out."""
    inside = directory.resolve()
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and inside not in path.resolve().parents
    ]


def _from_names(folder: Path, images: list[Path]) -> Iterator[Caption]:
    for path in images:
        words = re.sub(r"[\W_]+", " ", path.stem)
        yield str(path.relative_to(folder)), re.sub(r"( \d+)+$", "", words).strip(), str(path)


def _from_texts(folder: Path, beside: dict[Path, Path]) -> Iterator[Caption]:
    for image, text in beside.items():
        caption = ""
        if text.is_file():
            try:
                caption = " ".join(text.read_text(encoding="utf-8-sig").split())
            except OSError as error:
                raise DataError(f"{text} cannot be read: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{text} is not UTF-8 text") from error
        yield str(image.relative_to(folder)), caption, str(image)


def _of_folder(folder: Path, file: Path, images: list[Path]) -> Iterator[Caption]:
    """Yield the captions of a file, and an empty one for each image of its folder that it does not name."""
    named = set()
    for image, caption, where in read_captions(file):
        named.add(os.path.normpath(folder / image))
        yield image, caption, where
    for path in images:
        if named and os.path.normpath(path) not in named:
            yield str(path.relative_to(folder)), "", str(path)


def read_captions(file: Path) -> Iterator[Caption]:
    """Yield the captions of one of CAPTION_FILES.

    Raises:
        DataError: a line is malformed; the message has FILE:LINE.
    """
    if file.suffix == ".jsonl":
        yield from _read_metadata(file)
    elif file.suffix == ".txt":
        yield from _read_lines(file)
    else:
        yield from read_table(file)


def _read_metadata(file: Path) -> Iterator[Caption]:
    for _, where, values in read_jsonl(file):
        values = values if isinstance(values, dict) else {}
        image, caption = values.get("file_name"), values.get("text", values.get("caption"))
        if not (isinstance(image, str) and image and isinstance(caption, str)):
            raise DataError(f"{where}: needs file_name and text, both strings")
        yield image, caption, where


def _read_lines(file: Path) -> Iterator[Caption]:
    """Read lines of a file name, a tab or a comma, and a caption; a first line of names (image,caption) is left out."""
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        image, separator, caption = line.strip("\r\n").partition("\t" if "\t" in line else ",")
        if not separator or not image.strip():
            raise DataError(f"{file}:{number}: needs a file name, a tab or a comma, and a caption")
        if number == 1 and (image.strip().lower(), caption.strip().lower()) in COLUMNS:
            continue
        yield image.strip(), caption.strip(), f"{file}:{number}"


def read_table(file: Path, columns: Sequence[str] = ()) -> Iterator[Caption]:
    """Yield the captions of a CSV or TSV file, whose first line has the names of its columns.

    Args:
        file: values are separated by tabs if the first line has one, else by commas, else by semicolons.
        columns: names of the column of image paths and of that of captions; empty: one of COLUMNS.

    Raises:
        DataError: a column is missing, or a line is malformed; the message has FILE:LINE.
    """
    lines = _lines(file)
    first = next(lines, "")
    separator = next((mark for mark in "\t,;" if mark in first), ",")
    names = next(csv.reader([first], delimiter=separator), [])
    names = [name.strip() for name in names]
    chosen = [columns] if columns else [pair for pair in COLUMNS if set(pair) <= set(names)]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None or len(chosen) > 1:
        wrong = "image and caption are in several" if twice is None else f"{twice!r} is the name of two"
        hint = "name one pair by --columns IMAGE CAPTION" if twice is None else "rename one"
        raise DataError(f"{file}:1: {wrong} columns of {', '.join(names)[:200]!r}; {hint}")
    if not chosen or not set(chosen[0]) <= set(names):
        needed = " and ".join(columns) or " or ".join(" and ".join(pair) for pair in COLUMNS)
        hint = "" if columns else "; --columns IMAGE CAPTION names others"
        raise DataError(f"{file}:1: the columns are {', '.join(names)[:200]!r}, but it needs {needed}{hint}")
    place, caption_place = (names.index(name) for name in chosen[0])
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for values in reader:
            where = f"{file}:{reader.line_num + 1}"
            if len(values) == len(names):
                yield values[place].strip(), values[caption_place].strip(), where
            elif values:
                hint = f"put quotation marks around a value that has {separator!r} in it"
                raise DataError(f"{where}: has {len(values)} values, but the first line has {len(names)} names; {hint}")
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num + 1}: {error}") from error


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield from stream
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text") from error

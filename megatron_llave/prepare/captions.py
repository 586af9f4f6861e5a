"""Makes a data folder of images with captions: in a folder of images, or in CSV or TSV files; see docs/own_data.md.

llave prepare runs this once. The query of a pair is the caption, and the target is the image; where folders are
classes it is the other way round.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_llave.data.image_files import IMAGE_SUFFIXES
from megatron_llave.data.items import read_jsonl
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.options.prepare import CAPTION_COLUMNS
from megatron_llave.prepare.held_out import CAPTIONS
from megatron_llave.prepare.jsonl import default_key
from megatron_llave.prepare.openmoji.tasks import REPRESENT_IMAGE
from megatron_llave.prepare.own_pairs import Options, different_paths, write_own_pairs
from megatron_llave.prepare.shard_jobs import Prepared, Progress, SourceRow, make_id
from megatron_llave.prepare.source_sides import SourceSide
from megatron_llave.prepare.tables import TEXT, open_table, read_csv, read_rows, text_lines

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.txt", "captions.csv", "captions.tsv")
"""Files that can hold the captions of a folder; the first one that is there is read."""
SOURCES = ("auto", "names", "classes")
"""Where the captions of a folder are: in files, in the names of the images, or in those of the folders they are in."""
CLASSES = "classes"
"""Name of the subset of images and their classes; the query is the image."""

Caption = tuple[str, str, str]
"""Path of an image relative to its folder, its caption or "", and where it is written, for messages."""


def prepare_folder(
    folder: str | Path,
    directory: str | Path,
    captions: str = "auto",
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
    caption_column: str | None = None,
) -> Prepared:
    """Make a data folder of a folder of images. An image without a caption is skipped and counted.

    Args:
        folder: images, also in subfolders, with one of CAPTION_FILES, or with `photo.txt` beside `photo.jpg`. Where the
            folder has no file of captions, those of its subfolders are read, as those of the splits of an imagefolder.
        directory: output directory; it is made when missing.
        captions: `auto`: as above; `names`: `red_car-01.jpg` is "red car"; `classes`: `red_car/01.jpg` is of the class
            "red car", which is the target of a classification.
        options: what else the user chooses.
        progress: called after each step.
        caption_column: the key or column of the captions in metadata.jsonl or a table of captions; None: text or
            caption.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder has no images or no captions, a file of captions is malformed, or `write_own_pairs` fails.
    """
    folder = Path(folder)
    if captions not in SOURCES:
        raise ConfigError(f"--captions {captions} must be {', '.join(SOURCES)} or column=NAME")
    if not folder.is_dir():
        raise DataError(f"--source {folder} is not a folder")
    if Path(directory).resolve() == folder.resolve():
        raise ConfigError(f"--out {directory} is the folder of the images; choose another")
    images = find_images(folder, Path(directory))
    beside = {image: image.with_suffix(".txt") for image in images}
    has_texts = captions == "auto" and any(text.is_file() for text in beside.values())
    files = find_caption_files(folder, [] if has_texts else images) if captions == "auto" else []
    if caption_column is not None and not any(file.suffix != ".txt" for file in files):
        raise ConfigError(f"--captions column={caption_column} needs metadata.jsonl or a table of captions in {folder}")
    if not files and not images:
        raise DataError(f"{folder} has no images: no file that ends in {', '.join(sorted(IMAGE_SUFFIXES))}")
    if captions == "classes":
        if all(image.parent == folder for image in images):
            raise DataError(f"--captions classes needs folders of images in {folder}, whose names are the classes")
        return _write([partial(_from_folders, folder, images)], [folder], directory, options, progress, CLASSES)
    if not files and not has_texts and captions == "auto":
        raise DataError(
            f"{folder} has {len(images)} images but no captions: neither {', '.join(CAPTION_FILES)} nor photo.txt "
            "beside photo.jpg; --captions names takes them from the names of the images, and --captions classes "
            "takes the names of their folders as classes"
        )
    read = partial(_from_texts, folder, beside)
    if captions == "names":
        read = partial(_from_names, folder, images)
    elif files:
        read = partial(_of_folder, folder, files, images, caption_column)
    return _write([read], [folder], directory, options, progress)


def find_caption_files(folder: Path, images: Sequence[Path]) -> list[Path]:
    """Return the file of captions of a folder, or else those of the subfolders that these images are in."""
    inside = sorted({parent for image in images for parent in image.parents if folder in parent.parents})
    found = [[place / name for name in CAPTION_FILES if (place / name).is_file()][:1] for place in [folder, *inside]]
    return found[0] or [file for files in found for file in files]


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
        columns: names of the column of image paths and of that of captions; empty: one of CAPTION_COLUMNS.
        options: what else the user chooses.
        progress: called after each step.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a file is malformed or lacks a column; the message has FILE:LINE; or `write_own_pairs` fails.
    """
    paths = different_paths(files)
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
    subset: str = CAPTIONS,
) -> Prepared:
    is_class = subset == CLASSES
    if options.target_prompt is None and not is_class:
        options = replace(options, target_prompt=REPRESENT_IMAGE)
    elif is_class:
        options = replace(options, query_prompt=options.query_prompt or REPRESENT_IMAGE)
    common = os.path.commonpath([folder.absolute() for folder in folders])

    def rows() -> Iterator[tuple[str, SourceRow]]:
        number = 0
        for read, folder in zip(parts, folders):
            for image, caption, where in read():
                text = SourceSide(mark_user_text(caption, 0), (), make_id(caption, []))
                picture = SourceSide("", (image,), make_id("", [os.path.relpath(folder / image, common)]))
                sides = (picture, text) if is_class else (text, picture)
                yield subset, SourceRow(default_key(subset, number), where, str(folder), *sides)
                number += 1

    return write_own_pairs(rows, directory, "classification" if is_class else "retrieval", options, progress)


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


def _from_folders(folder: Path, images: list[Path]) -> Iterator[Caption]:
    """Yield as caption of each image the name of its folder; one that lies in none has no caption."""
    for path in images:
        name = path.parent.name if path.parent != folder else ""
        yield str(path.relative_to(folder)), re.sub(r"[\W_]+", " ", name).strip(), str(path)


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


def _of_folder(folder: Path, files: list[Path], images: list[Path], column: str | None) -> Iterator[Caption]:
    """Yield the captions of files, and an empty one for each image of the folder that they do not name."""
    named = set()
    for file in files:
        start = os.path.relpath(file.parent, folder)
        for image, caption, where in read_captions(file, column):
            named.add(os.path.normpath(file.parent / image))
            yield image if start == "." else os.path.join(start, image), caption, where
    for path in images:
        if named and os.path.normpath(path) not in named:
            yield str(path.relative_to(folder)), "", str(path)


def read_captions(file: Path, column: str | None = None) -> Iterator[Caption]:
    """Yield the captions of one of CAPTION_FILES; `column` is as in `prepare_folder`.

    Raises:
        DataError: a line is malformed; the message has FILE:LINE.
    """
    if file.suffix == ".jsonl":
        yield from _read_metadata(file, column)
    elif file.suffix == ".txt":
        yield from _read_lines(file)
    else:
        yield from read_table(file, () if column is None else (_image_column(file), column))


def _image_column(file: Path) -> str:
    """Return the column of image paths of a table with another column of captions than those of CAPTION_COLUMNS."""
    names = _names_and_rows(file)[0]
    return next((image for image, _ in CAPTION_COLUMNS if image in names), CAPTION_COLUMNS[1][0])


def _read_metadata(file: Path, column: str | None) -> Iterator[Caption]:
    for _, where, values in read_jsonl(file):
        values = values if isinstance(values, dict) else {}
        keys = [key for key in ((column,) if column else ("text", "caption")) if key in values]
        given = [values[key] for key in keys if values[key] is not None] or [""] * bool(keys)  # null: no caption
        image, caption = values.get("file_name"), given[0] if given else None
        if not (isinstance(image, str) and image and isinstance(caption, str)):
            raise DataError(f"{where}: needs file_name and {column or 'text'}, both strings")
        yield image, caption, where


def _read_lines(file: Path) -> Iterator[Caption]:
    """Read lines of a file name, a tab or a comma, and a caption; a first line of names (image,caption) is left out."""
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        image, separator, caption = line.strip("\r\n").partition("\t" if "\t" in line else ",")
        if not separator or not image.strip():
            raise DataError(f"{file}:{number}: needs a file name, a tab or a comma, and a caption")
        if number == 1 and (image.strip().lower(), caption.strip().lower()) in CAPTION_COLUMNS:
            continue
        yield image.strip(), caption.strip(), f"{file}:{number}"


def read_table(file: Path, columns: Sequence[str] = ()) -> Iterator[Caption]:
    """Yield the captions of a CSV or TSV file, whose first line has the names of its columns, or of a Parquet file.

    Args:
        file: the file.
        columns: names of the column of image paths and of that of captions; empty: one of CAPTION_COLUMNS.

    Raises:
        DataError: a column is missing, or a line is malformed; the message has the file, and the line if it has lines.
    """
    names, rows = _names_and_rows(file)
    start = file if file.suffix == ".parquet" else f"{file}:1"
    chosen = [columns] if columns else [pair for pair in CAPTION_COLUMNS if set(pair) <= set(names)]
    shown = ", ".join(names)[:200]
    if len(chosen) > 1:
        hint = "name one pair by --columns IMAGE CAPTION"
        raise DataError(f"{start}: image and caption are in several columns of {shown!r}; {hint}")
    if not chosen or not set(chosen[0]) <= set(names):
        needed = " and ".join(columns) or " or ".join(" and ".join(pair) for pair in CAPTION_COLUMNS)
        hint = "" if columns else "; --columns IMAGE CAPTION names others"
        raise DataError(f"{start}: the columns are {shown!r}, but it needs {needed}{hint}")
    place, caption_place = (names.index(name) for name in chosen[0])
    yield from ((values[place], values[caption_place], where) for where, values in rows)


def _names_and_rows(file: Path) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """Return the columns of texts of a table, and where each row is and its values, "" where it has none."""
    if file.suffix != ".parquet":
        return read_csv(file)
    table = open_table(file)
    names = [name for name, kind in table.kinds.items() if kind == TEXT or name in table.classes]
    return names, ((where, [row[name] or "" for name in names]) for where, row in read_rows(table, names))

"""Makes a data folder of WebDataset tars of images with captions, as img2dataset writes them.

`prepare webdataset` runs this once. A sample is a run of members whose names are equal up to the first dot: KEY.jpg and
KEY.txt, or a caption in KEY.json. The query of a pair is the caption, and the target is the image. Only the headers and
the captions are read here; the processes that write the shards read the images where they lie.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from megatron_llave.data.image_files import IMAGE_SUFFIXES
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.data.tar_members import BLOCK, NAME, NOTE
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import parse_json
from megatron_llave.prepare.held_out import CAPTIONS
from megatron_llave.prepare.jsonl import default_key
from megatron_llave.prepare.openmoji.tasks import REPRESENT_IMAGE
from megatron_llave.prepare.own_pairs import Options, write_own_pairs
from megatron_llave.prepare.shard_jobs import Prepared, Progress, SourceRow, check_limit, faulty_row, make_id
from megatron_llave.prepare.source_sides import SourceSide
from megatron_llave.prepare.stored_images import TarMember, unreadable

MOST_TARS = 1_000_000
MOST_CAPTION_BYTES = 2**24
"""The largest .txt or .json that is read."""
URL = re.compile(r"(?!file:)(?:[A-Za-z][A-Za-z0-9+.-]+://|pipe:)")


@dataclass
class Sample:
    """The members of a sample that make a pair."""

    key: str
    images: list[TarMember] = field(default_factory=list)
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size of the .txt and of the .json."""


def prepare(
    sources: Sequence[str | Path],
    directory: str | Path,
    caption: str | None = None,
    limit: int | None = None,
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make shards, index and report of tars, and the evaluation sets and the tokenizer that `options` ask for.

    Args:
        sources: tars, folders of tars, and patterns with braces ({00000..00099}) or `*`.
        directory: output directory; it is made when missing.
        caption: the key of the .json that has the caption; None: the .txt, and `caption` of the .json where there is
            no .txt.
        limit: the number of samples to take from the beginning; None: all.
        options: what else the user chooses.
        progress: called after each step.

    Raises:
        ConfigError: an argument is out of range, or names no tar.
        DataError: a tar cannot be read at all; no sample is a pair; or `write_own_pairs` fails.
    """
    check_limit(limit)
    tars = find_tars(sources)
    if options.target_prompt is None:
        options = replace(options, target_prompt=REPRESENT_IMAGE)

    def rows() -> Iterator[tuple[str, SourceRow]]:
        samples = (pair for tar in tars for pair in read_pairs(tar, caption))
        for number, row in enumerate(islice(samples, limit)):
            yield CAPTIONS, replace(row, key=default_key(CAPTIONS, number))

    return write_own_pairs(rows, directory, "retrieval", options, progress)


def find_tars(sources: Sequence[str | Path]) -> list[Path]:
    """Return the tars that files, folders and patterns name, in order.

    Raises:
        ConfigError: a source is a URL, names nothing, or names too much or something twice.
    """
    tars: list[Path] = []
    for source in map(str, sources):
        if URL.match(source):
            raise ConfigError(f"--source {source} is on the network; download the tars, and name the files")
        try:
            written = list(islice(braceexpand(source.removeprefix("file:")), MOST_TARS + 1))
        except UnbalancedBracesError as error:
            raise ConfigError(f"--source {source}: {error}") from error
        for name in written:
            path = Path(name)
            found = (
                [path] if os.path.isfile(path) else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            )
            if os.path.isdir(path):
                found = sorted(path.rglob("*.tar"))
            if not found:
                raise ConfigError(f"--source {name} is no tar, no folder of tars, and no pattern that names one")
            tars += found
    if len(tars) > MOST_TARS or len({tar.resolve() for tar in tars}) < len(tars):
        raise ConfigError(f"--source names a tar twice, or more than {MOST_TARS} of them")
    return tars


def read_pairs(tar: Path, caption: str | None = None) -> Iterator[SourceRow]:
    """Yield the samples of a tar as pairs without a key; one that cannot be a pair has its `fault`.

    A tar that is cut short gives the samples before the cut, and a row with the fault.

    Raises:
        DataError: the file cannot be opened, or is no tar.
    """
    try:
        with open(tar, "rb") as file:
            try:
                for sample in find_samples(file, tar):
                    yield _to_row(sample, file, tar, caption)
            except (tarfile.TarError, EOFError, ValueError) as error:
                yield faulty_row(
                    "",
                    str(tar),
                    str(tar.parent),
                    f"the tar is damaged, cut short, or compressed ({error}); download it again, or decompress it",
                )
    except OSError as error:
        raise unreadable(tar, error) from error


def find_samples(file: BinaryIO, tar: Path) -> Iterator[Sample]:
    """Yield the samples of an open tar; folders, links, and members of other kinds are left out.

    Raises:
        OSError, tarfile.TarError, EOFError, ValueError: it cannot be read on.
    """
    sample: Sample | None = None
    size = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as members:
        for member in members:
            members.members = []  # tarfile would keep them all
            parts = NAME.fullmatch(member.name)
            if not member.isreg() or parts is None or NOTE.match(member.name):
                continue
            if sample is not None and parts[1] != sample.key:
                yield sample
                sample = None
            sample = sample or Sample(parts[1])
            if member.offset_data + member.size > size:
                raise EOFError(f"{member.name} ends behind the end of the file")
            if f".{parts[2].lower()}" in IMAGE_SUFFIXES:
                sample.images.append(TarMember(str(tar), member.name, member.offset_data, member.size))
            elif parts[2].lower() in ("txt", "json"):
                sample.texts[parts[2].lower()] = (member.offset_data, member.size)
        end = members.offset
    if sample is not None:
        yield sample
    file.seek(end)
    # tarfile takes a damaged header, and the end of a file that is cut there, for the end of the archive.
    rest = file.read(BLOCK)
    if len(rest) < 512 or any(block.strip(b"\0") for block in chain([rest], iter(lambda: file.read(BLOCK), b""))):
        raise EOFError("what is behind the last readable member is no end of a tar")


def _to_row(sample: Sample, file: BinaryIO, tar: Path, key: str | None) -> SourceRow:
    where, folder = f"{tar}: {sample.key}", str(tar.parent)
    try:
        text = _caption(sample, file, where, key)
    except DataError as error:
        return faulty_row("", where, folder, str(error))
    if len(sample.images) != 1:
        found = ", ".join(image.name for image in sample.images) or "none"
        return faulty_row("", where, folder, f"a sample must have one image, but its images are: {found}")
    query = SourceSide(mark_user_text(text, 0), (), make_id(text, []))
    return SourceRow("", where, folder, query, SourceSide("", (sample.images[0],)))


def _caption(sample: Sample, file: BinaryIO, where: str, key: str | None) -> str:
    """Return the caption of a sample; "" where there is none."""
    kind = "txt" if key is None and "txt" in sample.texts else "json"
    if kind not in sample.texts:
        return ""
    offset, size = sample.texts[kind]
    if size > MOST_CAPTION_BYTES:
        raise DataError(f"{where}.{kind} has {size} bytes, more than the {MOST_CAPTION_BYTES} that are read")
    data = os.pread(file.fileno(), size, offset)
    if kind == "txt":
        try:
            return " ".join(data.decode("utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise DataError(f"{where}.txt is not UTF-8 text") from error
    values = parse_json(data, f"{where}.json")
    values = values if isinstance(values, dict) else {}
    if key is not None and key not in values:
        raise DataError(f"{where}.json has no {key!r}; its keys are {', '.join(values)[:300] or 'none'}")
    text = values.get(key or "caption")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}.json: {key or 'caption'} must be a text, not {text!r:.60}")
    return text or ""

"""Makes shards of pairs whose images are files, for the sources mmeb, jsonl, folder and csv of tools/prepare_data.py.

A source yields rows. They are cut into jobs here, each of which reads the images of PAIRS_PER_SHARD rows and writes one
shard. Each finished shard has a sidecar file `SHARD.tar.done`, so that the same command can resume after it was killed.
When all shards are finished, the report of what was dropped and `index.json` are written, and the sidecars are removed.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_llave.batch import Pair, Side, check_text
from megatron_llave.data.image_files import BadImageError, ImageSettings, TooLargeError, decode_image, open_image
from megatron_llave.data.index import Index, Shard, Subset, check_size, fill_folder, parse_shard, write_index
from megatron_llave.data.shards import write_shard
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet
from megatron_llave.files import atomic_write, read_json, write_json
from megatron_llave.prepare.worker_pool import run_in_order, worker_pool

PAIRS_PER_SHARD = 1000
"""Number of rows that make one shard. The shard holds fewer pairs if some rows were skipped."""
REPORT_FILE = "report.jsonl"
AGAIN = "the same command resumes after the shards that are finished"
JOBS_PER_WORKER = 4
"""Number of jobs that are submitted ahead, so that workers never wait and not all rows are in memory at once."""
SIDECAR_VERSION = 2
"""A part of every fingerprint. It must be raised when the way of making shards changes."""

MISSING = "missing image"
CORRUPT = "corrupt image"
TOO_LARGE = "image too large"
OUTSIDE = "image path outside the source"
IS_URL = "image is a URL"
EMPTY = "empty side"
BAD_TEXT = "text is not Unicode"
HARD_NEGATIVE = "hard negative left out: "
"""Prefix of the reason when only a hard negative is dropped and the pair itself is kept."""
NOTICED = "noticed: "
"""Prefix of the reason when nothing is dropped: an image loses something when it is read (data.image_files)."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number of steps done, and the number of all steps."""


@dataclass(frozen=True)
class SourceSide:
    """A query, target or hard negative as the source describes it; `is_video` and `seconds` are those of a Side."""

    text: str
    images: tuple[str, ...]
    """Image paths as they are written in the source."""
    id: str
    """Equal ids mean equal queries or equal targets."""
    is_video: bool = False
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class SourceRow:
    """A pair as the source describes it."""

    key: str
    """The key of the pair in its shard."""
    row: int | str
    """The position of the row in the source, for the report."""
    folder: str
    """The folder that its image paths are relative to."""
    query: SourceSide
    target: SourceSide
    hard_negatives: tuple[SourceSide, ...] = ()


@dataclass(frozen=True)
class ShardJob:
    """What a worker process needs to know to write one shard."""

    directory: str
    subset: str
    number: int
    """Number of the shard in its subset."""
    rows: tuple[SourceRow, ...]
    is_confined: bool
    """Whether image paths must stay inside the folder of the rows."""
    max_pixels: int


@dataclass(frozen=True)
class FinishedShard:
    """The result of a ShardJob."""

    subset: str
    file: str
    """File name of the shard."""
    shard: Shard | None
    """The index's entry for the shard; None if every row was skipped."""
    skipped: list[dict[str, Any]]
    """Lines of the report, each with subset, row, reason and detail; also of what was noticed."""


@dataclass(frozen=True)
class Prepared:
    """The result of preparing a source."""

    index: Index
    skipped: dict[str, Counter[str]]
    """For each subset, how often something was dropped for each reason."""
    noticed: dict[str, Counter[str]]
    """For each subset, how many of its images had transparency, more than 8 bits per channel, or one colour."""
    evaluation: tuple[EvaluationSet, ...] = ()
    """The evaluation sets of held-out pairs."""


class _LeftOutError(DataError):
    """A query, target or hard negative cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def check_arguments(workers: int, max_pixels: int) -> None:
    """Raise a ConfigError unless both arguments are at least 1."""
    if workers < 1 or max_pixels < 1:
        raise ConfigError(f"--workers {workers} and --max-pixels {max_pixels} must both be at least 1")


def make_id(text: str, images: Iterable[str]) -> str:
    """Return an id that depends on text and image paths alone: a readable beginning, then a hash of 64 bits."""
    images = list(images)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(images[0]).stem if images else text)[:24].strip("-")
    digest = hashlib.blake2b(json.dumps([text, images]).encode(), digest_size=8).hexdigest()
    return f"{readable}-{digest}" if readable else digest


def cut_into_jobs(
    directory: str | Path, subset: str, rows: Iterable[SourceRow], is_confined: bool, max_pixels: int
) -> Iterator[ShardJob]:
    """Yield jobs of PAIRS_PER_SHARD rows each from the rows of one subset."""
    stream = iter(rows)
    number = 0
    while rows_of_shard := tuple(islice(stream, PAIRS_PER_SHARD)):
        yield ShardJob(str(directory), subset, number, rows_of_shard, is_confined, max_pixels)
        number += 1


def write_shards(
    jobs: Iterable[ShardJob],
    num_jobs: int,
    directory: str | Path,
    meta_tasks: Mapping[str, str],
    workers: int,
    overwrite: bool,
    progress: Progress,
    write_rest: Callable[[], list[dict[str, Any]]] = list,
) -> Prepared:
    """Do all jobs, then write report and index. The written bytes depend on neither `workers` nor interruptions.

    Args:
        jobs: the jobs; those of one subset are in order.
        num_jobs: number of jobs.
        directory: output directory; it is made when missing.
        meta_tasks: the meta-task of each subset, in the order of the index.
        workers: number of worker processes; 1: no worker processes.
        overwrite: replace a finished folder.
        progress: called after each shard.
        write_rest: writes what else belongs into the folder, and returns lines for the report.

    Raises:
        DataError: the folder is finished already, or another process is writing into it; no pair of a subset can be
            used; a file cannot be read or written; or a worker was killed. Except in the first two cases the same call
            resumes after the shards that are finished.
    """
    directory = Path(directory)
    try:
        with fill_folder(directory, overwrite), worker_pool(workers) as executor:
            finished = run_in_order(executor, write_one_shard, jobs, JOBS_PER_WORKER * workers)
            return _collect(finished, num_jobs, directory, meta_tasks, progress, write_rest())
    except BrokenProcessPool as error:
        hint = f"{AGAIN}, with fewer --workers if memory is short"
        raise DataError(f"a worker making {directory} was killed; {hint}") from error
    except OSError as error:
        raise _unwritable(error.filename or directory, error) from error


def _collect(
    finished: Iterable[FinishedShard],
    num_jobs: int,
    directory: Path,
    meta_tasks: Mapping[str, str],
    progress: Progress,
    lines: list[dict[str, Any]],
) -> Prepared:
    index = Index({name: Subset(meta_task, []) for name, meta_task in meta_tasks.items()})
    skipped, noticed = ({name: Counter() for name in meta_tasks} for _ in range(2))
    files: set[str] = set()
    progress("shards", 0, num_jobs)
    file = directory / REPORT_FILE
    with atomic_write(file, only_writer=True) as temporary, open(temporary, "w", encoding="utf-8") as report:
        for done, result in enumerate(finished, start=1):
            files.add(result.file)
            if result.shard:
                index.subsets[result.subset].shards.append(result.shard)
            lines += result.skipped
            for line in lines:
                report.write(json.dumps(line) + "\n")
                count_reason(line, skipped, noticed)
            lines = []
            left_out = sum(reasons.total() for reasons in skipped.values())
            progress(f"shards ({left_out} left out)" if left_out else "shards", done, num_jobs)
    for name, subset in index.subsets.items():
        if not subset.shards:
            counts = [f"{count} x {reason}" for reason, count in skipped[name].most_common()]
            why = ", ".join(counts) or "it has no rows"
            raise DataError(f"nothing is left of subset {name}: {why}; see {file}")
    _finish(directory, files, index)
    return Prepared(index, skipped, noticed)


def count_reason(line: dict[str, Any], skipped: dict[str, Counter[str]], noticed: dict[str, Counter[str]]) -> None:
    """Count a line of the report under its subset, as something that was dropped or as something that was noticed."""
    reason = line["reason"]
    counts = noticed if reason.startswith(NOTICED) else skipped
    counts.setdefault(line["subset"], Counter())[reason.removeprefix(NOTICED)] += 1


def _finish(directory: Path, files: set[str], index: Index) -> None:
    """Remove what runs with other arguments have left, write the index, and remove the sidecars."""
    sidecars = list(directory.glob("*.tar.done"))
    for sidecar in sidecars:
        if sidecar.stem not in files:
            sidecar.with_suffix("").unlink(missing_ok=True)
    for left_behind in directory.glob(".*.partial"):
        left_behind.unlink()
    write_index(directory, index)
    for sidecar in sidecars:
        sidecar.unlink()


def write_one_shard(job: ShardJob) -> FinishedShard:
    """Read the images of a job's rows and write its shard, then its sidecar, unless both exist already.

    Raises:
        DataError: a file cannot be written, or the storage fails while an image is read.
    """
    path = Path(job.directory) / f"{job.subset}-{job.number:06d}.tar"
    sidecar = path.with_name(f"{path.name}.done")
    fingerprint = _fingerprint(job)
    finished = _read_sidecar(sidecar, job, fingerprint)
    if finished:
        return finished
    skipped: list[dict[str, Any]] = []
    pairs = read_pairs(job, skipped)
    try:
        sidecar.unlink(missing_ok=True)
        first = next(pairs, None)
        shard = write_shard(chain([first], pairs), job.directory, job.subset, job.number) if first else None
        if shard is None:
            path.unlink(missing_ok=True)
        result = {"shard": asdict(shard) if shard else None, "skipped": skipped}
        write_json(sidecar, {"fingerprint": fingerprint, **result}, only_writer=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    return FinishedShard(job.subset, path.name, shard, skipped)


def _fingerprint(job: ShardJob) -> str:
    """Return a hash of everything that the shard depends on; images count with their size and modification time."""
    arguments = SIDECAR_VERSION, PAIRS_PER_SHARD, job.subset, job.number, job.is_confined, job.max_pixels
    digest = hashlib.sha256(repr((arguments, job.rows)).encode(errors="backslashreplace"))
    for row in job.rows:
        for side in (row.query, row.target, *row.hard_negatives):
            for image in side.images:
                try:
                    status = os.stat(_locate(image, row.folder, job.is_confined))
                    state = f"{status.st_size} {status.st_mtime_ns}"
                except (OSError, ValueError):
                    state = "unusable"
                digest.update(state.encode() + b"\n")
    return digest.hexdigest()


def _read_sidecar(sidecar: Path, job: ShardJob, fingerprint: str) -> FinishedShard | None:
    """Return the result of the same job in an earlier run, or None if there is none or its shard is gone."""
    try:
        value = read_json(sidecar)
        if value["fingerprint"] != fingerprint:
            return None
        shard = parse_shard(value["shard"]) if value["shard"] else None
        if shard:
            check_size(sidecar.parent, shard)
        return FinishedShard(job.subset, sidecar.stem, shard, value["skipped"])
    except (DataError, KeyError, TypeError):  # missing, damaged, or not of the shard's size
        return None


def read_pairs(job: ShardJob, skipped: list[dict[str, Any]]) -> Iterator[Pair]:
    """Yield the pairs that can be used; `skipped` gets a line for each other one and for what images lose."""
    for row in job.rows:

        def report(reason: str, detail: str) -> None:
            skipped.append({"subset": job.subset, "row": row.row, "reason": reason, "detail": detail})

        try:
            query, notes = _read_side(row.query, "query", row, job)
            target, more = _read_side(row.target, "target", row, job)
        except _LeftOutError as error:
            report(error.reason, error.detail)
            continue
        notes += more
        negatives, ids = [], []
        for number, side in enumerate(row.hard_negatives):
            try:
                negative, more = _read_side(side, f"hard negative {number}", row, job)
            except _LeftOutError as error:
                report(HARD_NEGATIVE + error.reason, error.detail)
                continue
            negatives.append(negative)
            ids.append(side.id)
            notes += more
        for note, detail in notes:
            report(NOTICED + note, detail)
        yield Pair(row.key, job.subset, query, target, row.query.id, row.target.id, negatives, ids)


def _read_side(side: SourceSide, name: str, row: SourceRow, job: ShardJob) -> tuple[Side, list[tuple[str, str]]]:
    """Return the side with the bytes of its images, and the notes about them, each with its detail."""
    if not side.text.strip() and not side.images:
        raise _LeftOutError(EMPTY, f"{name}: neither text nor image")
    try:
        check_text(side.text)
    except DataError as error:
        raise _LeftOutError(BAD_TEXT, f"{name}: {error}") from error
    try:
        images, noticed = [], []
        for written in side.images:
            notes: list[str] = []
            images.append(_read_image(_locate(written, row.folder, job.is_confined), job.max_pixels, notes))
            noticed += [(note, f"{name}: {written!r}") for note in notes]
        if side.is_video and len({open_image(image).size for image in images}) > 1:
            raise _LeftOutError(CORRUPT, f"{side.images[0]!r} and the other frames of a video differ in size")
        return Side(side.text, images, is_video=side.is_video, seconds=side.seconds), noticed
    except _LeftOutError as error:
        raise _LeftOutError(error.reason, f"{name}: {error.detail}") from error


def _locate(image: str, folder: str, is_confined: bool) -> Path:
    """Return the file that an image path of the source names."""
    if _URL.match(image):
        raise _LeftOutError(IS_URL, f"{image[:200]!r}: download it first")
    try:
        is_name = b"\0" not in os.fsencode(image)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise _LeftOutError(MISSING, f"{image!r} cannot be the name of a file")
    path = PurePosixPath(image)
    if is_confined and (path.is_absolute() or ".." in path.parts):
        raise _LeftOutError(OUTSIDE, repr(image))
    return Path(folder, path)


def _read_image(path: Path, max_pixels: int, notes: list[str]) -> bytes:
    """Return the bytes of an image file after decoding them as training will; `notes` are those of decode_image.

    A truncated JPEG passes a look at its header and Pillow's verify().
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _LeftOutError(MISSING, f"{str(path)!r} is not a file")
        data = path.read_bytes()
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _LeftOutError(MISSING, f"{str(path)!r}: {error.strerror}") from error
        # The storage has failed, not the image: skipping it would lose pairs that are intact.
        raise DataError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from error
    try:
        decode_image(data, ImageSettings(max_pixels), notes)
    except TooLargeError as error:
        raise _LeftOutError(TOO_LARGE, f"{str(path)!r}: {error}") from error
    except BadImageError as error:
        raise _LeftOutError(CORRUPT, f"{str(path)!r}: {error}") from error
    return data


def _unwritable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error.strerror or error}; {AGAIN}")

"""Makes shards of the pairs of a source, for all sources of llave prepare but openmoji.

A source yields rows. They are cut into jobs here, each of which reads the images of PAIRS_PER_SHARD rows and writes one
shard. Each finished shard has a sidecar file `SHARD.tar.done`, so that the same command can resume after it was killed.
When all shards are finished, the report of what was dropped and `index.json` are written, and the sidecars are removed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, compress, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from megatron_llave.batch import Pair, Side
from megatron_llave.data.index import Index, Shard, Subset, check_size, fill_folder, parse_shard, write_index
from megatron_llave.data.shards import write_shard
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet
from megatron_llave.files import atomic_write, read_json, write_json
from megatron_llave.prepare.source_sides import (
    AGAIN,
    EQUAL,
    NO_PAIR,
    LeftOutError,
    SourceSide,
    content_id,
    read_side,
    state_of,
)
from megatron_llave.prepare.worker_pool import MOST_WORKERS, run_in_order, worker_pool

PAIRS_PER_SHARD = 1000
"""Number of rows that make one shard. The shard holds fewer pairs if some rows were skipped."""
REPORT_FILE = "report.jsonl"
JOBS_PER_WORKER = 4
"""Number of jobs that are submitted ahead, so that workers never wait and not all rows are in memory at once."""
SIDECAR_VERSION = 3
"""A part of every fingerprint. It must be raised when the way of making shards changes."""

HARD_NEGATIVE = "hard negative left out: "
"""Prefix of the reason when only a hard negative is dropped and the pair itself is kept."""
ONE_TARGET = "one of several targets left out: "
"""Prefix of the reason when the pair has other targets and is kept."""
NOTICED = "noticed: "
"""Prefix of the reason when nothing is dropped: an image loses something when it is read (data.image_files)."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number of steps done, and the number of all steps."""


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
    further_targets: tuple[SourceSide, ...] = ()
    """The targets after the first one, of a query with several right answers."""
    scores: tuple[float, ...] = ()
    """A score for each target and then each hard negative (batch.Pair.scores); empty: there are none."""
    fault: str = ""
    """Why the row is no pair; it is counted and listed, and the rest of it has no meaning. Empty: it is one."""

    @property
    def targets(self) -> tuple[SourceSide, ...]:
        """Return all targets."""
        return (self.target, *self.further_targets)


def faulty_row(key: str, row: int | str, folder: str, fault: str) -> SourceRow:
    """Return a row of the source that is no pair."""
    return SourceRow(key, row, folder, SourceSide("", ()), SourceSide("", ()), fault=fault)


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
    unused: tuple[str, ...] = ()
    """A line for each subset with held-out pairs that are in no evaluation set."""
    remarks: tuple[str, ...] = ()
    """Lines that say how the source was understood."""


def check_arguments(workers: int, max_pixels: int) -> None:
    """Raise a ConfigError unless both arguments are at least 1, and the workers no more than MOST_WORKERS."""
    if workers < 1 or max_pixels < 1:
        raise ConfigError(f"--workers {workers} and --max-pixels {max_pixels} must both be at least 1")
    if workers > MOST_WORKERS:
        raise ConfigError(f"--workers {workers} must be at most {MOST_WORKERS}")


def check_limit(limit: int | None) -> None:
    """Raise a ConfigError unless a number of rows is at least 1, or None."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1")


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
        for side in (row.query, *row.targets, *row.hard_negatives):
            for image in side.images:
                digest.update(state_of(image, row.folder, job.is_confined).encode() + b"\n")
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

        def read(side: SourceSide, name: str) -> tuple[Side, list[tuple[str, str]]]:
            return read_side(side, name, row.folder, job.is_confined, job.max_pixels)

        if row.fault:
            report(NO_PAIR, row.fault)
            continue
        try:
            query, notes = read(row.query, "query")
            targets, more = _read_some(row.targets, "target", read)
            if not any(isinstance(target, Read) for target in targets):
                raise targets[0]
        except LeftOutError as error:
            report(error.reason, error.detail)
            continue
        known = {side.id for side in row.targets} | {target.id for target in targets if isinstance(target, Read)}
        negatives, others = _read_some(row.hard_negatives, "hard negative", read, known - {""})
        for error, prefix in [(x, ONE_TARGET) for x in targets] + [(x, HARD_NEGATIVE) for x in negatives]:
            if isinstance(error, LeftOutError):
                report(prefix + error.reason, error.detail)
        for note, detail in notes + more + others:
            report(NOTICED + note, detail)
        kept = [isinstance(x, Read) for x in targets + negatives]
        first, *further = compress(targets, kept)
        used = list(compress(negatives, kept[len(targets) :]))
        yield Pair(
            *(row.key, job.subset, query, first.side, row.query.id or content_id(query), first.id),
            *([x.side for x in used], [x.id for x in used]),
            further_targets=[x.side for x in further],
            further_target_ids=[x.id for x in further],
            scores=list(compress(row.scores, kept)),
        )


class Read(NamedTuple):
    """A target or hard negative that can be used, and its id."""

    side: Side
    id: str


def _read_some(
    sides: Sequence[SourceSide], name: str, read: Callable, known: Iterable[str] = ()
) -> tuple[list[Read | LeftOutError], list[tuple[str, str]]]:
    """Read targets or hard negatives; in the place of one that cannot be used is the reason.

    `known` has ids that they must not have.
    """
    results, notes, ids = [], [], set(known)
    for number, side in enumerate(sides):
        where = f"{name} {number}" if name == "hard negative" or len(sides) > 1 else name
        try:
            _add_new(side.id, ids, where)
            result, more = read(side, where)
            found = side.id or content_id(result)
            if not side.id:
                _add_new(found, ids, where)
            result = Read(result, found)
            notes += more
        except LeftOutError as error:
            result = error
        results.append(result)
    return results, notes


def _add_new(side_id: str, ids: set[str], where: str) -> None:
    """Add an id to those of a pair; a LeftOutError if it is there. An empty one is not known yet."""
    if side_id in ids:
        raise LeftOutError(EQUAL, f"{where} has the id {side_id!r}")
    ids |= {side_id} - {""}


def _unwritable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error.strerror or error}; {AGAIN}")

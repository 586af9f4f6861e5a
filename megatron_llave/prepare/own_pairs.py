"""Makes a data folder of the user's own pairs: training shards, evaluation sets of held-out pairs, and a tokenizer.

The sources jsonl.py and captions.py yield rows; the rest is done here, by shard_jobs.py, held_out.py and tokenizer.py.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_llave.data.image_files import MAX_PIXELS
from megatron_llave.data.placeholders import LEADING_PLACEHOLDERS, mark_user_text
from megatron_llave.data.tokenizer import tokenizer_in
from megatron_llave.errors import DataError, require
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, remove_evaluation, write_evaluation
from megatron_llave.options.prepare import TRAIN
from megatron_llave.prepare.held_out import HeldOut, Rows, build_sets, one_of_each_group
from megatron_llave.prepare.shard_jobs import (
    PAIRS_PER_SHARD,
    Prepared,
    Progress,
    ShardJob,
    SourceRow,
    check_arguments,
    read_pairs,
    write_shards,
)
from megatron_llave.prepare.source_sides import SourceSide
from megatron_llave.prepare.tokenizer import TRAINED_FILE, copy_tokenizer, find_other, write_trained

SCORES = (
    "only data.subsets.NAME.objective: cosent and loss.soft_labels: scores use them; "
    "without these keys, each row is a right pair, also one with the score 0"
)
"""What the user is told about pairs with scores."""


@dataclass(frozen=True)
class Options:
    """What the user chooses about a data folder."""

    held_out: float = 0.0
    """Fraction of the pairs that are held out for evaluation."""
    tokenizer: str | Path | None = None
    """TRAIN, or where the tokenizer is copied from (tokenizer.find_other); None: the folder gets none."""
    workers: int = 2
    """Number of worker processes; 1: no worker processes."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are skipped."""
    overwrite: bool = False
    """Replace a finished folder."""
    query_prompt: str = ""
    """Instruction that is put before the text of each query, behind the images that come first."""
    target_prompt: str | None = None
    """The same for each target and hard negative; None: "Represent the given image." for images that have captions, and
    nothing for others."""


def different_paths(files: Sequence[str | Path]) -> list[Path]:
    """Return the files of --source.

    Raises:
        ConfigError: one is named twice, also through a link.
    """
    paths = [Path(file) for file in files]
    require(len({path.resolve() for path in paths}) == len(paths), "--source names a file twice")
    return paths


def write_own_pairs(
    rows: Rows, directory: str | Path, meta_task: str, options: Options, progress: Progress
) -> Prepared:
    """Make the folder; the same call resumes after an interruption.

    Args:
        rows: the source, which is read several times. Rows of a subset have different keys.
        directory: output directory; it is made when missing.
        meta_task: the meta-task of all subsets.
        options: see Options.
        progress: called after each step.

    Raises:
        ConfigError: an option is out of range.
        DataError: there are no pairs; too few can be held out; the tokenizer cannot be read; or `write_shards` fails.
    """
    check_arguments(options.workers, options.max_pixels)
    directory = Path(directory)
    rows = _with_prompts(rows, options.query_prompt, options.target_prompt or "")
    check_some(rows)
    other = find_other(options.tokenizer) if options.tokenizer not in (None, TRAIN) else None
    progress("reading the source", 0, 1)
    held_out = HeldOut(rows, options.held_out, same_targets=meta_task == "retrieval")
    sizes: Counter[str] = Counter()
    scored: set[str] = set()
    for subset, row in rows():
        sizes[subset] += held_out.group(row) is None
        scored |= {subset} if row.scores else set()
    sizes = +sizes  # without subsets that are held out as a whole
    if not sizes:
        raise DataError("the source has no pair for training")
    evaluated: list[EvaluationSet] = []
    unused: list[str] = []

    def write_rest() -> list[dict[str, Any]]:
        """Write evaluation sets and tokenizer; return lines for the report."""
        skipped, sets, lines = _write_evaluation(rows, held_out, directory, meta_task, options)
        evaluated.extend(sets)
        unused.extend(lines)
        if other is not None:
            copy_tokenizer(other, directory)
        elif options.tokenizer == TRAIN and (
            options.overwrite or tokenizer_in(directory) in (None, directory / TRAINED_FILE)
        ):
            texts = (
                side.text for _, row in rows() if held_out.group(row) is None for side in (row.query, *row.targets)
            )
            write_trained(texts, directory / TRAINED_FILE)
        return skipped

    meta_tasks = dict.fromkeys(sorted(sizes), meta_task)
    num_jobs = sum(-(-count // PAIRS_PER_SHARD) for count in sizes.values())
    jobs = _make_jobs(rows, held_out, str(directory), options.max_pixels)
    workers = min(options.workers, num_jobs)  # a process more would start for nothing
    made = write_shards(jobs, num_jobs, directory, meta_tasks, workers, options.overwrite, progress, write_rest)
    scored_of = ", ".join(sorted(scored & sizes.keys()))
    remarks = (f"scores of {scored_of}: {SCORES}",) if scored_of else ()
    return replace(made, evaluation=tuple(evaluated), unused=tuple(unused), remarks=remarks)


def _with_prompts(rows: Rows, of_query: str, of_target: str) -> Rows:
    """Return the source with an instruction before the text of each query, and one before the others' texts."""
    if not of_query and not of_target:
        return rows
    prompts = mark_user_text(of_query, 0), mark_user_text(of_target, 0)

    def put(sides: Sequence[SourceSide], prompt: str) -> list[SourceSide]:
        ends = [LEADING_PLACEHOLDERS.match(side.text).end() for side in sides]
        texts = [side.text[:end] + prompt + side.text[end:] for side, end in zip(sides, ends)]
        is_empty = [not side.text.strip() and not side.images for side in sides]  # it stays so, and is counted
        return [side if empty else replace(side, text=text) for side, text, empty in zip(sides, texts, is_empty)]

    def prompted() -> Iterator[tuple[str, SourceRow]]:
        for subset, row in rows():
            (query,), (target, *further) = put([row.query], prompts[0]), put(row.targets, prompts[1])
            negatives = tuple(put(row.hard_negatives, prompts[1]))
            row = replace(row, query=query, target=target, further_targets=tuple(further), hard_negatives=negatives)
            yield subset, row

    return prompted


def check_some(rows: Rows) -> None:
    """Raise a DataError with the first fault if no row of the source is a pair."""
    fault = ""
    for _, row in rows():
        if not row.fault:
            return
        fault = fault or f"{row.row}: {row.fault}; no row of the source is a pair"
    raise DataError(fault or "the source has no pair for training")


def _make_jobs(rows: Rows, held_out: HeldOut, directory: str, max_pixels: int) -> Iterator[ShardJob]:
    """Yield a job whenever a subset has enough rows for a shard, so that mixed subsets need no sorting."""
    waiting: dict[str, list[SourceRow]] = {}
    shards: Counter[str] = Counter()

    def make_job(subset: str) -> ShardJob:
        shards[subset] += 1
        return ShardJob(directory, subset, shards[subset] - 1, tuple(waiting.pop(subset)), False, max_pixels)

    for subset, row in rows():
        if held_out.group(row) is not None:
            continue
        waiting.setdefault(subset, []).append(held_out.without_negatives(row))
        if len(waiting[subset]) == PAIRS_PER_SHARD:
            yield make_job(subset)
    for subset in list(waiting):
        yield make_job(subset)


def _write_evaluation(
    rows: Rows, held_out: HeldOut, directory: Path, meta_task: str, options: Options
) -> tuple[list[dict[str, Any]], list[EvaluationSet], list[str]]:
    """Write the evaluation sets and remove older ones; return lines for the report, the sets, and what is unused."""
    remove_evaluation(directory)
    chosen: dict[str, list[SourceRow]] = {}
    groups: dict[str, dict[str, bytes]] = {}
    for subset, row in rows() if options.held_out else ():
        group = held_out.group(row)
        if group is not None:
            chosen.setdefault(subset, []).append(row)
            groups.setdefault(subset, {})[row.key] = group
    skipped: list[dict[str, Any]] = []
    pairs = {}
    for subset in sorted(chosen):
        job = ShardJob(str(directory), subset, 0, tuple(chosen[subset]), False, options.max_pixels)
        pairs[subset] = one_of_each_group(read_pairs(job, skipped), groups[subset])
    inputs, sets, unused = build_sets(pairs, meta_task)
    if sets:
        write_evaluation(directory, inputs, sets)
    elif options.held_out:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(line["reason"] for line in skipped).items())
        hint = f"mend them, or choose another --held-out than {options.held_out}"
        raise DataError(f"no subset has enough held-out pairs that can be read ({reasons or 'too few'}); {hint}")
    return skipped, sets, unused

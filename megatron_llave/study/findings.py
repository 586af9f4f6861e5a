"""What the runs of a study found, read from their folders: every run that is there, whatever seeds were asked for last.

Third step of a study. A run has an evaluation (report.json) and, unless it was merged of others, a log. A number that a
run does not have, or that was not finite, is NaN.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.errors import DataError
from megatron_llave.study.arms import START, UNTRAINED, Run, Study, run_name
from megatron_llave.study.paired import Comparison, compare
from megatron_llave.study.run_folder import EVALUATION, is_finished
from megatron_llave.training.logger import LOG_FILE, read_log

IND, OOD, ALL = "in distribution", "out of distribution", "all held out"
OUTCOMES = (ALL, IND, OOD)
"""Means of Precision@1 in percent over the evaluation sets; the first is what a study is decided by."""
OVERLAP = "overlap"
LAST_STEPS = 50
HISTOGRAMS = ("positive_histogram", "hardest_negative_histogram")

Log = list[dict[str, Any]]


def _last(name: str) -> Callable[[Log], float]:
    return lambda log: _mean(record.get(name) for record in log[-LAST_STEPS:])


TRAINING: dict[str, Callable[[Log], float]] = {
    f"loss, last {LAST_STEPS} steps": _last("loss"),
    "gradient norm, median": lambda log: _of(statistics.median, log, "gradient_norm"),
    "gradient norm, largest": lambda log: _of(max, log, "gradient_norm"),
    f"effective negatives, last {LAST_STEPS} steps": _last("effective_negatives"),
    f"overlap in the batch, last {LAST_STEPS} steps": _last("similarity_overlap"),
    "steps not finite": lambda log: float(sum(record.get("loss") is None for record in log)),
    "seconds per step, median": lambda log: _of(statistics.median, log, "seconds"),
}
"""What the log of a run says: name -> value."""


@dataclass(frozen=True)
class Finding:
    """One run, as far as it got."""

    arm: str
    seed: int
    values: Mapping[str, float]
    """OUTCOMES, OVERLAP, TRAINING; of a run that is not finished nothing."""
    sets: Mapping[str, float]
    """Evaluation set -> Precision@1 in percent."""
    histograms: tuple[np.ndarray, np.ndarray] | None
    """Queries per bin of cosine from -1 to 1: positives, hardest negatives; over the sets of the means."""
    log: Log
    problem: str = ""
    """Why it is not finished."""


def read_findings(
    out: Path, study: Study, runs: Sequence[Run], chosen: Sequence[str], failed: Mapping[str, str]
) -> list[Finding]:
    """All runs of the study's folder: those that were asked for, finished or not, and finished ones of earlier calls.

    Args:
        out: the study's folder.
        study: its arms.
        runs: that were asked for.
        chosen: evaluation sets that the means are over; none: all that are not "seen".
        failed: run -> why.
    """
    asked = {(run.arm.name, run.seed) for run in runs}
    names = dict.fromkeys([UNTRAINED, START, *(arm.name for arm in study.arms)])
    there = {(arm, seed) for arm in names for seed in _seeds_of(out, arm)}
    order = {name: place for place, name in enumerate(names)}
    findings = []
    for arm, seed in sorted(asked | there, key=lambda one: (order[one[0]], one[1])):
        folder = out / run_name(arm, seed)
        if is_finished(folder):
            try:
                findings.append(read_finding(folder, arm, seed, chosen))
            except DataError as error:
                findings.append(Finding(arm, seed, {}, {}, None, [], str(error)))
        elif (arm, seed) in asked or folder.is_dir():
            findings.append(Finding(arm, seed, {}, {}, None, [], failed.get(folder.name, "not finished")))
    return findings


def _seeds_of(out: Path, arm: str) -> list[int]:
    """Seeds with which an arm has a folder."""
    prefix = run_name(arm, 0).removesuffix("0")
    ends = [path.name.removeprefix(prefix) for path in out.glob(f"{prefix}*") if path.is_dir()]
    return [int(end) for end in ends if end.isdigit()]


def read_finding(folder: Path, arm: str, seed: int, chosen: Sequence[str]) -> Finding:
    """What a finished run's folder holds.

    Raises:
        DataError: its report or log is damaged, or lacks a chosen set.
    """
    file = folder / EVALUATION / "report.json"
    try:
        sets = {one["name"]: one for one in json.loads(file.read_text())["sets"]}
        missing = [name for name in chosen if name not in sets]
        if missing:
            raise DataError(f"{file} has no set {missing[0]!r} (evaluate.sets), only {', '.join(sets)}")
        used = [sets[name] for name in chosen] or [one for one in sets.values() if one["split"] != "seen"]
        splits = {
            IND: [one for one in used if one["split"] == "ind"],
            OOD: [one for one in used if one["split"] == "ood"],
        }
        values = {name: _mean(one["precision_at_1"] for one in some) for name, some in ({ALL: used} | splits).items()}
        values[OVERLAP] = _mean(one["overlap"] for one in used)
        counts = tuple(np.sum([one[name] for one in used], axis=0) for name in HISTOGRAMS)
        scores = {name: float(one["precision_at_1"]) for name, one in sets.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged: {type(error).__name__} {error}; remove it to evaluate again") from error
    log = read_log(folder / LOG_FILE) if (folder / LOG_FILE).is_file() else []
    values |= {name: value(log) if log else math.nan for name, value in TRAINING.items()}
    return Finding(arm, seed, values, scores, counts, log)


def _mean(values: Any) -> float:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else math.nan


def _of(reduce: Callable, log: Log, name: str) -> float:
    numbers = [record[name] for record in log if record.get(name) is not None]
    return float(reduce(numbers)) if numbers else math.nan


def by_seed(findings: Sequence[Finding], arm: str, name: str) -> dict[int, float]:
    """Seed -> value of the arm's finished runs; `name` is one of `values` or an evaluation set."""
    found = {one.seed: {**one.sets, **one.values}.get(name, math.nan) for one in findings if one.arm == arm}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def comparisons(findings: Sequence[Finding], study: Study, name: str) -> dict[str, Comparison | None]:
    """Arm -> how it compares with its reference; None: fewer than two seeds in common. Of arms that have runs."""
    there = {one.arm for one in findings}
    arms = [arm.name for arm in study.arms if arm.name in there and arm.name != study.reference_of(arm.name)]
    return {
        arm: compare(by_seed(findings, arm, name), by_seed(findings, study.reference_of(arm), name)) for arm in arms
    }

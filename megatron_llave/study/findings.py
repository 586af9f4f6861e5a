"""Reads the results of a study from the folders of all its runs, whatever seeds the last call has asked for.

This is the third step of a study. A run has an evaluation (report.json) and, unless it was merged, a log. A value that
a run does not have, or that was not finite, is NaN.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.errors import DataError
from megatron_llave.files import read_json
from megatron_llave.study.paired import Comparison, compare
from megatron_llave.study.run_folder import EVALUATION, is_finished
from megatron_llave.study.variants import START, UNTRAINED, Run, Study, run_name
from megatron_llave.training.logger import LOG_FILE, read_log

IND, OOD, ALL = "in distribution", "out of distribution", "all held out"
OUTCOMES = (ALL, IND, OOD)
"""Means of Precision@1 in percent over the evaluation sets; the first one decides a study."""
DIAGNOSTICS = {"overlap": "overlap", "margin": "margin", "AUC": "auc"}
"""Name of a mean over the evaluation sets -> key of the report, which reports of earlier versions may lack."""
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
    f"AUC in the batch, last {LAST_STEPS} steps": _last("similarity_auc"),
    "steps not finite": lambda log: float(sum(record.get("loss") is None for record in log)),
    "seconds per step, median": lambda log: _of(statistics.median, log, "seconds"),
}
"""Name of a value -> how it is computed from the log of a run."""


@dataclass(frozen=True)
class Finding:
    """The results of one run, or why there are none."""

    variant: str
    seed: int
    values: Mapping[str, float]
    """Values named in OUTCOMES, DIAGNOSTICS and TRAINING; empty for a run that is not finished."""
    sets: Mapping[str, float]
    """Evaluation set -> Precision@1 in percent."""
    histograms: tuple[np.ndarray, np.ndarray] | None
    """Queries per bin of cosine from -1 to 1, of positives and of hardest negatives, over the sets of the means."""
    log: Log
    problem: str = ""
    """Why the run is not finished, or ""."""


def read_findings(
    out: Path, study: Study, runs: Sequence[Run], chosen: Sequence[str], failed: Mapping[str, str]
) -> list[Finding]:
    """Read the runs that were asked for, finished or not, and the other runs in the study's folder.

    Args:
        out: the study's folder.
        study: the study.
        runs: runs that were asked for.
        chosen: evaluation sets over which the means are taken; empty: all sets that are not "seen".
        failed: name of a run that failed -> why it failed.
    """
    asked = {(run.variant.name, run.seed) for run in runs}
    names = dict.fromkeys([UNTRAINED, START, *(variant.name for variant in study.variants)])
    there = {(variant, seed) for variant in names for seed in _seeds_of(out, variant)}
    order = {name: place for place, name in enumerate(names)}
    findings = []
    for variant, seed in sorted(asked | there, key=lambda run: (order[run[0]], run[1])):
        folder = out / run_name(variant, seed)
        if is_finished(folder):
            try:
                findings.append(read_finding(folder, variant, seed, chosen))
            except DataError as error:
                findings.append(Finding(variant, seed, {}, {}, None, [], str(error)))
        elif (variant, seed) in asked or folder.is_dir():
            findings.append(Finding(variant, seed, {}, {}, None, [], failed.get(folder.name, "not finished")))
    return findings


def _seeds_of(out: Path, variant: str) -> list[int]:
    """Seeds for which a variant has a folder."""
    prefix = run_name(variant, 0).removesuffix("0")
    ends = [path.name.removeprefix(prefix) for path in out.glob(f"{prefix}*") if path.is_dir()]
    return [int(end) for end in ends if end.isdigit()]


def read_finding(folder: Path, variant: str, seed: int, chosen: Sequence[str]) -> Finding:
    """Read the folder of a finished run.

    Raises:
        DataError: its report or log is damaged, or lacks a chosen set.
    """
    file = folder / EVALUATION / "report.json"
    try:
        sets = {result["name"]: result for result in read_json(file)["sets"]}
    except (DataError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error
    missing = [name for name in chosen if name not in sets]
    if missing:
        raise DataError(f"{file} has no set {missing[0]!r} (evaluate.sets), only {', '.join(sets)}")
    try:
        used = [sets[name] for name in chosen] or [result for result in sets.values() if result["split"] != "seen"]
        splits = {
            IND: [result for result in used if result["split"] == "ind"],
            OOD: [result for result in used if result["split"] == "ood"],
        }
        values = {
            name: _mean(result["precision_at_1"] for result in part) for name, part in ({ALL: used} | splits).items()
        }
        values |= {name: _mean(result.get(key) for result in used) for name, key in DIAGNOSTICS.items()}
        counts = tuple(np.sum([result[name] for result in used], axis=0) for name in HISTOGRAMS)
        scores = {name: float(result["precision_at_1"]) for name, result in sets.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error
    log = read_log(folder / LOG_FILE) if (folder / LOG_FILE).is_file() else []
    values |= {name: value(log) if log else math.nan for name, value in TRAINING.items()}
    return Finding(variant, seed, values, scores, counts, log)


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is damaged: {type(error).__name__} {error}; remove it to evaluate again")


def _mean(values: Any) -> float:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else math.nan


def _of(reduce: Callable, log: Log, name: str) -> float:
    numbers = [record[name] for record in log if record.get(name) is not None]
    return float(reduce(numbers)) if numbers else math.nan


def by_seed(findings: Sequence[Finding], variant: str, name: str) -> dict[int, float]:
    """Seed -> value called `name`, one of `values` or an evaluation set, of the finished runs of a variant."""
    runs = [finding for finding in findings if finding.variant == variant]
    values = {run.seed: {**run.sets, **run.values}.get(name, math.nan) for run in runs}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def comparisons(findings: Sequence[Finding], study: Study, name: str) -> dict[str, Comparison | None]:
    """Variant that has runs -> its comparison with its reference; None with fewer than two seeds in common."""
    there = {finding.variant for finding in findings}
    variants = [
        variant.name
        for variant in study.variants
        if variant.name in there and variant.name != study.reference_of(variant.name)
    ]
    return {
        variant: compare(by_seed(findings, variant, name), by_seed(findings, study.reference_of(variant), name))
        for variant in variants
    }


def contrasts(findings: Sequence[Finding], study: Study, name: str) -> dict[str, Comparison | None]:
    """Name of each contrast whose variants all have runs -> its comparison with 0; None with fewer than two seeds."""
    there = {finding.variant for finding in findings}
    found = {}
    for contrast in study.contrasts:
        terms = [(by_seed(findings, variant, name), factor) for variant, factor in contrast.terms]
        if {variant for variant, _ in contrast.terms} <= there:
            seeds = set.intersection(*(set(values) for values, _ in terms))
            sums = {seed: sum(factor * values[seed] for values, factor in terms) for seed in seeds}
            found[contrast.name] = compare(sums, dict.fromkeys(seeds, 0.0))
    return found

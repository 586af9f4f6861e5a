"""The report of a study: report.md, runs.csv, comparisons.csv, and the pictures, written anew from what is there.

Last step of a study. Every run is listed, those that failed with their reason; nothing is left out of a mean but what
has no value, and each mean says over how many runs it is.
"""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_llave.files import write_text
from megatron_llave.loss.similarities import HISTOGRAM_BINS
from megatron_llave.report.evaluation_report import markdown_rows
from megatron_llave.report.plots import BLUE, INK, ORANGE, label_axes, plot_runs, save_png
from megatron_llave.study.arms import UNTRAINED, Study
from megatron_llave.study.findings import OUTCOMES, OVERLAP, TRAINING, Finding, Log, by_seed, comparisons
from megatron_llave.study.paired import CONFIDENCE, FEWEST_FOR_TEST

METHOD = (
    f"Differences are paired by seed (same random weights, same order of the data); the interval is a percentile "
    f"bootstrap of their mean, {CONFIDENCE:.0%}, p of the exact test that flips their signs. A difference counts as "
    f"shown where the interval excludes 0 and p is below 0.05, which takes at least {FEWEST_FOR_TEST} seeds. No "
    f"correction was made for the number of comparisons; the one that decides is Precision@1 over all held-out sets."
)

PAPER = "Beside it the paper's ablation, LLaVE-2B on all of MMEB (arXiv 2503.04812, table 3)."


def write_up(
    findings: Sequence[Finding],
    study: Study,
    out: Path,
    paper: Mapping[str, Mapping[str, float]] | None = None,
    paper_note: str = "",
) -> None:
    """Write all files into `out`, each replacing an old one whole.

    Args:
        findings: of all runs.
        study: its arms and its question.
        out: folder.
        paper: arm -> what the paper reports of it, by the name of the mean.
        paper_note: under which conditions it does.
    """
    done = [one for one in findings if not one.problem]
    arms = list(dict.fromkeys(one.arm for one in findings))
    parts = [f"# Study: {study.name}\n\n{study.question} Compared with: {study.reference}.\n"]
    parts.append(
        _section("Means over seeds", *_means(findings, arms, paper or {}), f"{PAPER} {paper_note}" if paper else "")
    )
    parts.append(_section("Against the reference", *_differences(findings, study), METHOD))
    parts.append(_section("Precision@1 of each evaluation set, means over seeds", *_sets(done, arms)))
    parts.append(_section("Every run", *_runs(findings)))
    if done:
        shown = list(dict.fromkeys(one.arm for one in done))
        plot_outcomes(done, study, shown, out / "precision.png")
        plot_similarities(done, shown, out / "similarities.png")
        plot_runs(mean_curves(done, shown), {}, out / "curves.png", "step")
        parts.append("\n![Precision@1](precision.png)\n\n![Similarities](similarities.png)\n\n![Curves](curves.png)\n")
    write_text(out / "report.md", "".join(parts))
    _write_csv(out / "runs.csv", *_run_table(findings))
    _write_csv(out / "comparisons.csv", *_comparison_table(findings, study))


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], about: str = "") -> str:
    text = f"\n## {title}\n\n" + (f"{about}\n\n" if about else "")
    return text + (markdown_rows(columns, rows) if rows else "Nothing yet.\n")


def _number(name: str, value: float) -> str:
    """Percent with one decimal, others with three digits."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if name in OUTCOMES or abs(value) >= 10 else f"{value:.3g}"


def _means(
    findings: Sequence[Finding], arms: Sequence[str], paper: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm in arms:
        runs = [one for one in findings if one.arm == arm]
        cells = []
        for name in (*OUTCOMES, OVERLAP, *TRAINING):
            values = list(by_seed(findings, arm, name).values())
            is_spread = len(values) > 1 and name in OUTCOMES
            spread = f" ± {statistics.stdev(values):.1f}" if is_spread else ""
            cells.append(_number(name, statistics.fmean(values)) + spread if values else "-")
        reported = [_number(name, paper.get(arm, {}).get(name, math.nan)) for name in OUTCOMES if paper]
        finished = f"{sum(not one.problem for one in runs)} of {len(runs)}"
        rows.append([arm, finished, *cells[: len(OUTCOMES)], *reported, *cells[len(OUTCOMES) :]])
    heads = [f"paper: {name}" for name in OUTCOMES if paper]
    return ["arm", "runs", *OUTCOMES, *heads, OVERLAP, *TRAINING], rows


def _differences(findings: Sequence[Finding], study: Study) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name in OUTCOMES:
        for arm, found in comparisons(findings, study, name).items():
            pair = [name, arm, study.reference_of(arm)]
            if found is None:
                rows.append([*pair, "-", "-", "-", "-", "-", "fewer than two seeds in common"])
                continue
            interval = f"{found.low:+.1f} to {found.high:+.1f}"
            signs = f"{sum(x > 0 for x in found.differences)} up, {sum(x < 0 for x in found.differences)} down"
            values = [f"{found.mean:+.1f}", interval, signs, f"{found.p_value:.3f}", found.verdict]
            rows.append([*pair, str(len(found.differences)), *values])
    heads = ["mean difference", f"{CONFIDENCE:.0%} interval", "signs", "p", "verdict"]
    return ["Precision@1", "arm", "against", "seeds", *heads], rows


def _sets(done: Sequence[Finding], arms: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for one in done for name in one.sets))
    rows = []
    for name in names:
        values = [list(by_seed(done, arm, name).values()) for arm in arms]
        rows.append([name, *(f"{statistics.fmean(some):.1f}" if some else "-" for some in values)])
    return ["set", *arms], rows


def _runs(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    names = [*OUTCOMES, OVERLAP, *TRAINING]
    rows = []
    for one in findings:
        values = [_number(name, one.values.get(name, math.nan)) for name in names]
        rows.append([one.arm, str(one.seed), *values, one.problem or "finished"])
    return ["arm", "seed", *names, "state"], rows


def _run_table(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    names = [*OUTCOMES, OVERLAP, *TRAINING]
    sets = list(dict.fromkeys(name for one in findings for name in one.sets))
    rows = []
    for one in findings:
        values = [one.values.get(name, math.nan) for name in names] + [one.sets.get(name, math.nan) for name in sets]
        rows.append([one.arm, str(one.seed), one.problem, *("" if math.isnan(x) else f"{x:.6g}" for x in values)])
    return ["arm", "seed", "problem", *names, *sets], rows


def _comparison_table(findings: Sequence[Finding], study: Study) -> tuple[list[str], list[list[str]]]:
    """Of every number, not of the outcomes alone."""
    sets = list(dict.fromkeys(name for one in findings for name in one.sets))
    rows = []
    for name in (*OUTCOMES, OVERLAP, *TRAINING, *sets):
        for arm, found in comparisons(findings, study, name).items():
            if found is not None:
                numbers = (found.mean, found.low, found.high, found.p_value)
                differences = " ".join(f"{x:.6g}" for x in found.differences)
                rows.append([name, arm, study.reference_of(arm), *(f"{x:.6g}" for x in numbers), differences])
    return ["number", "arm", "reference", "mean difference", "low", "high", "p", "differences by seed"], rows


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def plot_outcomes(done: Sequence[Finding], study: Study, arms: Sequence[str], path: Path) -> None:
    """Two panels as a PNG: Precision@1 of every run by arm, and the differences from the reference with intervals."""
    figure = Figure(figsize=(13, 1.8 + 0.5 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = {arm: place for place, arm in enumerate(arms)}
    for name, colour, shift in zip(OUTCOMES, (INK, BLUE, ORANGE), (-0.22, 0, 0.22)):
        found = comparisons(done, study, name)
        for arm, place in places.items():
            values = list(by_seed(done, arm, name).values())
            left.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.4, markersize=5, mew=0)
            if values:
                left.plot(statistics.fmean(values), place + shift, "|", color=colour, markersize=12, mew=2.5)
            one = found.get(arm)
            if one is not None:
                right.plot([one.low, one.high], [place + shift] * 2, color=colour, linewidth=2)
                face = colour if len(one.differences) >= FEWEST_FOR_TEST else "white"
                right.plot(one.mean, place + shift, "o", color=colour, markerfacecolor=face, markersize=6)
        left.plot([], [], "o", color=colour, label=name)
    right.axvline(0, color=INK, linewidth=1)
    left.set_yticks(list(places.values()), list(places), fontsize=9)
    left.set_ylim(len(arms) - 0.5, -0.5)
    label_axes(left, "Precision@1: a dot per seed, a bar for the mean", "", "percent")
    others = {study.reference_of(arm.name) for arm in study.arms if arm.name in places}
    against = study.reference if len(others) == 1 else "its reference"
    title = f"difference from {against}, {CONFIDENCE:.0%} interval; hollow: few seeds"
    label_axes(right, title, "", "points")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save_png(figure, path)


def plot_similarities(done: Sequence[Finding], arms: Sequence[str], path: Path) -> None:
    """A panel per arm as a PNG: cosine of positives and of hardest negatives, over all its runs' evaluation queries."""
    arms = sorted(arms, key=lambda arm: arm != UNTRAINED)  # before training first
    across = min(4, max(1, len(arms)))
    down = max(1, -(-len(arms) // across))
    figure = Figure(figsize=(0.8 + 3.3 * across, 0.9 + 2.5 * down), layout="constrained")
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    axes = None
    for index, arm in enumerate(arms):
        axes = figure.add_subplot(down, across, index + 1, sharey=axes)
        runs = [one for one in done if one.arm == arm]
        for side, (colour, label) in enumerate(((BLUE, "positive"), (ORANGE, "hardest negative"))):
            counts = np.sum([one.histograms[side] for one in runs], axis=0)
            shares = 100 * counts / max(1, counts.sum())
            axes.stairs(shares, edges, fill=True, facecolor=(colour, 0.35), edgecolor=colour, label=label)
        overlap = statistics.fmean(one.values[OVERLAP] for one in runs)
        label_axes(axes, f"{arm}\noverlap {overlap:.2f}, {len(runs)} run{'s' * (len(runs) > 1)}", "", "")
        if index % across == 0:
            axes.set_ylabel("share of queries (%)")
        if index + across >= len(arms):
            axes.set_xlabel("cosine similarity")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_png(figure, path)


def mean_curves(done: Sequence[Finding], arms: Sequence[str]) -> dict[str, Log]:
    """Arm -> a record per step, each number the mean over the arm's runs; of arms that were trained."""
    curves = {}
    for arm in arms:
        logs = [one.log for one in done if one.arm == arm and len(one.log) > 1]
        if logs:
            curves[arm] = [_mean_record(records) for records in zip(*logs)]
    return curves


def _mean_record(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of one step; what was not finite in a run does not count."""
    names = [name for name, value in records[0].items() if isinstance(value, int | float) or value is None]
    values = {name: [one[name] for one in records if one.get(name) is not None] for name in names}
    return {name: statistics.fmean(some) for name, some in values.items() if some}

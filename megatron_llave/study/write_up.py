"""Writes the report of a study: report.md, runs.csv, comparisons.csv and figures.

This is the last step of a study. Every run is listed, failed ones with their reason. A mean leaves out only runs that
have no value, and the report tells over how many runs it is.
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

from megatron_llave.config.redact import without_secrets
from megatron_llave.files import write_text
from megatron_llave.loss.similarities import HISTOGRAM_BINS
from megatron_llave.report.evaluation_report import markdown_rows
from megatron_llave.report.palette import BLUE, INK, ORANGE
from megatron_llave.report.plots import label_axes, plot_runs, save_png
from megatron_llave.study.findings import DIAGNOSTICS, OUTCOMES, TRAINING, Finding, Log, by_seed, comparisons, contrasts
from megatron_llave.study.paired import CONFIDENCE, FEWEST_FOR_TEST, Comparison
from megatron_llave.study.variants import UNTRAINED, Study

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
    """Write all files into the folder `out`.

    Args:
        findings: the results of all runs.
        study: the study.
        out: the study's folder.
        paper: variant -> name of a mean -> its value in the paper.
        paper_note: conditions of the paper's values.
    """
    done = [run for run in findings if not run.problem]
    variants = list(dict.fromkeys(run.variant for run in findings))
    parts = [f"# Study: {study.name}\n\n{study.question} Compared with: {study.reference}.\n"]
    parts.append(
        _section("Means over seeds", *_means(findings, variants, paper or {}), f"{PAPER} {paper_note}" if paper else "")
    )
    parts.append(_section("Against the reference", *_differences(findings, study), METHOD))
    if study.contrasts:
        parts.append(_section("Further comparisons", *_contrasts(findings, study)))
    parts.append(_section("Precision@1 of each evaluation set, means over seeds", *_sets(done, variants)))
    parts.append(_section("Every run", *_runs(findings)))
    if done:
        shown = list(dict.fromkeys(run.variant for run in done))
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
    """A percentage with one decimal, another number with three digits."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if name in OUTCOMES or abs(value) >= 10 else f"{value:.3g}"


def _means(
    findings: Sequence[Finding], variants: Sequence[str], paper: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for variant in variants:
        runs = [run for run in findings if run.variant == variant]
        cells = []
        for name in (*OUTCOMES, *DIAGNOSTICS, *TRAINING):
            values = list(by_seed(findings, variant, name).values())
            is_spread = len(values) > 1 and name in OUTCOMES
            spread = f" ± {statistics.stdev(values):.1f}" if is_spread else ""
            cells.append(_number(name, statistics.fmean(values)) + spread if values else "-")
        reported = [_number(name, paper.get(variant, {}).get(name, math.nan)) for name in OUTCOMES if paper]
        finished = f"{sum(not run.problem for run in runs)} of {len(runs)}"
        rows.append([variant, finished, *cells[: len(OUTCOMES)], *reported, *cells[len(OUTCOMES) :]])
    heads = [f"paper: {name}" for name in OUTCOMES if paper]
    return ["variant", "runs", *OUTCOMES, *heads, *DIAGNOSTICS, *TRAINING], rows


def _differences(findings: Sequence[Finding], study: Study) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name in OUTCOMES:
        for variant, comparison in comparisons(findings, study, name).items():
            rows.append([name, variant, study.reference_of(variant), *_compared(comparison)])
    return ["Precision@1", "variant", "against", *COMPARED], rows


def _contrasts(findings: Sequence[Finding], study: Study) -> tuple[list[str], list[list[str]]]:
    found = {name: contrasts(findings, study, name) for name in OUTCOMES}
    rows = [[name, what, *_compared(compared)] for name in found for what, compared in found[name].items()]
    return ["Precision@1", "gain of", *COMPARED], rows


COMPARED = ("seeds", "mean difference", f"{CONFIDENCE:.0%} interval", "signs", "p", "verdict")


def _compared(comparison: Comparison | None) -> list[str]:
    """The cells of COMPARED."""
    if comparison is None:
        return [*"-----", "fewer than two seeds in common"]
    interval = f"{comparison.low:+.1f} to {comparison.high:+.1f}"
    ups, downs = (sum(sign * x > 0 for x in comparison.differences) for sign in (1, -1))
    values = [str(len(comparison.differences)), f"{comparison.mean:+.1f}", interval, f"{ups} up, {downs} down"]
    return [*values, f"{comparison.p_value:.3f}", comparison.verdict]


def _sets(done: Sequence[Finding], variants: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for run in done for name in run.sets))
    rows = []
    for name in names:
        values = [list(by_seed(done, variant, name).values()) for variant in variants]
        rows.append([name, *(f"{statistics.fmean(some):.1f}" if some else "-" for some in values)])
    return ["set", *variants], rows


def _runs(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    names = [*OUTCOMES, *DIAGNOSTICS, *TRAINING]
    rows = []
    for run in findings:
        values = [_number(name, run.values.get(name, math.nan)) for name in names]
        rows.append([run.variant, str(run.seed), *values, without_secrets(run.problem) or "finished"])
    return ["variant", "seed", *names, "state"], rows


def _run_table(findings: Sequence[Finding]) -> tuple[list[str], list[list[str]]]:
    names = [*OUTCOMES, *DIAGNOSTICS, *TRAINING]
    sets = list(dict.fromkeys(name for run in findings for name in run.sets))
    rows = []
    for run in findings:
        values = [run.values.get(name, math.nan) for name in names] + [run.sets.get(name, math.nan) for name in sets]
        rows.append(
            [
                run.variant,
                str(run.seed),
                without_secrets(run.problem),
                *("" if math.isnan(x) else f"{x:.6g}" for x in values),
            ]
        )
    return ["arm", "seed", "problem", *names, *sets], rows


def _comparison_table(findings: Sequence[Finding], study: Study) -> tuple[list[str], list[list[str]]]:
    """Comparisons of all values, not only of the outcomes."""
    sets = list(dict.fromkeys(name for run in findings for name in run.sets))
    rows = []
    for name in (*OUTCOMES, *DIAGNOSTICS, *TRAINING, *sets):
        compared = {(arm, study.reference_of(arm)): one for arm, one in comparisons(findings, study, name).items()}
        compared |= {(contrast, ""): one for contrast, one in contrasts(findings, study, name).items()}
        for arms, comparison in compared.items():
            if comparison is not None:
                numbers = (comparison.mean, comparison.low, comparison.high, comparison.p_value)
                differences = " ".join(f"{x:.6g}" for x in comparison.differences)
                rows.append([name, *arms, *(f"{x:.6g}" for x in numbers), differences])
    return ["number", "arm", "reference", "mean difference", "low", "high", "p", "differences by seed"], rows


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def plot_outcomes(done: Sequence[Finding], study: Study, variants: Sequence[str], path: Path) -> None:
    """Draw Precision@1 of every run by variant, and the differences from the reference with intervals, as a PNG."""
    figure = Figure(figsize=(13, 1.8 + 0.5 * len(variants)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = {variant: place for place, variant in enumerate(variants)}
    for name, colour, shift in zip(OUTCOMES, (INK, BLUE, ORANGE), (-0.22, 0, 0.22)):
        comparisons_by_variant = comparisons(done, study, name)
        for variant, place in places.items():
            values = list(by_seed(done, variant, name).values())
            left.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.4, markersize=5, mew=0)
            if values:
                left.plot(statistics.fmean(values), place + shift, "|", color=colour, markersize=12, mew=2.5)
            comparison = comparisons_by_variant.get(variant)
            if comparison is not None:
                right.plot([comparison.low, comparison.high], [place + shift] * 2, color=colour, linewidth=2)
                face = colour if len(comparison.differences) >= FEWEST_FOR_TEST else "white"
                right.plot(comparison.mean, place + shift, "o", color=colour, markerfacecolor=face, markersize=6)
        left.plot([], [], "o", color=colour, label=name)
    right.axvline(0, color=INK, linewidth=1)
    left.set_yticks(list(places.values()), list(places), fontsize=9)
    left.set_ylim(len(variants) - 0.5, -0.5)
    label_axes(left, "Precision@1: a dot per seed, a bar for the mean", "", "percent")
    others = {study.reference_of(variant.name) for variant in study.variants if variant.name in places}
    against = study.reference if len(others) == 1 else "its reference"
    title = f"difference from {against}, {CONFIDENCE:.0%} interval; hollow: few seeds"
    label_axes(right, title, "", "points")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save_png(figure, path)


def plot_similarities(done: Sequence[Finding], variants: Sequence[str], path: Path) -> None:
    """Draw a panel per variant as a PNG: cosines of positives and hardest negatives of its evaluation queries."""
    variants = sorted(variants, key=lambda variant: variant != UNTRAINED)  # before training first
    across = min(4, max(1, len(variants)))
    down = max(1, -(-len(variants) // across))
    figure = Figure(figsize=(0.8 + 3.3 * across, 0.9 + 2.5 * down), layout="constrained")
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    axes = None
    for index, variant in enumerate(variants):
        axes = figure.add_subplot(down, across, index + 1, sharey=axes)
        runs = [run for run in done if run.variant == variant]
        for side, (colour, label) in enumerate(((BLUE, "positive"), (ORANGE, "hardest negative"))):
            counts = np.sum([run.histograms[side] for run in runs], axis=0)
            shares = 100 * counts / max(1, counts.sum())
            axes.stairs(shares, edges, fill=True, facecolor=(colour, 0.35), edgecolor=colour, label=label)
        auc, overlap = (statistics.fmean(run.values[name] for run in runs) for name in ("AUC", "overlap"))
        title = f"{variant}\nAUC {auc:.2f}, overlap {overlap:.2f}, {len(runs)} run{'s' * (len(runs) > 1)}"
        label_axes(axes, title, "", "")
        if index % across == 0:
            axes.set_ylabel("share of queries (%)")
        if index + across >= len(variants):
            axes.set_xlabel("cosine similarity")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_png(figure, path)


def mean_curves(done: Sequence[Finding], variants: Sequence[str]) -> dict[str, Log]:
    """Trained variant -> a record per step, in which each number is the mean over the variant's runs."""
    curves = {}
    for variant in variants:
        logs = [run.log for run in done if run.variant == variant and len(run.log) > 1]
        if logs:
            curves[variant] = [_mean_record(records) for records in zip(*logs)]
    return curves


def _mean_record(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of the records of one step; numbers that were not finite are left out."""
    names = [name for name, value in records[0].items() if isinstance(value, int | float) or value is None]
    values = {name: [record[name] for record in records if record.get(name) is not None] for name in names}
    return {name: statistics.fmean(some) for name, some in values.items() if some}

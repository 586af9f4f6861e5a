"""Writes the report of an evaluation: tables and figures, from its results and the records of the run's log.

The files are report.html, which has everything in it, report.json, report.md, scores.png, similarities.png,
montage.png, mistakes.png and, with records, loss.png.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_llave.batch import Side
from megatron_llave.errors import DataError
from megatron_llave.evaluation.task import SetResult
from megatron_llave.files import write_json, write_text
from megatron_llave.loss.similarities import HISTOGRAM_BINS, cosine_counts
from megatron_llave.options.evaluate import TIES
from megatron_llave.report.html_page import Section, html_page
from megatron_llave.report.montage import draw_montage
from megatron_llave.report.palette import BLUE, GREEN, GREY, ORANGE, RED
from megatron_llave.report.panels import example_panels, mistake_panels
from megatron_llave.report.plots import label_axes, plot_loss, save_png
from megatron_llave.report.provenance import about_section, head_line

COLUMNS = ("data set", "Precision@1", "before training", "chance", "meta-task", "split", "queries", "candidates")
"""The scores come first, so that a narrow screen shows them."""
LONG_LISTS = ("positive", "hardest_negative", "top", "positives", "further", "queries", "candidates")
DIAGNOSTICS = (
    *("data set", "positive", "hardest negative", "margin", "AUC", "overlap"),
    *("alignment", "uniformity", "hub (%)", "ties"),
)
NOTE = (
    "Precision@1 in percent, of this model, of the weights that its training started from, and of guessing. Seen sets "
    "were trained on: they test memory and are in no mean."
)
NO_BEFORE = " The scores before training are not known; --before adds them."
SPLITS = {"ind": (BLUE, "in distribution"), "ood": (ORANGE, "out of distribution"), "seen": (GREY, "seen in training")}
"""Split -> colour of its bars, and their name in the legend."""
NUMBER = re.compile(r"\**-?[0-9.]*(e[+-]?[0-9]+)?\**")
"""A cell with a number, in bold or not; also an empty one, and a dash."""
PAPER_NOTE = (
    "Means of Precision@1 in percent beside those published for the model of these sizes; comparable where all data "
    "sets of a mean were evaluated."
)
DIAGNOSTICS_NOTE = (
    "Mean cosine of the right candidate and of the most similar wrong one. Margin: mean difference of the two, per "
    "query. AUC: probability that a random query's right candidate is more similar than a random query's most similar "
    "wrong one. Both are low where a model fails: wrong candidates are then the more similar ones, the margin is "
    "below 0 and the AUC below 0.5. Overlap: how far the two samples overlap, 0 to 1; it is small where they differ "
    "in either direction. Alignment: mean squared distance of queries and right candidates, 0 is best. Uniformity: "
    "log of the mean of exp(-2 squared distance) between candidates, lower is more evenly spread. Hub: percentage of "
    "queries won by the most frequent best candidate. Ties: queries in which the most similar wrong candidate is "
    "exactly as similar as the right one."
)


def summarise(results: list[SetResult]) -> dict[str, Any]:
    """Means of Precision@1 in percent over the held-out sets, every set counting the same.

    Returns:
        {"meta_tasks": {meta-task: mean}, "ind": mean, "ood": mean, "held_out": mean over both}; None where no set is.
    """
    return _summarise(results, lambda result: result.precision_at_1)


def _summarise(results: list[SetResult], score: Callable[[SetResult], float | None]) -> dict[str, Any]:
    """Means as of `summarise`, of another score; None also where a set has no such score."""
    held_out = [result for result in results if result.split != "seen"]
    meta_tasks = dict.fromkeys(result.meta_task for result in held_out)

    def mean(chosen: Iterable[SetResult]) -> float | None:
        scores = [score(result) for result in chosen]
        return None if not scores or None in scores else sum(scores) / len(scores)

    return {
        "meta_tasks": {task: mean(r for r in held_out if r.meta_task == task) for task in meta_tasks},
        "ind": mean(result for result in held_out if result.split == "ind"),
        "ood": mean(result for result in held_out if result.split == "ood"),
        "held_out": mean(held_out),
    }


def _before(results: list[SetResult]) -> dict[str, Any]:
    return _summarise(results, lambda result: result.before_training)


def write_numbers(results: list[SetResult], path: str | Path, extra: dict[str, Any]) -> None:
    """Write `extra`, the means and each set's metrics as JSON; lists over queries are summarised as histograms."""
    sets = []
    for result in results:
        metrics = {key: value for key, value in asdict(result).items() if key not in LONG_LISTS}
        for name in ("positive", "hardest_negative"):
            metrics[f"{name}_histogram"] = cosine_counts(torch.tensor(getattr(result, name), dtype=torch.float64))
        sets.append(metrics)
    write_json(path, {**extra, "means": summarise(results), "means_before_training": _before(results), "sets": sets})


def _set_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    """A row of COLUMNS per set."""
    rows = []
    for result in results:
        counts = (str(result.num_queries), str(result.num_candidates))
        scores = (f"{result.precision_at_1:.1f}", _decimal(result.before_training), f"{result.chance:.3g}")
        rows.append((result.name, *scores, result.meta_task, result.split, *counts))
    return rows


def _mean_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    """A row of COLUMNS per mean over held-out sets."""
    means, before = summarise(results), _before(results)
    named = [(f"mean {task}", mean, before["meta_tasks"][task]) for task, mean in means["meta_tasks"].items()]
    titles = {"ind": "mean IND", "ood": "mean OOD", "held_out": "mean of all held-out sets"}
    named += [(title, means[key], before[key]) for key, title in titles.items()]
    scores = [(name, _decimal(mean), _decimal(start)) for name, mean, start in named if mean is not None]
    return [(*row, "", "", "", "", "") for row in scores]


def _decimal(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def scores_section(results: list[SetResult], ties: str) -> Section:
    """Return the table with one row per set, then the means; chance and Precision@1 are in percent.

    `ties` is the tie rule, a key of TIES.
    """
    note = NOTE + (NO_BEFORE if all(result.before_training is None for result in results) else "")
    return Section("Scores", f"{note} Ties: {ties}. {TIES[ties]}", COLUMNS, _set_rows(results), _mean_rows(results))


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], means: Sequence[Sequence[str]] = ()) -> str:
    """A Markdown table with `means` as bold rows at its end; columns of numbers are aligned to the right."""
    rows = [*rows, *([f"**{cell}**" if cell else "" for cell in row] for row in means)]
    numbers = [all(NUMBER.fullmatch(row[index]) for row in rows) for index in range(len(columns))]
    lines = [columns, ["---:" if is_number else "---" for is_number in numbers], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def print_table(results: list[SetResult], ties: str) -> None:
    """Print the sets and the means to the terminal, with the tie rule (a key of TIES) in the title."""
    table = Table(title=f"Precision@1 (%), ties: {ties}")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index in (0, 4, 5) else "right")
    for row in _set_rows(results):
        table.add_row(*row)
    table.add_section()
    for row in _mean_rows(results):
        table.add_row(*row, style="bold")
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log file has no width; rich would assume 80 and cut names
    console.print(table, markup=False)


def plot_similarities(results: list[SetResult], path: str | Path) -> None:
    """Draw a panel per set with the histograms of positives and hardest negatives as PNG; the bins give the overlap."""
    across = min(4, max(1, len(results)))
    down = max(1, -(-len(results) // across))
    figure = Figure(figsize=(0.8 + 3.3 * across, 0.9 + 2.7 * down), layout="constrained")
    for index, result in enumerate(results):
        axes = figure.add_subplot(down, across, index + 1)
        samples = [[x for x in sample if np.isfinite(x)] for sample in (result.positive, result.hardest_negative)]
        edges = np.histogram_bin_edges(samples[0] + samples[1], HISTOGRAM_BINS)
        for sample, colour, label in zip(samples, (BLUE, ORANGE), ("positive", "hardest negative"), strict=True):
            weights = np.full(len(sample), 100 / max(1, len(sample)))
            colours = {"facecolor": (colour, 0.35), "edgecolor": colour}
            axes.hist(sample, edges, weights=weights, histtype="stepfilled", linewidth=1.4, label=label, **colours)
        label_axes(axes, f"{result.name}\nAUC {_decimal(result.auc, 2)}, overlap {result.overlap:.2f}", "", "")
        if index % across == 0:
            axes.set_ylabel("share of queries (%)")
        if index + across >= len(results):
            axes.set_xlabel("cosine similarity")
    if results:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    save_png(figure, path)


def plot_scores(results: list[SetResult], path: str | Path) -> None:
    """Draw Precision@1 of each set as a bar, with marks at chance and before training, grouped by meta-task, as PNG."""
    meta_tasks = list(dict.fromkeys(result.meta_task for result in results))
    ordered = sorted(results, key=lambda result: meta_tasks.index(result.meta_task))
    figure = Figure(figsize=(9, 1.4 + 0.27 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(ordered))
    for split, (colour, label) in SPLITS.items():
        chosen = [place for place, result in zip(places, ordered) if result.split == split]
        if chosen:
            scores = [ordered[place].precision_at_1 for place in chosen]
            axes.barh(chosen, scores, color=colour, height=0.7, label=label)
    marks = {"chance": (GREEN, [result.chance for result in ordered])}
    marks["before training"] = (RED, [np.nan if r.before_training is None else r.before_training for r in ordered])
    for label, (colour, values) in marks.items():
        if not np.isnan(values).all():
            axes.plot(values, places, "|", color=colour, markersize=9, markeredgewidth=2, label=label)
    for place, result in zip(places, ordered):
        end = np.nanmax([result.precision_at_1, *(values[place] for _, values in marks.values())])
        axes.text(end + 1.2, place, f"{result.precision_at_1:.1f}", va="center", fontsize=8, color=GREY)
    axes.set_yticks(places, [f"{result.name}  ({result.meta_task})" for result in ordered], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    label_axes(axes, "Precision@1", "", "percent")
    if ordered:
        axes.legend(frameon=False, loc="lower right")
    save_png(figure, path)


def diagnostic_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    """A row of DIAGNOSTICS per set."""
    rows = []
    for result in results:
        samples = (result.positive, result.hardest_negative)
        means = [np.mean([x for x in sample if np.isfinite(x)] or [np.nan]) for sample in samples]
        metrics = [*(f"{mean:.3f}" for mean in means), _decimal(result.margin, 3), _decimal(result.auc, 2)]
        metrics += [f"{result.overlap:.2f}", f"{result.alignment:.3f}", _decimal(result.uniformity, 2)]
        rows.append((result.name, *metrics, f"{result.hub_share:.1f}", str(result.num_ties)))
    return rows


def paper_rows(results: list[SetResult], paper: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(name, ours, the paper's) for each published mean; "-" where no set of its kind was evaluated."""
    means = summarise(results)
    ours = {**means["meta_tasks"], "ind": means["ind"], "ood": means["ood"], "overall": means["held_out"]}
    shown = {name: ours.get(name) for name in paper}
    return [(name, "-" if mean is None else f"{mean:.1f}", f"{paper[name]:.1f}") for name, mean in shown.items()]


def write_report(
    results: list[SetResult],
    ties: str,
    records: list[dict[str, Any]],
    inputs: Mapping[str, Side],
    directory: str | Path,
    paper: Mapping[str, float] | None = None,
    about: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of the report into `directory`; each replaces an old one when it is complete.

    Args:
        results: the sets' results, in the order of the tables.
        ties: the tie rule that they were scored with, a key of TIES; stated in each of the files.
        records: records of the run's log; without any there is no loss.png.
        inputs: the inputs by the keys in the results; only those shown in figures are read.
        directory: folder of the report, made if missing.
        paper: published means to compare with.
        about: where the numbers come from (provenance.py), by name; the entry `evaluation` of report.json.
        extra: further entries of report.json.

    Raises:
        DataError: a file cannot be written: the disk is full, or a folder has its name.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_files(results, ties, records, inputs, directory, paper or {}, about or {}, extra or {})
    except OSError as error:
        file = error.filename2 or error.filename or directory
        raise DataError(f"report: {file} cannot be written: {error.strerror or error}") from error


def _write_files(
    results: list[SetResult],
    ties: str,
    records: list[dict[str, Any]],
    inputs: Mapping[str, Side],
    directory: Path,
    paper: Mapping[str, float],
    about: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    figures = {"Precision@1": "scores.png", "Similarities": "similarities.png", "Examples": "montage.png"}
    figures["Worst mistakes"] = "mistakes.png"
    if records:
        plot_loss(records, directory / "loss.png")
        figures["Training"] = "loss.png"
    plot_scores(results, directory / "scores.png")
    plot_similarities(results, directory / "similarities.png")
    draw_montage(example_panels(results, inputs), directory / "montage.png")
    draw_montage(mistake_panels(results, inputs), directory / "mistakes.png")
    steps = {"steps": records[-1]["step"]} if records else {}
    head = {"evaluation": dict(about)} if about else {}
    head |= {**steps, "ties": ties, **extra, **({"paper": paper} if paper else {})}
    write_numbers(results, directory / "report.json", head)
    tables = [scores_section(results, ties)]
    if paper:
        tables.append(Section("Beside the paper", PAPER_NOTE, ("mean", "here", "paper"), paper_rows(results, paper)))
    tables.append(Section("Diagnostics", DIAGNOSTICS_NOTE, DIAGNOSTICS, diagnostic_rows(results)))
    if about:
        tables.append(about_section(about))
    drawn = "".join(f"\n## {title}\n\n![{title}]({file})\n" for title, file in figures.items())
    what = ", ".join([f"{len(results)} evaluation sets", *filter(None, [head_line(about)])])
    write_text(directory / "report.md", f"# Evaluation\n\n{what}\n" + "".join(map(markdown, tables)) + drawn)
    shown = [Section(title, figures=[directory / file]) for title, file in figures.items()]
    page = html_page("Evaluation", what, [*tables, *shown])
    write_text(directory / "report.html", page)


def markdown(section: Section) -> str:
    """Return a section of the report in Markdown: its title, what it is about, and its table."""
    table = markdown_rows(section.columns, section.rows, section.means)
    about = f"{section.about}\n\n" if section.about else ""
    return f"\n## {section.title}\n\n{about}{table}"

"""What an evaluation found, as numbers, tables and pictures, made of its results and the records of the run's log.

Called by the tools after an evaluation. Files: report.html with everything in it, report.json, report.md, and the
pictures scores.png, similarities.png, montage.png, mistakes.png, loss.png.
"""

from collections.abc import Iterable, Mapping, Sequence
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
from megatron_llave.report.html_page import Section, html_page
from megatron_llave.report.montage import Panel, Row, draw_montage
from megatron_llave.report.plots import BLUE, GREEN, GREY, ORANGE, label_axes, plot_loss, save_png

COLUMNS = ("data set", "meta-task", "split", "queries", "candidates", "chance", "Precision@1")
LONG_LISTS = ("positive", "hardest_negative", "top", "positives", "queries", "candidates")
DIAGNOSTICS = ("data set", "positive", "hardest negative", "overlap", "alignment", "uniformity", "hub (%)", "ties")
NOTE = "Chance and Precision@1 in percent. Seen sets were trained on: they test memory and are in no mean."
PAPER_NOTE = (
    "Means of Precision@1 in percent beside those of arXiv 2503.04812 for the model of these sizes; comparable where "
    "all data sets of a mean were evaluated."
)
DIAGNOSTICS_NOTE = (
    "Mean cosine of the right candidate and of the hardest other one, and how far the two samples overlap (0 to 1). "
    "Alignment: mean squared distance of queries and right candidates, 0 is best. Uniformity: log of the mean of "
    "exp(-2 squared distance) between candidates, lower is more spread. Hub: queries that the most frequent winner "
    "wins. Ties: queries in which another candidate is exactly as similar as the right one."
)


def summarise(results: list[SetResult]) -> dict[str, Any]:
    """Means of Precision@1 in percent over the held-out sets, every set counting the same; None where there is none.

    Returns:
        meta_tasks: {meta-task: mean}, and the means over the sets of split ind and ood and over both (held_out).
    """
    held_out = [result for result in results if result.split != "seen"]
    meta_tasks = dict.fromkeys(result.meta_task for result in held_out)
    return {
        "meta_tasks": {task: _mean([r for r in held_out if r.meta_task == task]) for task in meta_tasks},
        "ind": _mean([result for result in held_out if result.split == "ind"]),
        "ood": _mean([result for result in held_out if result.split == "ood"]),
        "held_out": _mean(held_out),
    }


def _mean(results: list[SetResult]) -> float | None:
    return sum(result.precision_at_1 for result in results) / len(results) if results else None


def write_numbers(results: list[SetResult], path: str | Path, extra: dict[str, Any]) -> None:
    """Write `extra`, the means and every set's numbers; of the lists over queries only two histograms."""
    short = []
    for one in results:
        numbers = {key: value for key, value in asdict(one).items() if key not in LONG_LISTS}
        for name in ("positive", "hardest_negative"):
            numbers[f"{name}_histogram"] = cosine_counts(torch.tensor(getattr(one, name), dtype=torch.float64))
        short.append(numbers)
    write_json(path, {**extra, "means": summarise(results), "sets": short})


def _set_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    rows = []
    for one in results:
        counts = (str(one.num_queries), str(one.num_candidates))
        rows.append((one.name, one.meta_task, one.split, *counts, f"{one.chance:.3g}", f"{one.precision_at_1:.1f}"))
    return rows


def _mean_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    means = summarise(results)
    named = [(f"mean {task}", mean) for task, mean in means["meta_tasks"].items()]
    named += [("mean IND", means["ind"]), ("mean OOD", means["ood"]), ("mean of all held-out sets", means["held_out"])]
    return [(name, "", "", "", "", "", f"{mean:.1f}") for name, mean in named if mean is not None]


def scores_section(results: list[SetResult]) -> Section:
    """Return the table with one row per set, then the means in bold; chance and Precision@1 are in percent."""
    rows, means = _set_rows(results), _mean_rows(results)
    return Section("Scores", NOTE, COLUMNS, [*rows, *means], frozenset(range(len(rows), len(rows) + len(means))))


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    numbers = [all(_is_number(row[index]) for row in rows) for index in range(len(columns))]
    lines = [columns, ["---:" if is_number else "---" for is_number in numbers], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def _is_number(cell: str) -> bool:
    return cell.strip("*") in ("", "-") or cell.strip("*").replace(".", "").replace("-", "").replace("e", "").isdigit()


def print_table(results: list[SetResult]) -> None:
    """Print the sets and the means to the terminal."""
    table = Table(title="Precision@1 (%)")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 3 else "right")
    for row in _set_rows(results):
        table.add_row(*row)
    table.add_section()
    for row in _mean_rows(results):
        table.add_row(*row, style="bold")
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a log file has no width; rich would assume 80 and cut names
    console.print(table, markup=False)


def plot_similarities(results: list[SetResult], path: str | Path) -> None:
    """One histogram panel per set, positives against hardest negatives, as a PNG; the overlap is that of its bins."""
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
        label_axes(axes, f"{result.name}\noverlap {result.overlap:.2f}", "", "")
        if index % across == 0:
            axes.set_ylabel("share of queries (%)")
        if index + across >= len(results):
            axes.set_xlabel("cosine similarity")
    if results:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    save_png(figure, path)


def plot_scores(results: list[SetResult], path: str | Path) -> None:
    """Precision@1 of every set as a bar, chance as a line across it, grouped by meta-task, as a PNG."""
    ordered = sorted(results, key=lambda one: list(dict.fromkeys(r.meta_task for r in results)).index(one.meta_task))
    figure = Figure(figsize=(9, 1.4 + 0.27 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(ordered))
    colours = [{"ind": BLUE, "ood": ORANGE}.get(one.split, GREY) for one in ordered]
    axes.barh(places, [one.precision_at_1 for one in ordered], color=colours, height=0.7)
    chances = [one.chance for one in ordered]
    axes.plot(chances, places, "|", color=GREEN, markersize=9, markeredgewidth=2, label="chance")
    for place, one in zip(places, ordered):
        axes.text(one.precision_at_1 + 0.8, place, f"{one.precision_at_1:.1f}", va="center", fontsize=8, color=GREY)
    axes.set_yticks(places, [f"{one.name}  ({one.meta_task})" for one in ordered], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    label_axes(axes, "Precision@1: blue in distribution, orange out of it, grey seen in training", "", "percent")
    if ordered:
        axes.legend(frameon=False, loc="lower right")
    save_png(figure, path)


def example_panels(results: list[SetResult], inputs: Mapping[str, Side], per_set: int = 3, k: int = 5) -> list[Panel]:
    """Some queries of each set, evenly spread over it, with their k best candidates."""
    chosen = {one.name: range(0) for one in results}
    for one in results:
        count = min(per_set, len(one.queries))
        chosen[one.name] = [number * len(one.queries) // count for number in range(count)]
    return [_panel(one, inputs, chosen[one.name], k) for one in results]


def mistake_panels(results: list[SetResult], inputs: Mapping[str, Side], per_set: int = 3, k: int = 5) -> list[Panel]:
    """Of each set with mistakes the worst ones: the queries whose best candidate is furthest ahead of the right one.

    The last of the k candidates is the right one.
    """
    panels = []
    for one in results:
        margins = np.subtract(one.hardest_negative, one.positive)
        worst = [number for number in np.argsort(-margins, kind="stable")[:per_set].tolist() if margins[number] > 0]
        if worst:
            panels.append(_panel(one, inputs, worst, k, with_right=True))
    return panels


def _panel(
    one: SetResult, inputs: Mapping[str, Side], queries: Iterable[int], k: int, with_right: bool = False
) -> Panel:
    shown = k - 1 if with_right else k
    score = f"Precision@1 {one.precision_at_1:.1f} % (chance {one.chance:.3g} %)"
    rows = []
    for query in queries:
        best = (one.top[query] + [-1] * shown)[:shown] + [one.positives[query]] * with_right
        sides = [(inputs[one.candidates[i]], i == one.positives[query]) if i >= 0 else None for i in best]
        rows.append(Row(inputs[one.queries[query]], sides))
    headings = (*map(str, range(1, shown + 1)), *["right"] * with_right)
    return Panel(one.name, f"{one.meta_task}, {one.split}, {score}", rows, headings)


def diagnostic_rows(results: list[SetResult]) -> list[tuple[str, ...]]:
    """A row of DIAGNOSTICS per set."""
    rows = []
    for one in results:
        samples = (one.positive, one.hardest_negative)
        means = [np.mean([x for x in sample if np.isfinite(x)] or [np.nan]) for sample in samples]
        spread = "-" if one.uniformity is None else f"{one.uniformity:.2f}"
        numbers = [*(f"{mean:.3f}" for mean in means), f"{one.overlap:.2f}", f"{one.alignment:.3f}", spread]
        rows.append((one.name, *numbers, f"{one.hub_share:.1f}", str(one.num_ties)))
    return rows


def paper_rows(results: list[SetResult], paper: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(mean, ours, the paper's) of each mean that the paper reports; "-" where no set of its kind was evaluated."""
    means = summarise(results)
    ours = {**means["meta_tasks"], "ind": means["ind"], "ood": means["ood"], "overall": means["held_out"]}
    shown = {name: ours.get(name) for name in paper}
    return [(name, "-" if mean is None else f"{mean:.1f}", f"{paper[name]:.1f}") for name, mean in shown.items()]


def write_report(
    results: list[SetResult],
    records: list[dict[str, Any]],
    inputs: Mapping[str, Side],
    directory: str | Path,
    paper: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of the report into `directory`, each replacing an old one whole.

    Args:
        results: of the sets, in the order of the tables.
        records: of the run's log; without any there is no loss.png.
        inputs: by the keys that the results name; read only for the pictures.
        directory: made when missing.
        paper: published means to compare with (paper_results.py).
        extra: goes into report.json.

    Raises:
        DataError: a file cannot be written: the disk is full, or a folder has its name.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_files(results, records, inputs, directory, paper or {}, extra or {})
    except OSError as error:
        file = error.filename2 or error.filename or directory
        raise DataError(f"report: {file} cannot be written: {error.strerror or error}") from error


def _write_files(
    results: list[SetResult],
    records: list[dict[str, Any]],
    inputs: Mapping[str, Side],
    directory: Path,
    paper: Mapping[str, float],
    extra: Mapping[str, Any],
) -> None:
    pictures = {"Precision@1": "scores.png", "Similarities": "similarities.png", "Examples": "montage.png"}
    pictures["Worst mistakes"] = "mistakes.png"
    if records:
        plot_loss(records, directory / "loss.png")
        pictures["Training"] = "loss.png"
    plot_scores(results, directory / "scores.png")
    plot_similarities(results, directory / "similarities.png")
    draw_montage(example_panels(results, inputs), directory / "montage.png")
    draw_montage(mistake_panels(results, inputs), directory / "mistakes.png")
    steps = {"steps": records[-1]["step"]} if records else {}
    write_numbers(results, directory / "report.json", {**steps, **extra, **({"paper": paper} if paper else {})})
    tables = [scores_section(results)]
    if paper:
        tables.append(Section("Beside the paper", PAPER_NOTE, ("mean", "here", "paper"), paper_rows(results, paper)))
    tables.append(Section("Diagnostics", DIAGNOSTICS_NOTE, DIAGNOSTICS, diagnostic_rows(results)))
    drawn = "".join(f"\n## {title}\n\n![{title}]({file})\n" for title, file in pictures.items())
    write_text(directory / "report.md", "# Evaluation\n" + "".join(map(markdown, tables)) + drawn)
    shown = [Section(title, pictures=[directory / file]) for title, file in pictures.items()]
    page = html_page("Evaluation", f"{len(results)} evaluation sets.", [*tables, *shown])
    write_text(directory / "report.html", page)


def markdown(section: Section) -> str:
    """Return a section of the report in Markdown: its title, what it is about, and its table."""
    rows = list(section.rows)
    for number in section.bold:
        rows[number] = tuple(f"**{cell}**" if cell else "" for cell in rows[number])
    return f"\n## {section.title}\n\n{section.about}\n\n{markdown_rows(section.columns, rows)}"

"""Draws curves of runs from the records of their logs as PNG files.

evaluation_report.py draws one run beside its evaluation, llave plot several runs together; curves_page.py draws the
panels of the latter as a page.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_llave.files import atomic_write
from megatron_llave.report.palette import BLUE, INK, ORANGE, RED, WHITE

# Tol's "muted" palette, for subsets and runs.
SUBSET_COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#AA4499", "#999933", "#44AA99", "#882255", "#DDCC77")
LINE_STYLES = ("-", "--", ":")

FIGURE_DPI = 120
PANELS: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
    ("loss", "contrastive loss (nats)", lambda record: record["loss"]),
    ("learning rate", "learning rate", lambda record: record["learning_rate"]),
    ("gradient norm, before clipping", "gradient norm", lambda record: record["gradient_norm"]),
    ("similarity of pairs", "mean cosine", lambda record: record["positive_similarity"]),
    ("similarity of hardest negatives", "mean cosine", lambda record: record["hardest_negative_similarity"]),
    ("margin of these two", "mean cosine", lambda r: r["positive_similarity"] - r["hardest_negative_similarity"]),
    ("AUC of these two", "probability", lambda record: record["similarity_auc"]),
    ("overlap of these two", "overlap coefficient", lambda record: record["similarity_overlap"]),
    ("throughput", "pairs per second", lambda record: record["pairs"] / record["seconds"]),
    ("wait for data", "share of the step (%)", lambda record: 100 * record["data_seconds"] / record["seconds"]),
]
"""Title, vertical axis, and value of a step's record, for each panel of plot_runs; evaluations and subsets follow."""
ACROSS = 3
"""Panels side by side."""


def plot_loss(records: list[dict[str, Any]], path: str | Path) -> None:
    """Draw loss by subset, learning rate, temperature, alpha, and similarities over the steps, as a PNG."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    steps = np.array([record["step"] for record in records], dtype=float)
    column = {name: _column(records, name) for name in ("loss", "learning_rate", "temperature", "alpha")}

    loss = figure.add_subplot(grid[0, :])
    subsets = [record["subset"] for record in records]
    for index, subset in enumerate(sorted(set(subsets))):
        colour = SUBSET_COLOURS[index % len(SUBSET_COLOURS)]
        style = LINE_STYLES[index // len(SUBSET_COLOURS) % len(LINE_STYLES)]
        chosen = np.array([name == subset for name in subsets])
        _dots_and_mean(loss, steps[chosen], column["loss"][chosen], colour, subset, style)
    if records:
        figure.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    label_axes(loss, "loss by subset (line: running mean)", "contrastive loss (nats)")

    rate = figure.add_subplot(grid[1, 0])
    rate.plot(steps, column["learning_rate"], color=BLUE)
    rate.yaxis.set_major_formatter("{x:g}")
    label_axes(rate, "learning rate", "learning rate")

    temperature = figure.add_subplot(grid[1, 1])
    temperature.plot(steps, column["temperature"], color=BLUE)
    temperature.set_ylim(bottom=0)
    label_axes(temperature, "temperature and hardness weight", "temperature")
    temperature.yaxis.label.set_color(BLUE)
    alpha = temperature.twinx()
    alpha.plot(steps, column["alpha"], color=RED, linestyle="--")
    alpha.set_ylabel("alpha (dashed)", color=RED)
    alpha.spines["top"].set_visible(False)
    alpha.margins(x=0.01)
    alpha.set_ylim(0, 1.25 * np.max(column["alpha"], initial=0.8))  # a constant alpha lies below a constant temperature

    similarity = figure.add_subplot(grid[1, 2])
    for name, label, colour in (
        ("positive_similarity", "positive", BLUE),
        ("hardest_negative_similarity", "hardest negative", ORANGE),
    ):
        _dots_and_mean(similarity, steps, _column(records, name), colour, label, "-")
    similarity.legend(frameon=False, loc="best")
    label_axes(similarity, "similarity in the batch", "mean cosine similarity")
    save_png(figure, path)


def plot_runs(
    runs: dict[str, list[dict[str, Any]]], evaluations: dict[str, list[tuple[int, float]]], path: str | Path, along: str
) -> None:
    """Draw several runs over each other as a PNG, a panel per quantity: faint values and their running mean.

    The last panels have the loss of one subset each, because the level of the loss differs between subsets.

    Args:
        runs: records of each run's log, by the run's name in the legend.
        evaluations: (step, mean Precision@1 in percent) of the evaluations during training, by the run's name.
        path: file to write.
        along: quantity of the horizontal axis: step, pairs or hours.
    """
    subsets = sorted({record["subset"] for records in runs.values() for record in records if "subset" in record})
    down = -(-(len(PANELS) + 1 + len(subsets)) // ACROSS)
    figure = Figure(figsize=(15, 3.6 * down), layout="constrained")
    axes = list(figure.subplots(down, ACROSS).flat)
    scores, by_subset = axes[len(PANELS)], axes[len(PANELS) + 1 :]
    for index, (name, records) in enumerate(runs.items()):
        colour = SUBSET_COLOURS[index % len(SUBSET_COLOURS)]
        style = LINE_STYLES[index // len(SUBSET_COLOURS) % len(LINE_STYLES)]
        places = place_of(records, along)
        for panel, (title, _, value) in zip(axes, PANELS):
            values = values_of(value, records)
            if title == "learning rate":  # has no noise
                panel.plot(places, values, color=colour, linestyle=style, linewidth=2)
            else:
                _dots_and_mean(panel, places, values, colour, name, style)
        for panel, subset in zip(by_subset, subsets):
            chosen = np.array([record.get("subset") == subset for record in records])
            _dots_and_mean(panel, places[chosen], _column(records, "loss")[chosen], colour, name, style)
        where = {record["step"]: place for record, place in zip(records, places)}
        points = [(where[step], score) for step, score in evaluations.get(name, []) if step in where]
        scores.plot(*zip(*points or [(np.nan, np.nan)]), color=colour, linestyle=style, marker="o", markersize=4)
    for panel, (title, quantity, _) in zip(axes, PANELS):
        label_axes(panel, title, quantity, along)
    label_axes(scores, "evaluation while training", "mean Precision@1 (%)", along)
    scores.set_visible(any(evaluations.values()))
    for panel, subset in itertools.zip_longest(by_subset, subsets):
        label_axes(panel, f"loss of subset {subset}", "contrastive loss (nats)", along)
        panel.set_visible(subset is not None)
    if runs:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    save_png(figure, path)


def place_of(records: list[dict[str, Any]], along: str) -> np.ndarray:
    """Position of each record on the horizontal axis, one of ALONG, [steps] float; what a record lacks counts as 0."""
    if along == "step":
        return _column(records, "step")
    if along == "pairs":
        return np.cumsum(np.nan_to_num(_column(records, "pairs")))
    seconds = np.nan_to_num([_column(records, name) for name in ("seconds", "save_seconds", "mining_seconds")])
    return np.cumsum(seconds.sum(axis=0)) / 3600


def values_of(value: Callable[[dict[str, Any]], float], records: list[dict[str, Any]]) -> np.ndarray:
    """The values of records, [steps] float; NaN where a record lacks one, or it was not finite."""
    return np.array([_number(value, record) for record in records], dtype=float)


def _number(value: Callable[[dict[str, Any]], float], record: dict[str, Any]) -> float:
    try:
        return value(record)
    except (KeyError, TypeError, ZeroDivisionError):
        return math.nan


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """The values of one key of the records, [steps] float; NaN where a record lacks it."""
    return np.array([record.get(name) for record in records], dtype=float)


def _dots_and_mean(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, style: str) -> None:
    """Draw faint dots, and over them their running mean."""
    valid = np.isfinite(values)
    steps, values = steps[valid], values[valid]
    axes.scatter(steps, values, s=7, color=colour, alpha=0.3, linewidths=0)
    axes.plot(steps, running_mean(values), color=colour, linestyle=style, linewidth=2, label=label)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, about a twentieth of all values, [n] float."""
    reach = max(4, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(0, index - reach), np.minimum(len(values), index + reach + 1)
    return (sums[end] - sums[start]) / (end - start)


def label_axes(axes: Axes, title: str, quantity: str, along: str = "step") -> None:
    """Label axes and title in the project's style."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(along)
    axes.set_ylabel(quantity)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)


def save_png(figure: Figure, path: str | Path) -> None:
    """Write the figure as PNG; a reader sees the old file or the complete new one."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=FIGURE_DPI, facecolor=WHITE)

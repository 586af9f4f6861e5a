"""Writes the results as tables and figures, in communication.md, .csv and .png. It measures nothing itself."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.communication.model import (
    CLUSTERS,
    GPU,
    H100_NODES,
    MODELS,
    PAIRS_PER_GPU,
    UTILISATION,
    Channel,
    ClusterStep,
)
from megatron_llave.files import atomic_write, write_text
from megatron_llave.report.palette import BLUE, GREY, ORANGE
from megatron_llave.report.plots import SUBSET_COLOURS, label_axes, save_png

TOLERANCE = 0.25
"""Relative deviation of the model from the measurement beyond which the report says that the model is off."""
BYTES_NOTE = """
Bytes a rank receives per step, exactly as measured: (N - 1) * (8 b d + 20 b + 24), for N ranks of b pairs, width d,
float32. For each other rank: its b targets, and its part of the gradients of this rank's b targets (4 b d each); two
all-reduces, as rings, for the log-sum-exps of all N b columns (16 b); the cosines of its b positives (4 b); three row
counts (24). loss.mask_same_target adds 16 b for ids, m hard negatives per rank add 8 m d, loss.reward=ema adds 4 b d,
and loss.matryoshka_dims takes the whole for every prefix, with its length for d.
"""
MEASURED_NOTE = """
Shares are of the step with barriers: waiting for the slowest rank before and after each collective, the barriers
themselves with it, and the collectives. Not all waiting is lost: without the gather the ranks wait at the reduction of
the gradients. The hardest share is the part of the negatives' softmax on the hardest 1 % of them, at least one. Seconds
are means over ranks; each batch is taken several times, of which the fastest counts, and the median batch is given.
"""
MODEL_NOTE = """
A collective of N processes on C cores takes max(1, N / C) * rounds * (N - 1) * (latency + whole / N / bandwidth): a
ring, two rounds for an all-reduce. On loopback a hop is work of the CPU, so processes that share a core take turns.
Latency and bandwidth of each kind are fitted to collectives of other sizes, timed outside of the step.
"""
INSIDE, BETWEEN = H100_NODES.inside, H100_NODES.between
CLUSTER_NOTE = f"""
{GPU} nodes of {H100_NODES.node} GPUs, by the vendor's nominal figures; nothing here was measured. Within a node
{INSIDE.bandwidth / 1e9:.0f} GB/s (NVLink 4, one direction) and {1e6 * INSIDE.latency:.1f} us per hop, between nodes
{BETWEEN.bandwidth / 1e9:.0f} GB/s for each GPU (an adapter of 400 Gb/s) and {1e6 * BETWEEN.latency:.1f} us: latencies
of a ring's hop by NCCL's own tuning table. The step computes at an assumed {UTILISATION:.0%} of dense bfloat16, with a
frozen vision encoder and pairs like MMEB's. Every GPU is a data-parallel rank. The second forward pass that several
micro batches need is not counted. The gather does not overlap with anything.

Share of the gather in a step, %: in two levels (rings between nodes, then within them), and in brackets as one ring
through all GPUs. In the head the seconds that the step computes.
"""
REDUCTION_NOTE = """
Bytes that a GPU receives per step, MB (1e6 bytes), beside the reduction of the gradients: float32 gradients of the
trained parameters scattered, bfloat16 weights gathered. Most of it can be hidden behind the backward.
"""


@dataclass(frozen=True)
class Measured:
    """The measurements with one number of processes, and the prediction of the model for it."""

    processes: int
    cores: int
    pairs: int
    """Number of pairs per process."""
    steps: int
    checkpoint: str | None
    alone: float
    """Seconds of a step without the gather."""
    gathered: float
    """Seconds of a step with the gather."""
    metered: float
    """Seconds of a step with the gather and with barriers around its collectives."""
    waiting: float
    """Seconds of `metered` that are spent in the barriers."""
    moving: float
    """Seconds of `metered` that are spent in the loss's collectives."""
    modelled: float
    """Predicted seconds of the loss's collectives, with links fitted at `fitted_at` processes."""
    modelled_own: float
    """Predicted seconds of the loss's collectives, with links fitted at this number of processes."""
    fitted_at: int
    """Number of processes at which the links of `modelled` were fitted; 0 if only a single process was measured."""
    received: int
    """Bytes that each rank receives per step."""
    effective_alone: float
    """Effective number of negatives without the gather, see loss.SimilarityStatistics."""
    effective: float
    """Effective number of negatives with the gather."""
    hardest_share: float
    subsets: list[str]
    """The subset of each measured batch."""
    channels: Mapping[str, Channel]
    """Kind of collective -> the channel fitted at `fitted_at` processes."""

    @property
    def share(self) -> float:
        """The fraction of the step with barriers that is spent in the loss's collectives."""
        return self.moving / self.metered

    @property
    def modelled_share(self) -> float:
        """The fraction of the step if its collectives take the predicted time instead of the measured result."""
        return self.modelled / (self.metered - self.moving + self.modelled)


def write_report(measured: Sequence[Measured], clusters: Sequence[ClusterStep], out: Path) -> None:
    """Write communication.md, .csv and .png into a folder. Each file is replaced atomically.

    Args:
        measured: at least one measurement, in rising order of processes.
        clusters: a step for every model, cluster size and number of pairs in model.py.
        out: the folder.
    """
    parts = [*_measured_part(measured), *_model_part(measured), *_cluster_part(clusters)]
    write_text(out / "communication.md", "\n".join(parts) + "\n")
    with atomic_write(out / "communication.csv") as temporary:
        _write_csv(temporary, [*map(_measured_row, measured), *map(_cluster_row, clusters)])
    save_png(draw(measured, clusters), out / "communication.png")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table with right-aligned columns."""
    lines = [heads, ["---:"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _measured_part(measured: Sequence[Measured]) -> Iterator[str]:
    first = measured[0]
    weights = "random weights, with which effective negatives mean little"
    if first.checkpoint:
        weights = f"weights of {first.checkpoint}"
    yield "# What gathering the negatives costs and brings\n"
    yield "## Measured\n"
    yield f"Gloo over loopback, one thread per process, {first.cores} cores for all processes; {weights}."
    yield f"{first.pairs} pairs per process, {first.steps} batches per row.\n"
    heads = ["processes", "global batch", "s/step without gather", "s/step with", "share waiting", "share moving"]
    heads += ["bytes received per rank and step", "negatives", "effective negatives without"]
    heads += ["effective negatives with", "hardest share with"]
    rows = []
    for result in measured:
        total = result.processes * result.pairs
        times = result.alone, result.gathered, result.waiting / result.metered, result.share
        seen = result.effective_alone, result.effective, result.hardest_share
        numbers = [f"{x:.3f}" for x in times], [result.received, total - 1], [f"{x:.3f}" for x in seen]
        rows.append([result.processes, total, *numbers[0], *numbers[1], *numbers[2]])
    yield table(heads, rows)
    yield f"Subsets of the last row's batches: {', '.join(measured[-1].subsets)}."
    yield MEASURED_NOTE + BYTES_NOTE


def _model_part(measured: Sequence[Measured]) -> Iterator[str]:
    several = [result for result in measured if result.processes > 1]
    if not several:
        return
    yield "## Modelled against measured"
    yield MODEL_NOTE
    yield f"The first ratio has them from {several[0].fitted_at} processes alone: what it says of more is predicted."
    yield "The second has them from each number of processes itself.\n"
    heads = ["processes", "moving, ms per step", "modelled, ms", "ratio", "fitted at each, ms", "ratio of that"]
    rows = []
    for result in several:
        cells = [f"{1e3 * result.moving:.2f}", f"{1e3 * result.modelled:.2f}", f"{result.modelled / result.moving:.2f}"]
        cells += [f"{1e3 * result.modelled_own:.2f}", f"{result.modelled_own / result.moving:.2f}"]
        rows.append([result.processes, *cells])
    yield table(heads, rows)
    yield _verdict(several)
    kinds = several[0].channels.items()
    fitted = [[kind, f"{1e6 * x.latency:.0f}", f"{x.bandwidth / 1e9:.2f}"] for kind, x in kinds]
    yield f"Fitted at {several[0].fitted_at} processes:\n"
    yield table(["collective", "latency per hop, us", "bandwidth, GB/s"], fitted)


def _verdict(several: Sequence[Measured]) -> str:
    """Say which predictions are within TOLERANCE of the measurements."""
    sentences = []
    ways = {f"Fitted at {several[0].fitted_at} processes": "modelled", "Fitted at each number": "modelled_own"}
    for way, name in ways.items():
        off = [result.processes for result in several if abs(getattr(result, name) / result.moving - 1) > TOLERANCE]
        where = f"not at {', '.join(map(str, off))} processes" if off else "at all numbers of processes"
        sentences.append(f"{way}, the model is within {TOLERANCE:.0%} of the measurement: {where}.")
    return "\n".join(sentences) + "\n"


def _cluster_part(clusters: Sequence[ClusterStep]) -> Iterator[str]:
    yield "## Modelled clusters"
    yield CLUSTER_NOTE
    for model in MODELS:
        modelled = {(step.gpus, step.pairs): step for step in clusters if step.model == model}
        compute = [modelled[CLUSTERS[0], pairs].compute_seconds for pairs in PAIRS_PER_GPU]
        heads = [f"LLaVE-{model}: GPUs", *(f"{b} pairs, {s:.2f} s" for b, s in zip(PAIRS_PER_GPU, compute))]
        rows = []
        for gpus in CLUSTERS:
            steps = [modelled[gpus, pairs] for pairs in PAIRS_PER_GPU]
            rows.append([gpus, *(f"{100 * x.share:.2f} ({100 * x.one_ring_share:.2f})" for x in steps)])
        yield table(heads, rows)
    yield REDUCTION_NOTE.lstrip()
    for model in MODELS:
        modelled = {(step.gpus, step.pairs): step for step in clusters if step.model == model}
        heads = [f"LLaVE-{model}: GPUs", *(f"{b} pairs" for b in PAIRS_PER_GPU), "reduction, MB", "reduction, ms"]
        rows = []
        for gpus in CLUSTERS:
            last = modelled[gpus, PAIRS_PER_GPU[-1]]
            moved = [f"{modelled[gpus, pairs].gather_bytes / 1e6:.1f}" for pairs in PAIRS_PER_GPU]
            rows.append([gpus, *moved, f"{last.reduction_bytes / 1e6:.0f}", f"{1e3 * last.reduction_seconds:.0f}"])
        yield table(heads, rows)


def _measured_row(result: Measured) -> dict[str, Any]:
    """The row of the CSV file for a measurement."""
    row = {"part": "measured", **asdict(result), "share": result.share, "modelled_share": result.modelled_share}
    row |= {"subsets": " ".join(result.subsets), "ratio": result.modelled / result.moving if result.moving else ""}
    return {name: value for name, value in row.items() if name != "channels"}


def _cluster_row(step: ClusterStep) -> dict[str, Any]:
    """The row of the CSV file for a modelled step."""
    return {"part": "cluster", **asdict(step), "share": step.share, "one_ring_share": step.one_ring_share}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw(measured: Sequence[Measured], clusters: Sequence[ClusterStep]) -> Figure:
    """Plot share of the step and effective negatives over processes, and the modelled share over GPUs."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    share, negatives, modelled = figure.subplots(1, 3)
    numbers = [result.processes for result in measured]
    share.plot(numbers, [100 * result.share for result in measured], color=BLUE, marker="o", label="measured")
    predicted = [100 * result.modelled_share for result in measured]
    share.plot(numbers, predicted, color=ORANGE, marker="s", linestyle="--", label="modelled")
    label_axes(share, "gather in a step, here", "share of the step (%)", "processes")
    effective = [result.effective for result in measured]
    negatives.plot(numbers, effective, color=BLUE, marker="o", label="gathered")
    alone = [result.effective_alone for result in measured]
    negatives.plot(numbers, alone, color=GREY, marker="s", linestyle="--", label="own pairs alone")
    label_axes(negatives, f"negatives that count, {measured[0].pairs} pairs each", "effective negatives", "processes")
    for axes in (share, negatives):
        axes.set_ylim(bottom=0)
        _powers(axes, numbers)
    for index, model in enumerate(MODELS):
        for pairs, style in ((PAIRS_PER_GPU[0], "-"), (PAIRS_PER_GPU[-1], "--")):
            shares = [100 * step.share for step in clusters if (step.model, step.pairs) == (model, pairs)]
            colour = SUBSET_COLOURS[index]
            modelled.plot(CLUSTERS, shares, color=colour, linestyle=style, label=f"{model}, {pairs} pairs per GPU")
    modelled.set_yscale("log")
    modelled.set_ylim(top=100)  # room for the legend
    modelled.yaxis.set_major_formatter("{x:g}")
    label_axes(modelled, f"gather in a step, modelled for {GPU} nodes", "share of the step (%)", "GPUs")
    _powers(modelled, CLUSTERS)
    for axes, columns in ((share, 1), (negatives, 1), (modelled, 2)):
        axes.legend(frameon=False, loc="upper left", ncols=columns, fontsize=9)
    return figure


def _powers(axes: Axes, numbers: Sequence[int]) -> None:
    """Make the horizontal axis logarithmic with base 2, and label each of the numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(numbers), [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.05)

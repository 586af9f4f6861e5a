"""Writes the results as tables and figures: communication.md, .csv and .png. Nothing is measured here."""

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
from megatron_llave.report.plots import BLUE, GREY, ORANGE, SUBSET_COLOURS, label_axes, save_png

TOLERANCE = 0.25
"""By which the model may be off before the report says that it is."""
BYTES_NOTE = """
Bytes a rank receives per step, exactly as measured: (N - 1) * (8 b d + 20 b + 16), for N ranks of b pairs, width d,
float32. For each other rank: its b targets, and its part of the gradients of this rank's b targets (4 b d each); two
all-reduces, as rings, for the log-sum-exps of all N b columns (16 b); the cosines of its b positives (4 b); two row
counts (16). loss.mask_same_target adds 16 b for ids, m hard negatives per rank add 8 m d, loss.reward=ema adds 4 b d,
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
frozen tower and pairs like MMEB's. Every GPU is a data-parallel rank; a second forward, for several micro batches, is
not counted. The gather is not hidden behind anything.

Share of the gather in a step, %: in two levels (rings between nodes, then within them), and in brackets as one ring
through all GPUs. In the head the seconds that the step computes.
"""
REDUCTION_NOTE = """
Bytes that a GPU receives per step, MB (1e6 bytes), beside the reduction of the gradients: float32 gradients of the
trained parameters scattered, bfloat16 weights gathered. Most of it can be hidden behind the backward.
"""


@dataclass(frozen=True)
class Measured:
    """One number of processes: what was measured, and what the model says."""

    processes: int
    cores: int
    pairs: int
    """Of a process."""
    steps: int
    checkpoint: str | None
    alone: float
    """Seconds of a step without the gather."""
    gathered: float
    """Seconds of a step with it."""
    metered: float
    """Seconds of a step with it and with barriers around its collectives."""
    waiting: float
    """Of these, seconds in barriers."""
    moving: float
    """Of these, seconds in the loss's collectives."""
    modelled: float
    """The same by the model, its links fitted at `fitted_at` processes."""
    modelled_own: float
    """The same, its links fitted at this number of processes."""
    fitted_at: int
    """0: a single process was all there was."""
    received: int
    """Bytes per rank and step."""
    effective_alone: float
    effective: float
    """Negatives, see loss.SimilarityStatistics."""
    hardest_share: float
    subsets: list[str]
    """Of the steps."""
    channels: Mapping[str, Channel]
    """Fitted, by kind of collective."""

    @property
    def share(self) -> float:
        """Of the collectives in the step with barriers."""
        return self.moving / self.metered

    @property
    def modelled_share(self) -> float:
        """The same by the model: its collectives in place of the measured ones."""
        return self.modelled / (self.metered - self.moving + self.modelled)


def write_report(measured: Sequence[Measured], clusters: Sequence[ClusterStep], out: Path) -> None:
    """Write communication.md, .csv and .png into a folder; a reader sees each as it was or as it is, never a half.

    Args:
        measured: in rising order of processes, at least one.
        clusters: of every model, size and number of pairs of communication_model.
        out: the folder.
    """
    parts = [*_measured_part(measured), *_model_part(measured), *_cluster_part(clusters)]
    write_text(out / "communication.md", "\n".join(parts) + "\n")
    with atomic_write(out / "communication.csv") as temporary:
        _write_csv(temporary, [*map(_measured_row, measured), *map(_cluster_row, clusters)])
    save_png(draw(measured, clusters), out / "communication.png")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown, numbers flush right."""
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
    for one in measured:
        total = one.processes * one.pairs
        times = one.alone, one.gathered, one.waiting / one.metered, one.share
        seen = one.effective_alone, one.effective, one.hardest_share
        numbers = [f"{x:.3f}" for x in times], [one.received, total - 1], [f"{x:.3f}" for x in seen]
        rows.append([one.processes, total, *numbers[0], *numbers[1], *numbers[2]])
    yield table(heads, rows)
    yield f"Subsets of the last row's batches: {', '.join(measured[-1].subsets)}."
    yield MEASURED_NOTE + BYTES_NOTE


def _model_part(measured: Sequence[Measured]) -> Iterator[str]:
    several = [one for one in measured if one.processes > 1]
    if not several:
        return
    yield "## Modelled against measured"
    yield MODEL_NOTE
    yield f"The first ratio has them from {several[0].fitted_at} processes alone: what it says of more is predicted."
    yield "The second has them from each number of processes itself.\n"
    heads = ["processes", "moving, ms per step", "modelled, ms", "ratio", "fitted at each, ms", "ratio of that"]
    rows = []
    for one in several:
        cells = [f"{1e3 * one.moving:.2f}", f"{1e3 * one.modelled:.2f}", f"{one.modelled / one.moving:.2f}"]
        cells += [f"{1e3 * one.modelled_own:.2f}", f"{one.modelled_own / one.moving:.2f}"]
        rows.append([one.processes, *cells])
    yield table(heads, rows)
    yield _verdict(several)
    kinds = several[0].channels.items()
    fitted = [[kind, f"{1e6 * x.latency:.0f}", f"{x.bandwidth / 1e9:.2f}"] for kind, x in kinds]
    yield f"Fitted at {several[0].fitted_at} processes:\n"
    yield table(["collective", "latency per hop, us", "bandwidth, GB/s"], fitted)


def _verdict(several: Sequence[Measured]) -> str:
    """Which predictions are within TOLERANCE."""
    sentences = []
    ways = {f"Fitted at {several[0].fitted_at} processes": "modelled", "Fitted at each number": "modelled_own"}
    for way, name in ways.items():
        off = [one.processes for one in several if abs(getattr(one, name) / one.moving - 1) > TOLERANCE]
        where = f"not at {', '.join(map(str, off))} processes" if off else "at all numbers of processes"
        sentences.append(f"{way}, the model is within {TOLERANCE:.0%} of the measurement: {where}.")
    return "\n".join(sentences) + "\n"


def _cluster_part(clusters: Sequence[ClusterStep]) -> Iterator[str]:
    yield "## Modelled clusters"
    yield CLUSTER_NOTE
    for model in MODELS:
        own = {(one.gpus, one.pairs): one for one in clusters if one.model == model}
        compute = [own[CLUSTERS[0], pairs].compute_seconds for pairs in PAIRS_PER_GPU]
        heads = [f"LLaVE-{model}: GPUs", *(f"{b} pairs, {s:.2f} s" for b, s in zip(PAIRS_PER_GPU, compute))]
        rows = []
        for gpus in CLUSTERS:
            steps = [own[gpus, pairs] for pairs in PAIRS_PER_GPU]
            rows.append([gpus, *(f"{100 * x.share:.2f} ({100 * x.one_ring_share:.2f})" for x in steps)])
        yield table(heads, rows)
    yield REDUCTION_NOTE.lstrip()
    for model in MODELS:
        own = {(one.gpus, one.pairs): one for one in clusters if one.model == model}
        heads = [f"LLaVE-{model}: GPUs", *(f"{b} pairs" for b in PAIRS_PER_GPU), "reduction, MB", "reduction, ms"]
        rows = []
        for gpus in CLUSTERS:
            last = own[gpus, PAIRS_PER_GPU[-1]]
            moved = [f"{own[gpus, pairs].gather_bytes / 1e6:.1f}" for pairs in PAIRS_PER_GPU]
            rows.append([gpus, *moved, f"{last.reduction_bytes / 1e6:.0f}", f"{1e3 * last.reduction_seconds:.0f}"])
        yield table(heads, rows)


def _measured_row(one: Measured) -> dict[str, Any]:
    """Of the CSV file."""
    row = {"part": "measured", **asdict(one), "share": one.share, "modelled_share": one.modelled_share}
    row |= {"subsets": " ".join(one.subsets), "ratio": one.modelled / one.moving if one.moving else ""}
    return {name: value for name, value in row.items() if name != "channels"}


def _cluster_row(one: ClusterStep) -> dict[str, Any]:
    """Of the CSV file."""
    return {"part": "cluster", **asdict(one), "share": one.share, "one_ring_share": one.one_ring_share}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def draw(measured: Sequence[Measured], clusters: Sequence[ClusterStep]) -> Figure:
    """Share of the step and effective negatives against processes, and the modelled share against GPUs."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    share, negatives, modelled = figure.subplots(1, 3)
    numbers = [one.processes for one in measured]
    share.plot(numbers, [100 * one.share for one in measured], color=BLUE, marker="o", label="measured")
    predicted = [100 * one.modelled_share for one in measured]
    share.plot(numbers, predicted, color=ORANGE, marker="s", linestyle="--", label="modelled")
    label_axes(share, "gather in a step, here", "share of the step (%)", "processes")
    effective = [one.effective for one in measured]
    negatives.plot(numbers, effective, color=BLUE, marker="o", label="gathered")
    alone = [one.effective_alone for one in measured]
    negatives.plot(numbers, alone, color=GREY, marker="s", linestyle="--", label="own pairs alone")
    label_axes(negatives, f"negatives that count, {measured[0].pairs} pairs each", "effective negatives", "processes")
    for axes in (share, negatives):
        axes.set_ylim(bottom=0)
        _powers(axes, numbers)
    for index, model in enumerate(MODELS):
        for pairs, style in ((PAIRS_PER_GPU[0], "-"), (PAIRS_PER_GPU[-1], "--")):
            shares = [100 * one.share for one in clusters if (one.model, one.pairs) == (model, pairs)]
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
    """A horizontal axis of doubling numbers, each written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(numbers), [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.05)

"""What `prepare` prints: tables of what was made, and tables of what a folder holds."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from megatron_llave.data.index import Subset
from megatron_llave.prepare import audit
from megatron_llave.prepare.shard_jobs import REPORT_FILE, Prepared

MODALITIES = ("text", "image", "both")
BAR = 24
"""Number of characters of the longest bar of a histogram."""
NEXT = "llave train --config own_data data.path={} train.output=runs/own"
"""The command that trains on a folder of one's own."""


def print_made(directory: str, made: Prepared) -> int:
    """Print what was made and what was left out; returns the exit status 0."""
    console = Console()
    console.print(summary(made.index.subsets))
    reasons = Table("subset", "skipped", "reason")
    for name, counts in made.skipped.items():
        for reason, count in counts.most_common():
            reasons.add_row(name, str(count), reason)
    if reasons.rows:
        console.print(reasons)
        print(f"{directory}/{REPORT_FILE} lists each of them")
    print_noticed(directory, made.noticed)
    print(f"wrote {directory}")
    return 0


def print_own(directory: str, made: Prepared) -> int:
    """Print what was made, the evaluation sets, and the command that comes next."""
    status = print_made(directory, made)
    table = Table("held out", "meta-task", "queries", "candidates", "chance (%)")
    for held_out in made.evaluation:
        counts = (str(len(held_out.queries)), str(len(held_out.candidates)), f"{held_out.chance:.3g}")
        table.add_row(held_out.name, held_out.meta_task, *counts)
    if table.rows:
        Console().print(table)
    print("".join(f"{line}\n" for line in made.remarks + made.unused), end="")
    print(f"next: {NEXT.format(directory)}")
    return status


def print_noticed(directory: str, noticed: dict[str, Counter[str]]) -> None:
    """Print how many images lose something when they are read, if there are any."""
    table = Table("subset", "images", "noticed")
    for name, counts in noticed.items():
        for note, count in counts.most_common():
            table.add_row(name, str(count), note)
    if table.rows:
        Console().print(table)
        print(f"{directory}/{REPORT_FILE} names each of them; data.image_background and data.image_corrections apply")


def summary(subsets: dict[str, Subset]) -> Table:
    """A table with one row per subset, and a total."""
    table = Table("subset", "meta-task", show_footer=True)
    sizes = {name: sum(shard.bytes for shard in subset.shards) / 1e6 for name, subset in subsets.items()}
    table.columns[0].footer = "total"
    table.add_column("pairs", justify="right", footer=str(sum(subset.pairs for subset in subsets.values())))
    table.add_column("shards", justify="right", footer=str(sum(len(subset.shards) for subset in subsets.values())))
    table.add_column("MB", justify="right", footer=f"{sum(sizes.values()):.1f}")
    for name, subset in subsets.items():
        table.add_row(name, subset.meta_task, str(subset.pairs), str(len(subset.shards)), f"{sizes[name]:.1f}")
    return table


def inspection_tables(inspection: audit.Inspection) -> list[Table]:
    """Tables of the subsets and of their modalities, and a histogram of each length that was measured."""
    modalities = Table("subset", title="queries and targets with text / image / both")
    counted = {"hard negatives": "with_hard_negatives", "several targets": "with_several_targets"}
    counted |= {"scores": "with_scores"}
    counted = {
        f"pairs with {name}": field
        for name, field in counted.items()
        if field == "with_hard_negatives" or any(getattr(counts, field) for counts in inspection.subsets.values())
    }
    for name in ("query", "target", *counted):
        modalities.add_column(name, justify="right")
    for name, counts in inspection.subsets.items():
        sides = [" / ".join(str(side[modality]) for modality in MODALITIES) for side in (counts.query, counts.target)]
        mark = "*" if counts.counted < counts.subset.pairs else ""
        modalities.add_row(name + mark, *sides, *(str(getattr(counts, field)) for field in counted.values()))
    tables = [summary({name: counts.subset for name, counts in inspection.subsets.items()}), modalities]
    return tables + [_histogram_table(measure, lengths) for measure, lengths in inspection.lengths.items()]


def _histogram_table(measure: str, lengths: dict[str, Counter[int]]) -> Table:
    title = {"characters": "characters of the texts", "pixels": "longer side of the images, pixels"}
    table = Table(title=title.get(measure, f"{measure} of the sequences"), show_footer=True)
    table.add_column("", footer="mean\nlongest")
    for kind, counter in lengths.items():
        mean = sum(length * count for length, count in counter.items()) / counter.total()
        table.add_column(kind, justify="right", footer=f"{mean:.1f}\n{max(counter)}")
    table.add_column("")
    ranges = audit.histogram(lengths)
    most = max(sum(counts.values()) for _, _, counts in ranges)
    for first, last, counts in ranges:
        bar = "#" * -(-BAR * sum(counts.values()) // most)
        table.add_row(f"{first} - {last}" if last else "0", *(str(counts[kind]) for kind in lengths), bar)
    return table


def inspection_notes(inspection: audit.Inspection) -> list[str]:
    """Lines that explain what the tables do not show: sampled subsets, and inputs that cannot be encoded."""
    notes = []
    for name, counts in inspection.subsets.items():
        if counts.counted < counts.subset.pairs:
            notes.append(f"* {name}: {counts.counted} of its {counts.subset.pairs} pairs were read")
    if inspection.not_encodable:
        notes.append(
            f"{inspection.not_encodable} inputs have more placeholders than images; training drops their pairs"
        )
    return notes

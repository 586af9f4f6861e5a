"""What is printed of mined negatives and of a mined order, when they are made and by `prepare inspect`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from megatron_llave.data.mined_negatives import MANIFEST_FILE, parse_manifest
from megatron_llave.data.order import ORDER_FILE, parse_order
from megatron_llave.errors import DataError
from megatron_llave.files import read_json
from megatron_llave.report.mining_report import about, said_of_recall


def inspect_mined(path: Path) -> None:
    """Print what a finished negatives.json or order.json says: subsets, models, rules, data and age.

    Raises:
        DataError: it is not finished or malformed.
    """
    parse, show = {MANIFEST_FILE: (parse_manifest, print_negatives), ORDER_FILE: (parse_order, print_order)}[path.name]
    parse(path, str(path))
    described = read_json(path)
    try:
        show(described)
        rows = about(described)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is malformed ({type(error).__name__}: {error}); mine again") from error
    written = path.stat().st_mtime
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(written))
    rows.append((f"{path.name} was written", f"{date}, {(time.time() - written) / 3600:,.1f} hours ago"))
    print("".join(f"{what}: {value}\n" for what, value in rows), end="")


def print_negatives(manifest: Mapping[str, Any]) -> None:
    """Print a row for each subset, and what the rules did."""
    columns = {
        "pairs": lambda counts: f"{counts['pairs']:,}",
        "mined": lambda counts: f"{counts['pairs_with_negatives']:,}",
        "queries": lambda counts: f"{counts['queries']:,}",
        "dropped": lambda counts: f"{counts['queries_dropped']:,}",
        "none": lambda counts: f"{counts['queries_without_negatives']:,}",
        "targets": lambda counts: f"{counts['targets']:,}",
        "kept": lambda counts: f"{counts['kept']:,}",
        "MB": lambda counts: f"{sum(shard['bytes'] for shard in counts['shards']) / 1e6:,.1f}",
    }
    table = Table(Column("subset", overflow="fold"), *columns)
    for name, counts in manifest["subsets"].items():
        table.add_row(name, *(show(counts) for show in columns.values()))
    Console().print(table)
    print("mined: pairs with negatives; dropped: queries without a positive above --min-positive; none: other queries")
    print("without negatives; kept: negatives of all queries")
    for name, counts in manifest["subsets"].items():
        for checkpoint, counted in zip(manifest["checkpoints"], counts["models"]):
            print(f"{name}, {checkpoint}: {left_out(counted)}")
        if counts["left_out_together"]["max_uses"]:
            print(f"{name}: {counts['left_out_together']['max_uses']:,} of those that passed were used up")
    _print_recall(manifest)


def print_order(order: Mapping[str, Any]) -> None:
    """Print a row for each subset and batch size."""
    table = Table(
        Column("subset", overflow="fold"), "pairs", "clusters", "left", "inside", "batch", "hardest", "random"
    )
    for name, counts in order["subsets"].items():
        inside = f"{100 * counts['connections_inside'] / max(counts['connections'], 1):.1f} %"
        described = [name, f"{counts['pairs']:,}", f"{counts['clusters']:,}", str(counts["left_over"]), inside]
        for sizes in counts["hardest"] or [dict.fromkeys(("batch_size", "ordered", "random"))]:
            figures = ("-" if sizes[key] is None else f"{sizes[key]:.3f}" for key in ("ordered", "random"))
            table.add_row(*described, str(sizes["batch_size"] or "-"), *figures)
            described = [""] * 5
    Console().print(table)
    print("left: pairs in no cluster; inside: share of the connections that are within clusters; hardest: mean")
    print("similarity of a query and its hardest negative in batches of this order; random: in batches at random")
    for name, counts in order["subsets"].items():
        if not counts["clusters"]:
            size = order["cluster_size"]
            print(f"{name}: its {counts['pairs']:,} pairs fill no cluster of {size}; its batches are random")
        elif not counts["connections"]:
            print(f"{name}: no query has a target beyond the ranks that --skip leaves out; its batches are random")
    _print_recall(order)


def _print_recall(described: Mapping[str, Any]) -> None:
    for name, counts in described["subsets"].items():
        for line in said_of_recall(described, counts):
            print(f"{name}, {line}")


def left_out(counted: dict[str, int]) -> str:
    """What the rules of one model have left out of its candidates, as percentages of them."""
    total, shares = counted["candidates"], []
    for rule, number in counted.items():
        if rule not in ("candidates", "kept") and number:
            shares.append(f"{rule.replace('_', '-')} {100 * number / total:.1f} %")
    return f"of {total:,} candidates, left out {', '.join(shares) or 'none'}"

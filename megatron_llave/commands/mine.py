"""Mine hard negatives for a folder of training shards.

`llave mine --help` explains the command; megatron_llave/options/mine.py has its options.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table

from megatron_llave.data.index import read_index
from megatron_llave.data.mined_negatives import REPORT_FILE
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import exit_with_one_line, require
from megatron_llave.launch import procs
from megatron_llave.mining.run import Mining, mine
from megatron_llave.options import mine as options
from megatron_llave.report.mining_report import write_mining_report
from megatron_llave.training.logger import quiet_dependencies


def main(argv: list[str] | None = None) -> None:
    """Mine at the parallel layout asked for; the first rank prints what was found."""
    args = options.parse(argv)
    with exit_with_one_line():
        if args.command == "report":
            print(f"report: {write_mining_report(Path(args.out), Path(args.data))}")
            return
        procs.require_as_started(args.procs)
        quiet_dependencies()
        rules = options.rules_of(args)
        number = len(args.checkpoint)
        require(rules.votes <= number, f"--votes {rules.votes} is more than there are checkpoints, {number}")
        index = read_index(args.data)
        subsets = args.subsets or [name for name, subset in index.subsets.items() if subset.pairs]
        for name in subsets:
            require(name in index.subsets, f"--subsets {name} is not one of {', '.join(sorted(index.subsets))[:200]}")
        out = Path(args.out)
        store = Path(args.store) if args.store else out.with_name(f"{out.name}.embeddings")
        mining = Mining(Path(args.data), index, subsets, out, store, args.checkpoint, rules, args.overwrite)
        load = [partial(load_model, path, args.overrides, args.average) for path in args.checkpoint]
        manifest = mine(mining, load, say)
        is_first = dist.get_rank() == 0
        process_groups.destroy_distributed()  # the other ranks need not wait for the report
        if is_first:
            print_report(manifest, args)
        if is_first and not (out / REPORT_FILE).exists():
            print(f"report: {write_mining_report(out, Path(args.data))}")


def say(doing: str) -> None:
    """Print what is being done, on the first rank."""
    if dist.is_initialized() and dist.get_rank() == 0:
        print(doing, flush=True)


def print_report(manifest: dict[str, Any], args: argparse.Namespace) -> None:
    """Print a row for each subset, what the rules did, and what to do with the folder."""
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
    print(f"{args.out}: train with data.negatives={args.out} data.hard_negatives={args.negatives}")


def left_out(counted: dict[str, int]) -> str:
    """What the rules of one model have left out of its candidates, as percentages of them."""
    total, shares = counted["candidates"], []
    for rule, number in counted.items():
        if rule not in ("candidates", "kept") and number:
            shares.append(f"{rule.replace('_', '-')} {100 * number / total:.1f} %")
    return f"of {total:,} candidates, left out {', '.join(shares) or 'none'}"

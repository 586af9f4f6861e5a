"""Mine hard negatives, or an order in which batches are hard, for a folder of training shards.

`llave mine --help` explains the command; megatron_llave/options/mine.py has its options.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_llave.commands.mined_tables import print_negatives, print_order
from megatron_llave.data.index import read_index
from megatron_llave.data.mined_negatives import REPORT_FILE
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import exit_with_one_line, require
from megatron_llave.launch import procs
from megatron_llave.mining.batches import Ordering, mine_batches
from megatron_llave.mining.clusters import has_metis
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
        run = of_negatives if args.command == "negatives" else of_batches
        index = read_index(args.data)
        wanted = args.subsets or [name for name, subset in index.subsets.items() if subset.pairs]
        for name in wanted:
            require(name in index.subsets, f"--subsets {name} is not one of {', '.join(sorted(index.subsets))[:200]}")
        subsets = [name for name in index.subsets if name in wanted]  # each once, also where it is named twice
        out = Path(args.out)
        store = Path(args.store) if args.store else out.with_name(f"{out.name}.embeddings")
        run(args, (Path(args.data), index, subsets, out, store))


def of_negatives(args: argparse.Namespace, places: tuple[Any, ...]) -> None:
    """Mine negatives; `places` are the first fields of Mining."""
    rules = options.rules_of(args)
    number = len(args.checkpoint)
    require(rules.votes <= number, f"--votes {rules.votes} is more than there are checkpoints, {number}")
    load = [partial(load_model, path, args.overrides, args.average) for path in args.checkpoint]
    manifest = mine(Mining(*places, args.checkpoint, rules, options.search_of(args), args.overwrite), load, say)
    is_first = dist.get_rank() == 0
    process_groups.destroy_distributed()  # the other ranks need not wait for the report
    if is_first:
        print_negatives(manifest)
        print(f"{args.out}: train with data.negatives={args.out} data.hard_negatives={args.negatives}")
    if is_first and not (Path(args.out) / REPORT_FILE).exists():
        print(f"report: {write_mining_report(Path(args.out), Path(args.data))}")


def of_batches(args: argparse.Namespace, places: tuple[Any, ...]) -> None:
    """Mine an order; `places` are the first fields of Ordering."""
    grouping = options.grouping_of(args, "metis" if has_metis() else "greedy")
    ordering = Ordering(*places, args.checkpoint, grouping, options.search_of(args), args.overwrite)
    order = mine_batches(ordering, partial(load_model, args.checkpoint, args.overrides, args.average), say)
    process_groups.destroy_distributed()
    if order is not None:
        print_order(order)
        size = order["cluster_size"]
        print(f"{args.out}: train with data.order={args.out}, and train.global_batch_size a multiple of {size}")


def say(doing: str) -> None:
    """Print what is being done, on the first rank."""
    if dist.is_initialized() and dist.get_rank() == 0:
        print(doing, flush=True)

"""Check the nodes before a run: their speed, clocks, disks, memory and versions, in one table and one line per fault.

`llave preflight --help` explains the command; megatron_llave/options/preflight.py has its options.
"""

import os
import sys

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import ConfigError, exit_with_one_line, require
from megatron_llave.launch import procs
from megatron_llave.options import preflight as options
from megatron_llave.planning.pair_lengths import mmeb_like
from megatron_llave.planning.plan import make_plan
from megatron_llave.planning.preflight import Needs, Node, describe_nodes, find_faults
from megatron_llave.training.logger import quiet_dependencies

GIB = 2**30
MOST_MEGABYTES = 100_000
"""More than any GPU holds; the disk would only be filled."""
WIDTH = 140
"""Characters of the table: output that goes to a file must not be cut."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, and print on the first rank."""
    with exit_with_one_line():
        args = options.parse(argv)
        procs.require_as_started(args.procs)
        require(
            1 <= args.megabytes <= MOST_MEGABYTES,
            f"--megabytes {args.megabytes} must be at least 1 and at most {MOST_MEGABYTES}",
        )
        cfg = load_config(args.config, args.overrides)
        quiet_dependencies()
        cpu_emulation.enable()
        process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
        nodes, over_all = describe_nodes(cfg, args.megabytes)
        needs, faults = needs_of(cfg)
        faults += find_faults(nodes, needs)
        if dist.get_rank() == 0:
            show(nodes, over_all, faults)
        process_groups.destroy_distributed()
        sys.exit(1 if faults else 0)


def needs_of(cfg: RunConfig) -> tuple[Needs, list[str]]:
    """What the run needs on these processes, and why it cannot start on them, if so."""
    try:
        plan = make_plan(cfg, dist.get_world_size(), mmeb_like(cfg))
    except ConfigError as error:
        return Needs(), [f"the run: {error}"]
    kept = max(cfg.checkpoint.keep_last, 1) + 1  # the newest is written before an old one is removed
    return Needs(plan.save_per_node(int(os.environ.get("LOCAL_WORLD_SIZE", 1))), kept * sum(plan.saves)), []


def show(nodes: list[Node], over_all: float, faults: list[str]) -> None:
    """Print the table of the nodes, the all-reduce over all of them, and the faults."""
    table = Table("node", "processes", title="Nodes", title_justify="left")
    for title in ("TFLOP/s", "all-reduce GB/s", "write GB/s", "disk GB", "memory GB", "shm GB", "clock s"):
        table.add_column(title, justify="right")
    for node in nodes:
        speeds = [f"{node.flops / 1e12:.3g}", f"{node.all_reduce / 1e9:.3g}", f"{node.write / 1e9:.3g}"]
        free = [f"{size / GIB:.1f}" for size in (node.disk, node.host_memory, node.shared_memory)]
        table.add_row(node.name, f"{node.ranks} x {node.device}", *speeds, *free, f"{node.clock:+.3f}")
    console = Console(highlight=False, markup=False, soft_wrap=True, width=WIDTH)
    console.print(table, soft_wrap=False)
    ranks = sum(node.ranks for node in nodes)
    console.print(f"All-reduce over all {ranks} processes: {over_all / 1e9:.3g} GB/s.")
    for fault in faults:
        console.print(f"fault: {fault}")
    console.print(f"{len(faults)} faults." if faults else "No fault was found.")

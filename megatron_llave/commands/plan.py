"""Plan a run before it is started: parameters, FLOPs, memory of each rank by part, communication, and whether it fits.

`llave plan --help` explains the command; megatron_llave/options/plan.py has its options.
"""

import argparse
from contextlib import suppress
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import ConfigError, exit_with_one_line, require
from megatron_llave.models import family_of
from megatron_llave.options import plan as options
from megatron_llave.planning.adapters import as_frozen
from megatron_llave.planning.context import shortest_pairs
from megatron_llave.planning.pair_lengths import Kind, SideShape, mmeb_like, read_kinds
from megatron_llave.planning.plan import (
    SMALL_PART,
    Plan,
    count_parameters,
    find_fit,
    find_smallest,
    longest_pair,
    make_plan,
)
from megatron_llave.training.logger import quiet_dependencies

GIB = 2**30
MOST = 1_000_000
"""The largest number of GPUs, and of tiles of a side, that is planned for."""
DOUBLINGS = 5
"""How often the number of GPUs is doubled in the search for one that fits."""


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, plan, and print."""
    with exit_with_one_line():
        args = options.parse(argv)
        quiet_dependencies()
        require(1 <= args.gpus <= MOST, f"--gpus {args.gpus} must be at least 1 and at most {MOST}")
        require(0 < args.gpu_memory < 1e6, f"--gpu-memory {args.gpu_memory:g} must be gigabytes of one GPU, such as 80")
        data = [f"data.path={args.data}"] if args.data else []
        cfg = load_config(args.config, [*args.overrides, *data])
        kinds, source = pairs_of(args, cfg)
        try:
            plan = make_plan(cfg, args.gpus, kinds)
        except ConfigError as error:
            suggest(cfg, kinds, args, error)
        else:
            show(plan, kinds, source, args)


def pairs_of(args: argparse.Namespace, cfg: RunConfig) -> tuple[list[Kind], str]:
    """The kinds of pairs to plan for, and a description of where they come from.

    Raises:
        UserError: the shards cannot be read, or the arguments are impossible.
    """
    if args.data:
        return read_kinds(args.data, cfg), args.data
    if args.pair_tokens is None:
        require(args.pair_tiles is None, "--pair-tiles needs --pair-tokens")
        return mmeb_like(cfg), "pairs like MMEB's"
    tiles = args.pair_tiles or [0, 0]
    ok = (
        min(args.pair_tokens) >= 1
        and 0 <= min(tiles) <= max(tiles) <= MOST
        and max(args.pair_tokens) <= cfg.data.max_length
    )
    require(ok, f"--pair-tokens must be 1 to data.max_length={cfg.data.max_length}, --pair-tiles 0 to {MOST}")
    of_tiles = [family_of(cfg.model).cost.of_tiles(cfg.model, number) for number in tiles]
    sides = [SideShape(t, min(t, v), k, n) for t, k, (v, n) in zip(args.pair_tokens, tiles, of_tiles)]
    return [Kind(1, [(sides[0], sides[1])])], "--pair-tokens"


def show(plan: Plan, kinds: list[Kind], source: str, args: argparse.Namespace) -> None:
    """Print the tables, whether the run fits, and if not, what would fit."""
    console, memory = Console(highlight=False), args.gpu_memory * GIB
    console.print(parameter_table(plan))
    console.print(step_table(plan, source))
    console.print(memory_table(plan))
    console.print(longest_pairs(plan.cfg, kinds, args.gpus, memory), soft_wrap=True)
    room = memory * (1 - SMALL_PART)
    limit = f"{room / GIB:.1f} GB ({args.gpu_memory:g} less {SMALL_PART:.0%} for CUDA, NCCL and fragmentation)"
    need = f"{plan.worst.total / GIB:.1f} GB on the fullest rank"
    if plan.fits(memory):
        console.print(f"It fits: {need}, of {limit}.", soft_wrap=True)
        return
    console.print(f"It does not fit: {need}, but there are {limit}.", soft_wrap=True)
    fit = suggest(plan.cfg, kinds, args)
    if fit is not None:
        ratio = (fit.model_flops + fit.extra_flops) / (plan.model_flops + plan.extra_flops)
        console.print(f"That is {ratio:.2f} times the FLOPs, with a bubble of {fit.bubble:.0%}.", soft_wrap=True)


def longest_pairs(cfg: RunConfig, kinds: list[Kind], gpus: int, memory: float) -> str:
    """Lines with the longest pair that fits, at the numbers of context-parallel ranks that are possible, and with the
    shortest one for which these save time."""
    found, times = [], []
    for context in (cfg.parallel.context * 2**power for power in range(DOUBLINGS)):
        shared = replace(cfg, parallel=replace(cfg.parallel, context=context))
        with suppress(ConfigError):  # too few GPUs, or pairs
            tokens = longest_pair(shared, gpus, kinds, memory)
            found.append(f"{tokens:,} (parallel.context={context})")
            if context > 1:
                faster, cheaper = shortest_pairs(shared, kinds)
                times.append(f"{faster:,} and {cheaper:,} (parallel.context={context})")
    lines = [f"Tokens of the longest pair that fits, one per micro batch: {', '.join(found)}."]
    if times:
        what = "Tokens of a pair from which context ranks save time, and save GPU time over full recomputation"
        lines.append(f"{what}, on H100: {', '.join(times)}.")
    return "\n".join(lines)


def suggest(
    cfg: RunConfig, kinds: list[Kind], args: argparse.Namespace, error: ConfigError | None = None
) -> Plan | None:
    """Print what fits on these GPUs, or else what comes nearest and how many GPUs it takes.

    Args:
        cfg: the configuration, which does not fit or cannot be split over these GPUs.
        kinds: the kinds of pairs.
        args: the command line.
        error: why the configuration cannot be split; None: it can, but needs too much memory.

    Returns:
        The plan that fits on these GPUs, or None.

    Raises:
        ConfigError: `error`, if no other layout helps either.
    """
    console, memory = Console(highlight=False), args.gpu_memory * GIB
    fit = find_fit(cfg, args.gpus, kinds, memory)
    nearest = fit or find_smallest(cfg, args.gpus, kinds)
    if nearest is None:
        raise error or ConfigError(f"no parallel layout can be split over --gpus {args.gpus}")
    if error is not None:
        console.print(f"As configured it cannot start on {args.gpus} GPUs: {error}.", soft_wrap=True)
    plan, overrides = nearest
    need = f"{plan.worst.total / GIB:.1f} GB on the fullest rank"
    console.print(f"{'Fits' if fit else 'Nearest'}: {' '.join(overrides)} ({need})", soft_wrap=True)
    if fit is not None:
        return plan
    console.print("No other layout, micro batch or recomputation fits on these GPUs.")
    for gpus in (args.gpus * 2**power for power in range(1, DOUBLINGS + 1)):
        larger = find_fit(cfg, gpus, kinds, memory)
        if larger is not None:
            console.print(f"Fits on {gpus} GPUs: {' '.join(larger[1]) or 'as configured'}", soft_wrap=True)
            return None
    console.print("More GPUs of this size do not help: use GPUs with more memory.")
    return None


def parameter_table(plan: Plan) -> Table:
    """A table of the parameters by part, in millions."""
    table = Table("part", "parameters, millions", title="Model", title_justify="left")
    counts, model = count_parameters(plan.cfg.model, plan.cfg.lora), as_frozen(plan.cfg).model
    names = {"embedding": "language: token embedding", "decoder": "language: decoder"}
    names |= {"adapters": "adapters: LoRA"}
    for group, number in counts.items():
        frozen = " (frozen)" if names.get(group, group).split(":")[0] in model.freeze else ""
        table.add_row(names.get(group, group) + frozen, f"{number / 1e6:.1f}")
    table.add_row("all", f"{sum(counts.values()) / 1e6:.1f}")
    return _right(table)


def step_table(plan: Plan, source: str) -> Table:
    """A table of what a step consists of, computes and communicates."""
    pairs, step = plan.cfg.train.global_batch_size, plan.step
    table = Table("step", source, title="Step", title_justify="left")
    passes = "two passes" if step.has_embed_pass else "one pass"
    longest, train = step.batch.work, plan.cfg.train
    micro = f"{train.micro_batch_size or pairs // step.data_parallel} pairs"
    if train.tokens_per_micro_batch is not None:
        micro = f"{train.tokens_per_micro_batch} tokens, images as their memory"
    rows = {
        "data-parallel ranks": str(step.data_parallel),
        "micro batches of each": f"{step.micro_batches} x {micro}, {passes}",
        "longest micro batch": f"{longest.tokens} tokens, {longest.tiles} tiles",
        "TFLOPs per pair": f"{plan.model_flops / pairs / 1e12:.2f}",
        "extra: passes, recomputed": f"{plan.extra_flops / plan.model_flops:.0%}",
        "pipeline bubble": f"{plan.bubble:.1%}",
        "balance of the stages": f"{plan.balance:.2f}",
        "gathered by the loss per rank": f"{plan.gather_bytes / 1e6:.1f} MB",
        "gradients, weights per rank": f"{plan.reduction_bytes / 1e6:.1f} MB",
        "host memory of a save per node": f"{plan.save_per_node() / GIB:.1f} GB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return _right(table)


def memory_table(plan: Plan) -> Table:
    """A table of the GB by part on a rank of each pipeline stage."""
    stages = [f"stage {i}" + " *" * (stage is plan.worst) for i, stage in enumerate(plan.stages)]
    title = "Memory of a rank, GB" + ("; * most" if len(stages) > 1 else "")
    table = Table("part", *stages, title=title, title_justify="left")
    table.add_row("decoder layers", *(str(stage.layers) for stage in plan.stages))
    for part in plan.stages[0].memory:
        table.add_row(part, *(f"{stage.memory[part] / GIB:.2f}" for stage in plan.stages))
    table.add_row("all", *(f"{stage.total / GIB:.2f}" for stage in plan.stages))
    table.add_row("of the host, for a save", *(f"{stage.save / GIB:.2f}" for stage in plan.stages))
    if plan.cfg.optimizer.offload_fraction:
        table.add_row("of the host, offloaded", *(f"{stage.offloaded / GIB:.2f}" for stage in plan.stages))
    return _right(table)


def _right(table: Table) -> Table:
    """Right-align the columns with numbers."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table

"""Evaluate a checkpoint on a benchmark; `llave evaluate --help` explains the commands.

megatron_llave/options/evaluate.py has their options.
"""

import argparse
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_llave.evaluation.benchmarks  # noqa: F401  registers the benchmarks
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.commands.progress import progress_bar
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.launcher import require_one_run
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import embed_parts, load_model
from megatron_llave.errors import DataError, exit_with_one_line, require
from megatron_llave.evaluation.before_training import INITIAL, initial_model, read_scores, with_scores
from megatron_llave.evaluation.benchmark import BENCHMARKS, Benchmark
from megatron_llave.evaluation.evaluate import Evaluated, evaluate_tasks
from megatron_llave.evaluation.task import Task
from megatron_llave.hub import is_name
from megatron_llave.launch import procs
from megatron_llave.locks import lock_folder
from megatron_llave.options import evaluate as options
from megatron_llave.report.evaluation_report import print_table, write_report
from megatron_llave.report.provenance import describe_evaluation
from megatron_llave.report.retrieval_report import write_retrieval_report
from megatron_llave.report.table_report import write_table_report
from megatron_llave.training.logger import LOG_FILE, quiet_dependencies, read_log


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    args = options.parse(argv, [benchmark.command for benchmark in BENCHMARKS.values()])
    with exit_with_one_line():
        procs.require_as_started(args.procs)
        quiet_dependencies()
        cpu_emulation.enable()
        with held_output(args):
            evaluate(BENCHMARKS[args.benchmark], args)
        process_groups.destroy_distributed()


@contextmanager
def held_output(args: argparse.Namespace) -> Iterator[None]:
    """Make and lock the folder of --out on the first rank before hours of work, so that a second evaluation fails."""
    require_one_run(os.environ)
    find_pretrained(args.checkpoint)  # fail before a folder is made if the checkpoint is mistyped
    what = f"{args.checkpoint} is a model of the hub: --out names the report's folder"
    require(bool(args.out) or not is_name(args.checkpoint), what)
    args.out = args.out or str(Path(args.checkpoint) / ("evaluation-average" if args.average else "evaluation"))
    with lock_folder(args.out) if os.environ.get("RANK", "0") == "0" else nullcontext():
        yield


def evaluate(benchmark: Benchmark, args: argparse.Namespace) -> None:
    """Read the data, load the model at the parallel layout asked for, embed and score; the first rank reports."""
    is_ranked = benchmark.read_tasks is not None
    data = benchmark.read_tasks(args) if is_ranked else benchmark.read_evaluation(args)
    before = scores_before(benchmark, args, data) if is_ranked else {}
    overrides = [*benchmark.overrides(args), *args.overrides]
    model = load_model(args.checkpoint, overrides=overrides, average=args.average)
    places = [getattr(args, name, None) for name in ("data", "queries", "corpus", "manifest")]
    # Now, because a run that is still training may remove the checkpoint before the evaluation ends.
    about = describe_evaluation(model, data if is_ranked else [], ", ".join(place for place in places if place))
    initial = initial_model(model) if is_ranked and args.before == INITIAL else None
    folder, identity = (args.out, model.identity()) if benchmark.is_kept else (None, {})
    with progress_bar() as progress:
        if initial is not None:
            embedder = CachedEmbedder(partial(embed_parts, initial), None, {}, model.groups.dp, progress)
            scored = evaluate_tasks(embedder, data, args.ties).results
            before = {result.name: result.precision_at_1 for result in scored}
        embedder = CachedEmbedder(
            partial(embed_parts, model), folder, identity, model.groups.dp, progress, cfg=model.cfg
        )
        done = evaluate_tasks(embedder, data, args.ties) if is_ranked else data(embedder)
    model.print_image_notes()
    lines = [] if is_ranked else done.lines
    if not is_ranked and done.examples:
        write_retrieval_report(done, about, args.out)
    if not is_ranked and done.tables:
        write_table_report(benchmark.name, done, about, args.out)
    if is_ranked:
        done = replace(done, results=with_scores(done.results, before))
        lines = report(done, data, args, benchmark.published(model.cfg), about) if dist.get_rank() == 0 else []
    if dist.get_rank() == 0:
        print("\n".join(lines))
    if not is_ranked and done.failure:
        raise DataError(done.failure)


def scores_before(benchmark: Benchmark, args: argparse.Namespace, tasks: list[Task]) -> dict[str, float]:
    """Precision@1 before training by set, from the report that --before names; empty if it names none.

    Raises:
        UserError: the report does not belong to these sets, or `initial` is asked for where embeddings are kept.
    """
    if args.before is None:
        return {}
    if args.before != INITIAL:
        return read_scores(args.before, tasks, args.ties)
    hint = "evaluate the weights before training into another --out, and give its report.json"
    require(not benchmark.is_kept, f"--before {INITIAL}: {benchmark.name} keeps the embeddings of one model; {hint}")
    return {}


def report(
    done: Evaluated,
    tasks: list[Task],
    args: argparse.Namespace,
    published: Mapping[str, float] | None,
    about: Mapping[str, Any],
) -> list[str]:
    """Write the report and print its table; returns lines to print below it."""
    log = Path(args.checkpoint) / LOG_FILE
    records = read_log(log) if log.is_file() else []
    inputs = ChainMap(*{task.inputs.name: task.inputs for task in tasks}.values())
    work = {"inputs": done.num_inputs, "inputs_embedded": done.num_embedded, "sets_finished": done.num_finished}
    write_report(done.results, args.ties, records, inputs, args.out, published, about, {"work": work})
    print_table(done.results, args.ties)
    embedded = f"{done.num_embedded} of {done.num_inputs} inputs were embedded now"
    meeting = {task.name: count for task in tasks if (count := task.num_meeting_themselves)}
    return [
        *(
            f"{name}: {count} queries are among their own candidates and ranked there"
            for name, count in meeting.items()
        ),
        f"{done.num_finished} of {len(tasks)} sets were finished before; {embedded}",
        f"report, tables and figures: {args.out}",
    ]

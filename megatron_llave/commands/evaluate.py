"""Evaluate a checkpoint on a benchmark: tables, figures, and one HTML report.

llave evaluate prepared --checkpoint runs/tiny --data DIR [parallel.tensor=2 ...]
llave evaluate mmeb --checkpoint CKPT --data MMEB-eval --images IMAGES --out runs/mmeb
llave evaluate retrieval --checkpoint CKPT --queries Q.jsonl --corpus C.jsonl \\
    --judgements QRELS --out runs/mine
llave evaluate video --checkpoint CKPT --manifest MSRVTT_JSFUSION_test.csv \\
    --videos VIDEOS --out runs/msrvtt
llave evaluate mteb --checkpoint CKPT --benchmark "MIEB(lite)" --out runs/mieb

CKPT is a checkpoint, a run's output directory or a Hugging Face folder. Each command has its own --help.
"""

import argparse
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

import megatron_llave.evaluation.benchmarks  # noqa: F401  registers the benchmarks
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.commands.progress import progress_bar
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.launcher import require_one_run
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import embed_parts, load_model
from megatron_llave.errors import DataError, OneLineParser, exit_with_one_line, require
from megatron_llave.evaluation.before_training import INITIAL, initial_model, read_scores, with_scores
from megatron_llave.evaluation.benchmark import BENCHMARKS, Benchmark
from megatron_llave.evaluation.evaluate import Evaluated, evaluate_tasks
from megatron_llave.evaluation.scoring import TIES
from megatron_llave.evaluation.task import Task
from megatron_llave.hub import is_name
from megatron_llave.launch import procs
from megatron_llave.locks import lock_folder
from megatron_llave.report.evaluation_report import print_table, write_report
from megatron_llave.report.provenance import describe_evaluation
from megatron_llave.report.retrieval_report import write_retrieval_report
from megatron_llave.report.table_report import write_table_report
from megatron_llave.training.logger import LOG_FILE, quiet_dependencies, read_log

BEFORE = (
    "Precision@1 before training, shown beside that of the checkpoint: the report.json of an earlier evaluation of the "
    "weights that the training started from; or, where embeddings are not kept, `initial`, which evaluates those "
    "weights now (checkpoint.init, or the random weights of train.seed)"
)


class Commands(OneLineParser):
    """The parser of the first argument. If it is not a command, the error message lists the commands in one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: the first argument must be a command: {', '.join(BENCHMARKS)}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Commands(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=OneLineParser)
    for benchmark in BENCHMARKS.values():
        add_command(commands, benchmark)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with exit_with_one_line():
        procs.require_as_started(args.procs)
        quiet_dependencies()
        cpu_emulation.enable()
        with held_output(args):
            evaluate(args.benchmark, args)
        process_groups.destroy_distributed()


def add_command(commands: argparse._SubParsersAction, benchmark: Benchmark) -> None:
    """Add a benchmark's command: its own options, and those that all commands take."""
    parser = commands.add_parser(benchmark.name, help=benchmark.about, description=benchmark.about)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint, a run's output directory, a Hugging Face folder, or the name of a model on the hub",
    )
    benchmark.add_options(parser)
    if benchmark.is_kept:
        parser.add_argument("--out", required=True, help="folder for embeddings and results; the same command resumes")
    else:
        parser.add_argument("--out", help="folder of the report; default: CKPT/evaluation, or CKPT/evaluation-average")
    if benchmark.read_tasks is not None:
        rules = " ".join(f"{name}: {rule}" for name, rule in TIES.items())
        parser.add_argument("--before", metavar="REPORT|initial", help=BEFORE)
        parser.add_argument("--ties", choices=TIES, default=benchmark.ties, help=f"{rules} Default: {benchmark.ties}")
    procs.add_option(parser)
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    parser.set_defaults(benchmark=benchmark, parser=parser)


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

"""The options of `llave evaluate`: those of each benchmark, and those that all have."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_llave.errors import OneLineParser
from megatron_llave.launch import procs

ABOUT = """Evaluate a checkpoint on a benchmark: tables, figures, and one HTML report.

llave evaluate prepared --checkpoint runs/tiny --data DIR [parallel.tensor=2 ...]
llave evaluate mmeb --checkpoint CKPT --data MMEB-eval --images IMAGES --out runs/mmeb
llave evaluate retrieval --checkpoint CKPT --queries Q.jsonl --corpus C.jsonl \\
    --judgements QRELS --out runs/mine
llave evaluate video --checkpoint CKPT --manifest MSRVTT_JSFUSION_test.csv \\
    --videos VIDEOS --out runs/msrvtt
llave evaluate mteb --checkpoint CKPT --benchmark "MIEB(lite)" --out runs/mieb

CKPT is a checkpoint, a run's output directory or a Hugging Face folder. Each command has its own --help.
"""
BEFORE = (
    "Precision@1 before training, shown beside that of the checkpoint: the report.json of an earlier evaluation of the "
    "weights that the training started from; or, where embeddings are not kept, `initial`, which evaluates those "
    "weights now (checkpoint.init, or the random weights of train.seed)"
)
TIES = {
    "first": "A query whose right candidate is exactly as similar as the best wrong one counts as right, "
    "as in the official MMEB evaluation.",
    "strict": "A query whose right candidate is exactly as similar as the best wrong one counts as wrong.",
}
"""The tie rules, and what each one does."""
VIDEO_FORMATS = {".jsonl": "manifest", ".csv": "msrvtt-csv", ".json": "msrvtt-json", ".txt": "msvd"}
"""Suffix of an annotation file -> its format."""


@dataclass(frozen=True)
class Command:
    """A benchmark as the command line sees it."""

    name: str
    about: str
    """One line for --help."""
    add_options: Callable[[argparse.ArgumentParser], None]
    """Adds the options that name the data."""
    ties: str | None = None
    """Default tie rule, a key of TIES; None: the benchmark has no Precision@1."""
    is_kept: bool = True
    """Whether embeddings and results stay in --out, which must then be given."""


class Commands(OneLineParser):
    """The parser of the first argument. If it is not a command, the error message lists the commands in one line."""

    names: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: the first argument must be a command: {', '.join(self.names)}\n")


def _add_prepared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder that llave prepare made, with its eval/")


def _add_mmeb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder with <data set>/test-00000-of-00001.parquet")
    parser.add_argument("--images", help="folder that the image paths are relative to; default: that of --data")
    parser.add_argument(
        "--subsets", type=comma_list, metavar="SET,...", help="some of its data sets, such as OK-VQA; default: all"
    )


def _add_retrieval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--queries", required=True, help="JSONL of {id, text, image}, as llave embed takes (docs/data.md)"
    )
    parser.add_argument("--corpus", required=True, help="JSONL of the candidates, likewise")
    default = "default: a candidate with the id of the query (by default the number of its line) is right"
    parser.add_argument("--judgements", help=f"TREC qrels (query 0 candidate grade) or BEIR's table; {default}")
    parser.add_argument(
        "--same-id",
        choices=("leave_out", "keep"),
        default="leave_out",
        help="a query that is in the corpus itself, under the same id: leave_out (default) takes it out of its own "
        "ranking, unless it is judged relevant to itself; keep ranks it",
    )
    parser.add_argument("--k", type=comma_list, default="1,5,10", help="depths of recall@k and ndcg@k; default: 1,5,10")


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", required=True, help="annotations: your own .jsonl, or as MSR-VTT and MSVD come")
    parser.add_argument("--videos", help="folder of the video files; default: that of --manifest")
    parser.add_argument("--format", choices=VIDEO_FORMATS.values(), help="format of --manifest; default: by its suffix")
    parser.add_argument("--list", help="file with the ids of the videos to take, such as MSVD's test_list.txt")


def _add_mteb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names of mteb's tasks, such as CIFAR10")
    parser.add_argument(
        "--benchmark", dest="suite", metavar="NAME", help='or a benchmark of mteb, such as "MIEB(lite)"'
    )
    parser.add_argument("--languages", type=comma_list, default="", help="with --tasks: subsets in these, such as eng")
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSON of instructions (docs/evaluation.md); default: the tasks'"
    )
    parser.add_argument("--keep-going", action="store_true", help="go on with the other tasks when one fails")


PREPARED = Command("prepared", "sets of a folder that llave prepare made", _add_prepared, ties="strict", is_kept=False)
MMEB = Command("mmeb", "the 36 data sets of MMEB, scored as the official evaluation does", _add_mmeb, ties="first")
RETRIEVAL = Command("retrieval", "your own queries, corpus and relevance judgements", _add_retrieval)
VIDEO = Command("video", "zero-shot text-video retrieval: MSR-VTT, MSVD, or your own", _add_video)
MTEB = Command("mteb", "tasks and benchmarks of the package mteb: MTEB, MIEB, ViDoRe, ...", _add_mteb)
COMMANDS = (PREPARED, MMEB, RETRIEVAL, VIDEO, MTEB)
"""The benchmarks of the package; evaluation/benchmarks/ has what they do."""


def comma_list(text: str) -> list[str]:
    """Values of an option that takes several, separated by commas."""
    return [value for value in text.split(",") if value]


def build_parser(commands: Iterable[Command] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Commands(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    added = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=OneLineParser)
    for command in commands:
        _add(added, command)
    parser.names = list(added.choices)
    return parser


def parse(argv: Sequence[str] | None, commands: Iterable[Command] = COMMANDS) -> argparse.Namespace:
    """Parse the command line; None: that of this process. `benchmark` of the result is the name of the benchmark."""
    args, unknown = build_parser(commands).parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _add(commands: argparse._SubParsersAction, command: Command) -> None:
    parser = commands.add_parser(command.name, help=command.about, description=command.about)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint, a run's output directory, a Hugging Face folder, or the name of a model on the hub",
    )
    command.add_options(parser)
    if command.is_kept:
        parser.add_argument("--out", required=True, help="folder for embeddings and results; the same command resumes")
    else:
        parser.add_argument("--out", help="folder of the report; default: CKPT/evaluation, or CKPT/evaluation-average")
    if command.ties is not None:
        rules = " ".join(f"{name}: {rule}" for name, rule in TIES.items())
        parser.add_argument("--before", metavar="REPORT|initial", help=BEFORE)
        parser.add_argument("--ties", choices=TIES, default=command.ties, help=f"{rules} Default: {command.ties}")
    procs.add_option(parser)
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    parser.set_defaults(benchmark=command.name, parser=parser)

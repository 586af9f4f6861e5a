"""Evaluate a checkpoint: tables, pictures, one HTML report.

torchrun --nproc-per-node 2 tools/evaluate.py --checkpoint runs/tiny --data runs/openmoji [parallel.tensor=2 ...]
torchrun --nproc-per-node 8 tools/evaluate.py mmeb --checkpoint CKPT --data MMEB-eval --images IMAGES --out runs/mmeb
torchrun --nproc-per-node 8 tools/evaluate.py retrieval --checkpoint CKPT --queries Q.jsonl --corpus C.jsonl \\
    --judgements QRELS --out runs/mine
torchrun --nproc-per-node 8 tools/evaluate.py video --checkpoint CKPT --manifest MSRVTT_JSFUSION_test.csv \\
    --videos VIDEOS --out runs/msrvtt

CKPT is a checkpoint, a run's folder or a Hugging Face folder. Without a command: the evaluation sets of a folder that
tools/prepare_data.py made. Each command has its own --help.
"""

import argparse
import os
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch.distributed as dist
from rich.progress import Progress, TextColumn

from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.config.presets import PRESETS
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.embedding.embedder import embed_parts, load_model
from megatron_llave.errors import exit_with_one_line
from megatron_llave.evaluation.benchmarks.corpus import evaluate_retrieval, read_retrieval
from megatron_llave.evaluation.benchmarks.mmeb import SETS, choose_sets, read_task
from megatron_llave.evaluation.benchmarks.prepared import read_evaluation
from megatron_llave.evaluation.benchmarks.video import FORMATS, evaluate_videos, read_videos
from megatron_llave.evaluation.evaluate import evaluate
from megatron_llave.evaluation.metrics import parse_depths
from megatron_llave.evaluation.scoring import TIES, evaluate_tasks
from megatron_llave.files import lock_folder
from megatron_llave.report.evaluation_report import print_table, write_report
from megatron_llave.report.paper_results import MMEB
from megatron_llave.training.logger import LOG_FILE, quiet_dependencies, read_log


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    prepared = add_command(commands, "prepared", prepared_sets, "sets that tools/prepare_data.py made; the default")
    prepared.add_argument("--data", required=True, help="folder that tools/prepare_data.py made, with its eval/")
    prepared.add_argument("--out", help="report folder; default: evaluation/ or, with --average, evaluation-average/")
    mmeb = add_command(commands, "mmeb", mmeb_sets, "the 36 data sets of MMEB, scored as the released code does")
    mmeb.add_argument("--data", required=True, help="folder with <data set>/test-00000-of-00001.parquet")
    mmeb.add_argument("--images", help="folder that the image paths start from; default: that of --data")
    mmeb.add_argument("--subsets", nargs="+", metavar="SET", help=f"some of {', '.join(SETS)}; default: all there are")
    mmeb.add_argument("--out", required=True, help="folder for embeddings, scores, report; the same one goes on")
    mmeb.add_argument("--ties", choices=TIES, default="first", help="strict: a tie with the right candidate is wrong")
    own = add_command(commands, "retrieval", own_retrieval, "your own queries, corpus and relevance judgements")
    own.add_argument("--queries", required=True, help="JSONL of {id, text, image}, as tools/embed.py takes")
    own.add_argument("--corpus", required=True, help="JSONL of the candidates, likewise")
    own.add_argument("--judgements", required=True, help="TREC qrels (query 0 candidate grade) or BEIR's table")
    own.add_argument("--k", nargs="+", default=["1", "5", "10"], help="of recall@k and ndcg@k (1 5 10)")
    own.add_argument("--out", required=True, help="folder for embeddings, scores, ranking; the same one goes on")
    video = add_command(commands, "video", video_sets, "zero-shot text-video retrieval: MSR-VTT, MSVD, or your own")
    video.add_argument("--manifest", required=True, help="annotations: .jsonl of your own, or as MSR-VTT and MSVD come")
    video.add_argument("--videos", help="folder of the video files; default: that of --manifest")
    video.add_argument("--format", choices=FORMATS.values(), help="of --manifest; default: by its suffix")
    video.add_argument("--list", help="file with the ids of the videos to take, such as MSVD's test_list.txt")
    video.add_argument("--out", required=True, help="folder for embeddings and scores; the same one goes on")
    given = sys.argv[1:]
    is_prepared = given and (given[0].startswith("--") or "=" in given[0]) and given[0] != "--help"
    args = parser.parse_args(["prepared", *given] if is_prepared else given)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        with held_output(args):
            args.run(args)
        process_groups.destroy_distributed()


def add_command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    """A command with what all of them take."""
    parser = commands.add_parser(name, help=about, description=about)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, a run's folder, or a Hugging Face folder")
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    parser.set_defaults(run=run)
    return parser


@contextmanager
def held_output(args: argparse.Namespace) -> Iterator[None]:
    """The folder of --out, made and held by the first rank: before hours of work, and against a second evaluation."""
    find_pretrained(args.checkpoint)  # a mistyped one leaves no folder behind
    args.out = args.out or str(Path(args.checkpoint) / ("evaluation-average" if args.average else "evaluation"))
    with lock_folder(args.out) if os.environ.get("RANK", "0") == "0" else nullcontext():
        yield


def without_overrides(given: list[str]) -> tuple[list[str], list[str]]:
    """Values of an option that takes several, and the overrides behind them, which argparse gives to it too."""
    return [one for one in given if "=" not in one], [one for one in given if "=" in one]


def prepared_sets(args: argparse.Namespace) -> None:
    """Load at the layout asked for, embed, score, and let one rank write the report."""
    inputs, sets = read_evaluation(args.data)
    model = load_model(args.checkpoint, args.data, args.overrides, args.average)
    results = evaluate(model, inputs, sets)
    if dist.get_rank() == 0:
        log = Path(args.checkpoint) / LOG_FILE
        records = read_log(log) if log.is_file() else []
        write_report(results, records, inputs, args.out)
        print_table(results)
        print(f"report, tables and pictures: {args.out}")


def mmeb_sets(args: argparse.Namespace) -> None:
    """Embed what is not there yet, score, and let one rank write the report."""
    names, overrides = without_overrides(args.subsets or [])
    tasks = [read_task(args.data, args.images or args.data, name) for name in choose_sets(args.data, names)]
    model = load_model(args.checkpoint, None, [*overrides, *args.overrides], args.average)
    with progress_bar() as progress:
        embedder = partial(embed_parts, model)
        done = evaluate_tasks(embedder, tasks, args.out, model.identity(), model.groups.dp, args.ties, progress)
    if dist.get_rank() == 0:
        inputs = ChainMap(*(task.inputs for task in tasks))
        work = {"inputs": done.num_inputs, "inputs_embedded": done.num_embedded, "sets_finished": done.num_finished}
        write_report(done.results, [], inputs, args.out, paper_means(model.cfg), {"ties": args.ties, "work": work})
        print_table(done.results)
        print(f"{done.num_finished} of {len(tasks)} sets were finished before; of the others' {done.num_inputs} inputs")
        print(f"{done.num_embedded} were embedded now, the rest before; scores, report and pictures: {args.out}")


def own_retrieval(args: argparse.Namespace) -> None:
    """Embed what is not there yet, search, and let one rank write scores and ranking."""
    given, overrides = without_overrides(args.k)
    depths = parse_depths(given)
    data = read_retrieval(args.queries, args.corpus, args.judgements)
    model = load_model(args.checkpoint, None, [*overrides, *args.overrides], args.average)
    with progress_bar() as progress:
        embedder = partial(embed_parts, model)
        scores = evaluate_retrieval(embedder, data, args.out, model.identity(), model.groups.dp, depths, progress)
    if dist.get_rank() == 0:
        for name, score in scores.items():
            print(f"{name:>14} {score:6.2f} %")
        print(f"scores and ranking: {args.out}")


def video_sets(args: argparse.Namespace) -> None:
    """Embed what is not there yet, score, and let one rank write the scores."""
    folder = args.videos or Path(args.manifest).parent
    videos = read_videos(args.manifest, folder, args.format, args.list)
    # 32 frames are up to 6720 tokens: the released evaluation of videos raises the limit too.
    model = load_model(args.checkpoint, None, ["data.max_length=8192", *args.overrides], args.average)
    with progress_bar() as progress:
        embedder = partial(embed_parts, model)
        scores = evaluate_videos(embedder, videos, folder, args.out, model.identity(), model.groups.dp, progress)
    if dist.get_rank() == 0:
        for direction, found in scores.items():
            values = "  ".join(f"{name} {value:.1f}" for name, value in found.items())
            print(f"{direction.replace('_', ' ')}: {values}")
        print(f"{len(videos)} videos, {sum(len(one.captions) for one in videos)} captions; scores: {args.out}")


def paper_means(cfg: RunConfig) -> dict[str, float] | None:
    """The paper's row for a model of these sizes."""
    width = cfg.model.language.hidden_size, cfg.model.language.num_layers
    for name, means in MMEB.items():
        language = PRESETS[name]["language"]
        if width == (language["hidden_size"], language["num_layers"]):
            return means
    return None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the first rank; the others' calls do nothing."""
    if dist.get_rank() != 0:
        yield lambda what, done, total: None
        return
    with Progress(*Progress.get_default_columns(), TextColumn("{task.completed} of {task.total}")) as bar:
        task = bar.add_task("", visible=False)  # until there is something to count
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total, visible=True)


if __name__ == "__main__":
    main()

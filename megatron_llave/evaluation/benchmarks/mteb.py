"""The tasks and benchmarks of the package mteb (MTEB, MIEB, ViDoRe, ...) for a model at any parallel layout.

mteb chooses, loads and scores the tasks, on the first rank; all ranks embed (mteb_encoder.py). Results are in mteb's
own layout: results/<model>/<revision>/<task>.json and model_meta.json. The same command reads finished tasks, and
embeds of an interrupted one what is missing. Data come from the Hugging Face hub or its cache, as mteb asks for them.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_llave.config.schema import RunConfig
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.errors import DataError, UserError, import_optional, one_line, require
from megatron_llave.evaluation.benchmark import Benchmark, Evaluate, Evaluation, ScoreTable
from megatron_llave.evaluation.mteb_encoder import DistributedEncoder, build_encoder
from megatron_llave.evaluation.mteb_instructions import (
    Instructions,
    instructions_of,
    nearest,
    own_prompts,
    read_prompts,
)
from megatron_llave.files import write_text
from megatron_llave.hub import is_name, local_folder
from megatron_llave.options import evaluate as options
from megatron_llave.options.evaluate import comma_list
from megatron_llave.planning.plan import count_parameters

logger = logging.getLogger(__name__)

MODALITIES = ("text", "image")
NEEDED = ("mteb", "datasets", "sentence_transformers")
ORGANISATION = "megatron_llave"
"""Of the model's name in mteb's files."""
REVISION_DIGITS = 16
"""Hexadecimal digits of a revision."""
BATCH_SIZE = 256
"""Rows that are read from a task's data at a time."""
TRACEBACKS = "failed"
"""Folder of the tracebacks of tasks that mteb could not finish."""


@dataclass(frozen=True)
class Chosen:
    """The tasks of an evaluation."""

    tasks: list[Any]
    """Tasks of mteb."""
    benchmark: Any = None
    """mteb's benchmark, if they are one."""

    @property
    def name(self) -> str:
        """The name of the benchmark, or those of the tasks."""
        return self.benchmark.name if self.benchmark else ", ".join(task.metadata.name for task in self.tasks)


@dataclass(frozen=True)
class Scored:
    """What mteb has found."""

    results: list[Any]
    """mteb's TaskResult of each task that it has finished."""
    failed: dict[str, str]
    """Name of each task that it could not finish -> why."""
    num_read: int
    """Number of tasks whose results were there before."""


def choose_tasks(names: Sequence[str], benchmark: str | None, languages: Sequence[str]) -> Chosen:
    """Look up tasks of mteb by their names, or the tasks of a benchmark.

    Raises:
        ConfigError: a name is unknown (the message has the nearest), no task is chosen, or a task needs more than texts
            and images, or has none of the languages.
    """
    import mteb
    from mteb.get_tasks import TASK_LIST

    require(
        bool(names) != bool(benchmark), "name the tasks with --tasks, or a benchmark with --benchmark, and not both"
    )
    require(not (benchmark and languages), "--languages goes with --tasks; a benchmark has its own languages")
    if benchmark:
        known = [each.name for each in mteb.get_benchmarks()]
        aliases = {alias for each in mteb.get_benchmarks() for alias in each.aliases or ()}
        require(benchmark in {*known, *aliases}, _unknown("--benchmark", benchmark, known))
        found = mteb.get_benchmark(benchmark)
        tasks = list(found.tasks)
    else:
        found, known = None, [task.metadata.name for task in TASK_LIST]
        for name in names:
            require(name in known, _unknown("--tasks", name, known))
        tasks = []
        for name in dict.fromkeys(names):
            chosen = mteb.get_tasks(tasks=[name], languages=list(languages) or None)
            require(bool(chosen), f"--tasks {name} has none of the --languages {', '.join(languages)}")
            tasks += chosen
    for task in tasks:
        other = [modality for modality in task.metadata.modalities if modality not in MODALITIES]
        what = f"task {task.metadata.name} needs {' and '.join(other)}"
        require(not other, f"{what}; these models are evaluated on tasks of {' and '.join(MODALITIES)}: name those")
    return Chosen(tasks, found)


def _unknown(option: str, name: str, known: Iterable[str]) -> str:
    return f"{option} {name!r} is not known to mteb {version('mteb')}{nearest(name, known)}"


def model_meta(cfg: RunConfig, identity: Mapping[str, str], instructions: Instructions, checkpoint: str) -> Any:
    """mteb's ModelMeta: the name on the hub or of the checkpoint's folder; its revision is a hash of what embeds."""
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    decisive = json.dumps([dict(identity), repr(instructions)], sort_keys=True)
    parameters = count_parameters(cfg.model)
    own = re.sub(r"[^\w.-]", "_", Path(checkpoint).resolve().name)
    name = checkpoint.split("@")[0] if is_name(checkpoint) else f"{ORGANISATION}/{own}"
    return ModelMeta(
        loader=None,
        name=name,
        revision=hashlib.sha256(decisive.encode()).hexdigest()[:REVISION_DIGITS],
        release_date=None,
        languages=None,
        n_parameters=sum(parameters.values()),
        n_embedding_parameters=cfg.model.language.vocab_size * cfg.model.language.hidden_size,
        memory_usage_mb=None,
        max_tokens=cfg.data.max_length,
        embed_dim=cfg.model.language.hidden_size,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
        modalities=list(MODALITIES),
    )


def run_tasks(encoder: DistributedEncoder, tasks: Sequence[Any], out: str | Path, keep_going: bool = False) -> Scored:
    """Give the encoder to mteb for each task in turn; only the first rank calls it, within `encoder.run`.

    Results are kept below out/results. The random numbers of a task do not depend on the tasks before it.

    Args:
        encoder: on the first rank.
        tasks: tasks of mteb.
        out: folder of the results.
        keep_going: whether the other tasks are still evaluated when mteb cannot finish one.

    Raises:
        DataError: mteb could not finish a task, whose name the message begins with; or an input cannot be embedded.
    """
    import mteb

    cache = mteb.ResultCache(out)
    _remove_damaged(cache, encoder.mteb_model_meta)
    results, failed, num_read = [], {}, 0
    for number, task in enumerate(tasks):
        encoder.embedder.progress(f"task {task.metadata.name}", number, len(tasks))
        before = encoder.num_inputs
        try:
            results += _run_task(encoder, task, cache)
        except Exception as error:
            if encoder.failure is not None:
                raise
            reason = _reason(error, task, Path(out))
            if not keep_going:
                raise DataError(f"task {task.metadata.name}: {reason}") from error
            failed[task.metadata.name] = reason
        else:
            num_read += encoder.num_inputs == before
    encoder.embedder.progress("tasks", len(tasks), len(tasks))
    return Scored(results, failed, num_read)


def _run_task(encoder: DistributedEncoder, task: Any, cache: Any) -> list[Any]:
    import mteb

    random.seed(task.seed)
    np.random.seed(task.seed)
    torch.manual_seed(task.seed)
    options = {"batch_size": BATCH_SIZE, "show_progress_bar": False}
    found = mteb.evaluate(encoder, task, cache=cache, encode_kwargs=options, show_progress_bar=False, co2_tracker=False)
    if found.exceptions:
        raise DataError(found.exceptions[0].exception)
    return found.task_results


def _reason(error: Exception, task: Any, out: Path) -> str:
    """Why mteb could not finish a task, in one line; the traceback goes into a file where it may help."""
    if isinstance(error, UserError):
        return str(error)
    data = f"{task.metadata.dataset['path']} at revision {task.metadata.dataset['revision']}"
    if isinstance(error, ConnectionError):
        hint = "run the command once where there is a network, or copy the cache from there and set HF_HOME"
        return f"its data, {data}, are not on this machine, and the Hugging Face hub is out of reach ({error}); {hint}"
    path = out / TRACEBACKS / f"{task.metadata.name.replace('/', '-')}.txt"
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(traceback.format_exception(error)))
    return f"mteb ended with {type(error).__name__}: {one_line(error)} (data: {data}; traceback: {path})"


def _remove_damaged(cache: Any, meta: Any) -> None:
    """Remove the results of which only a beginning was written, so that mteb does not stumble over them."""
    for path in cache.get_task_result_path("any", meta).parent.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            logger.warning("%s is damaged, and its task is evaluated again", path)
            path.unlink()


def means_of(chosen: Chosen, results: Sequence[Any], name: str) -> dict[str, float]:
    """Means of the scores, 0 to 1, as mteb computes them for its leaderboard; empty while a task is missing.

    Args:
        chosen: the tasks.
        results: mteb's TaskResult of each.
        name: of the model.
    """
    scores = {result.task_name: float(result.get_score()) for result in results}
    if len(scores) < len(chosen.tasks) or not scores:
        return {}
    if chosen.benchmark is not None:
        from mteb.results import BenchmarkResults, ModelResult

        model = ModelResult(model_name=name, model_revision="here", task_results=list(results))
        found = chosen.benchmark.get_score(BenchmarkResults(model_results=[model]))[name]
        return {key: float(value) for key, value in found.items() if value is not None and key != "Rank"}
    by_type: dict[str, list[float]] = {}
    for task in chosen.tasks:
        by_type.setdefault(task.metadata.type, []).append(scores[task.metadata.name])
    of_types = {kind: sum(values) / len(values) for kind, values in by_type.items()}
    mean, mean_of_types = sum(scores.values()) / len(scores), sum(of_types.values()) / len(of_types)
    return {"Mean(Task)": mean, "Mean(TaskType)": mean_of_types, **of_types}


def summarise(chosen: Chosen, scored: Scored, encoder: DistributedEncoder, out: str, prompts: str | None) -> Evaluation:
    """What is printed and reported: the score of each task, the means, and what they depend on."""
    meta = encoder.mteb_model_meta
    means = means_of(chosen, scored.results, meta.name)
    kinds = {task.metadata.name: task.metadata for task in chosen.tasks}
    rows, tasks = [], []
    for result in scored.results:
        about, score = kinds[result.task_name], float(result.get_score())
        splits = ", ".join(f"{split} ({len(values)})" for split, values in result.scores.items())
        revision = str(result.dataset_revision)
        rows.append((result.task_name, f"{100 * score:.2f}", about.main_score, about.type, splits, revision))
        names = ("task", "score", "main_score", "type", "splits", "data_revision", "mteb_version")
        tasks.append(dict(zip(names, (*rows[-1], result.mteb_version))) | {"score": score})
    table = ScoreTable(
        "Scores",
        "The main score of each task in percent, and the means as mteb computes them; a split with its subsets.",
        ("task", "score", "main score", "type", "splits", "revision of the data"),
        rows,
        [(name, f"{100 * value:.2f}", "", "", "", "") for name, value in means.items()],
    )
    seeds = sorted({task.seed for task in chosen.tasks})
    about = {
        "data": chosen.name,
        "mteb": f"{version('mteb')}, datasets {version('datasets')}, seed {', '.join(map(str, seeds))}",
        "model in mteb's files": f"{meta.name}, revision {meta.revision}",
        "instructions": f"{prompts or 'without --prompts'}: {json.dumps(asdict(encoder.instructions))}",
    }
    failed = [f"task {name}: {reason}" for name, reason in scored.failed.items()]
    numbers = {"benchmark": chosen.name, "means": means, "tasks": tasks, "failed": scored.failed}
    printed = [f"{name:>40} {score:>7} %" for name, score, *_ in [*rows, *table.means]]
    finished = f"{scored.num_read} of {len(chosen.tasks)} tasks were finished before"
    embedded = f"{encoder.num_embedded} of {encoder.num_inputs} inputs were embedded now"
    results = Path(out) / "results" / meta.model_name_as_path() / meta.revision
    lines = [*printed, *failed, f"{finished}; {embedded}", f"mteb's results: {results}; report: {out}"]
    failure = (
        f"{len(failed)} of {len(chosen.tasks)} tasks are without a score: {', '.join(scored.failed)}" if failed else ""
    )
    return Evaluation(lines, tables=[table], numbers=numbers, about=about, failure=failure)


def _quieten() -> None:
    """Keep retries, progress bars and warnings about scores of libraries from the lines of this evaluation."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("mteb").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"sklearn|scipy|mteb")


def _overrides(args: argparse.Namespace) -> list[str]:
    """The overrides behind --tasks, which takes all words up to the next option."""
    return [word for word in args.tasks if "=" in word]


def _read_evaluation(args: argparse.Namespace) -> Evaluate:
    chosen, prompts = None, {}
    if os.environ.get("RANK", "0") == "0":  # mteb takes seconds and memory to import
        _quieten()
        for package in NEEDED:
            import_optional(package, "this benchmark needs", "pip install mteb sentence-transformers (the extra mteb)")
        names = [name for word in args.tasks if "=" not in word for name in comma_list(word)]
        chosen = choose_tasks(names, args.suite, args.languages)
        prompts = own_prompts(local_folder(args.checkpoint), chosen.tasks)
        prompts |= read_prompts(args.prompts, chosen.tasks) if args.prompts else {}

    def evaluate(embedder: CachedEmbedder) -> Evaluation:
        assert embedder.cfg is not None
        cfg, is_first = embedder.cfg, dist.get_rank() == 0
        instructions = instructions_of(cfg, prompts)
        meta = model_meta(cfg, embedder.identity, instructions, args.checkpoint) if is_first else None
        encoder = build_encoder(embedder, cfg.model.language.hidden_size, instructions, meta)
        work: Callable[[], Scored] = partial(
            run_tasks, encoder, chosen.tasks if chosen else [], args.out, args.keep_going
        )
        scored = encoder.run(work)
        return Evaluation([]) if scored is None else summarise(chosen, scored, encoder, args.out, args.prompts)

    return evaluate


BENCHMARK = Benchmark(
    **vars(options.MTEB),
    read_evaluation=_read_evaluation,
    overrides=_overrides,
)

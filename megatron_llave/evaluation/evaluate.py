"""Evaluates a model on tasks: embeds the inputs that are missing, scores each task, keeps results in a folder if asked.

Used by llave evaluate and by training. A folder holds embeddings/<inputs>/ (embedding/cache.py), <set>_result.json,
and <set>_pred.txt and <set>_score.json as the official MMEB evaluation writes them. After a stop, the same call embeds
only the parts that are missing and reads the results of finished sets.
"""

import hashlib
import json
import logging
import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Module

from megatron_llave.batch import Side
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.embedding.cache import CachedEmbedder, require_same_model
from megatron_llave.embedding.embedder import LoadedModel, embed_parts
from megatron_llave.errors import DataError, NotFiniteError
from megatron_llave.evaluation.benchmarks import mmeb, prepared
from megatron_llave.evaluation.scoring import score_task
from megatron_llave.evaluation.task import SetResult, Task
from megatron_llave.files import VERSION, read_json, write_json, write_text
from megatron_llave.models import build_processor

logger = logging.getLogger(__name__)

FORMAT = "megatron_llave ranking result"

Scores = dict[str, float]
"""Set -> Precision@1 in percent; NaN where embeddings are not finite."""


@dataclass(frozen=True)
class Evaluated:
    """The results of a call of evaluate_tasks, and how much of them was there before."""

    results: list[SetResult]
    num_finished: int
    """Number of sets that were finished before."""
    num_inputs: int
    """Number of inputs of the other sets."""
    num_embedded: int
    """Number of inputs embedded by this call, over all ranks."""


def evaluate_tasks(embedder: CachedEmbedder, tasks: Sequence[Task], ties: str) -> Evaluated:
    """Embed and score every task that is not finished; all ranks get the same results.

    Args:
        embedder: embeds the inputs; its folder, if it has one, keeps the results too. All ranks share the scoring.
        tasks: tasks with different names; inputs with the same name are the same inputs.
        ties: tie rule, a key of options.evaluate.TIES.

    Raises:
        DataError: an image is missing or damaged, the folder is of another model, or the disk is full.
        NotFiniteError: an embedding is not finite.
    """
    finished = _finished(embedder, tasks, ties)
    unscored = {task.inputs.name: task.inputs for task, result in zip(tasks, finished) if result is None}
    caches = dict(zip(unscored, embedder.embed(list(unscored.values()))))
    results = []
    for number, (task, result) in enumerate(zip(tasks, finished)):
        embedder.progress("scoring", number, len(tasks))
        if result is None:
            cache = caches[task.inputs.name]
            result = score_task(task, cache.rows, ties, dist.group.WORLD)
            if embedder.folder is not None and dist.get_rank() == 0:
                origin = {"model": embedder.identity, "task": task.digest, "files": cache.claimed_files, "ties": ties}
                _write(result, task, Path(embedder.folder), origin)
        results.append(result)
    embedder.progress("scoring", len(tasks), len(tasks))
    dist.barrier()  # whichever rank returns first finds everything written
    num_embedded = sum(cache.num_embedded for cache in caches.values())
    num_finished = sum(result is not None for result in finished)
    return Evaluated(results, num_finished, sum(map(len, unscored.values())), num_embedded)


def build_evaluation(
    cfg: RunConfig,
    chunks: list[Module],
    groups: ProcessGroupCollection,
    progress: Callable[[str], None],
    show: Callable[[list[SetResult], Mapping[str, Side]], None] | None = None,
) -> tuple[Callable[[], Scores], dict[str, int]]:
    """Build a function that evaluates the model in training, as it is, on the sets in evaluate.path.

    Ties count as wrong in sets of a prepared folder, and as right in those of MMEB. If an embedding is not finite, the
    function warns and returns NaN for every set: train.max_bad_steps decides whether such a run continues.

    Args:
        cfg: evaluate.path, evaluate.images and evaluate.sets choose the sets.
        chunks: the model in training.
        groups: its process groups.
        progress: called with what is being done, for each input that is read and each row that is embedded.
        show: called with the results of each evaluation and the inputs by their keys; None: nothing is.

    Returns:
        The function, and the number of different candidates of each set.

    Raises:
        ConfigError: evaluate.sets names an unknown set.
        DataError: the sets cannot be read, or one of their images is missing.
    """
    folder, names = Path(cfg.evaluate.path or cfg.data.path), cfg.evaluate.sets
    if prepared.is_prepared(folder):
        tasks, ties = prepared.read_tasks(folder, names), prepared.BENCHMARK.ties
    else:
        images, ties = cfg.evaluate.images or folder, mmeb.BENCHMARK.ties
        tasks = [mmeb.read_task(folder, images, name) for name in mmeb.choose_sets(folder, names, "evaluate.sets")]
    for task in tasks:
        task.inputs.require_files()
    model = LoadedModel(cfg, chunks, build_processor(cfg.data, cfg.model), groups, progress)
    embedder = CachedEmbedder(partial(embed_parts, model), None, {}, groups.dp)

    def scores() -> Scores:
        results = []
        for _, alike in groupby(tasks, key=lambda task: id(task.inputs)):  # bounds the embeddings held at a time
            results += evaluate_tasks(embedder, list(alike), ties).results
        if show is not None:
            show(results, ChainMap(*{task.inputs.name: task.inputs for task in tasks}.values()))
        return {result.name: result.precision_at_1 for result in results}

    def run() -> Scores:
        for chunk in chunks:
            chunk.eval()
        try:
            return scores()
        except NotFiniteError as error:  # raised on all ranks alike, since embeddings in memory are gathered
            if dist.get_rank() == 0:
                logger.warning("no evaluation: %s", error)
            return {task.name: math.nan for task in tasks}
        finally:
            for chunk in chunks:
                chunk.train()

    return run, {task.name: task.num_candidates for task in tasks}


def _finished(embedder: CachedEmbedder, tasks: Sequence[Task], ties: str) -> list[SetResult | None]:
    """Results that are in the folder already, as the first rank reads them.

    Raises:
        DataError: a result is of another model.
    """
    if embedder.folder is None:
        return [None] * len(tasks)
    # All ranks take what the first one has read: on a network file system the others might see something else.
    return from_first_rank(lambda: [_read(embedder, task, ties) for task in tasks])


def _read(embedder: CachedEmbedder, task: Task, ties: str) -> SetResult | None:
    """The finished result, if it is of this task with its files as they are now.

    Raises:
        DataError: the result is of another model.
    """
    path = Path(embedder.folder) / f"{task.name}_result.json"
    if not path.is_file() or not _score_file(path.parent, task).is_file():
        return None
    try:
        recorded = read_json(path, FORMAT, "")
        model, origin = recorded["model"], (recorded["task"], recorded["files"], recorded["ties"])
        if recorded["sha256"] != _digest(recorded["result"]):
            return None
        result = SetResult(**recorded["result"])
        result.hardest_negative = [-math.inf if x is None else x for x in result.hardest_negative]
        per_query = (result.positive, result.hardest_negative, result.top, result.positives, result.queries)
        is_complete = all(len(values) == result.num_queries for values in per_query)
    except (DataError, KeyError, TypeError):
        return None  # damaged: it is made again from the embeddings
    require_same_model(path, model, embedder.identity)
    is_same = origin == (task.digest, embedder.cache(task.inputs).digest_of_files(), ties)
    return result if is_complete and is_same else None


def _write(result: SetResult, task: Task, out: Path, origin: dict[str, Any]) -> None:
    """Write the result, and the official evaluation's two files; the score comes last and marks a finished set."""
    best = [result.candidates[row[0]] for row in result.top]
    predicted = [task.inputs.entries[task.inputs.index(key)] for key in best]
    try:
        _score_file(out, task).unlink(missing_ok=True)
        hardest = [x if math.isfinite(x) else None for x in result.hardest_negative]  # JSON has no infinity
        values = {**asdict(result), "hardest_negative": hardest}
        head = {"format": FORMAT, "version": VERSION, **origin, "sha256": _digest(values)}
        write_json(out / f"{task.name}_result.json", {**head, "result": values})
        lines = (f"{(item.text, ''.join(item.files))}\n" for item in predicted)
        write_text(out / f"{task.name}_pred.txt", "".join(lines))
        correct = round(result.precision_at_1 * result.num_queries / 100)
        score = {"acc": correct / result.num_queries, "num_correct": correct, "num_pred": result.num_queries}
        write_text(_score_file(out, task), json.dumps(score, indent=4))  # byte for byte as the official evaluation
    except OSError as error:
        raise DataError(f"{out}: results of {task.name} cannot be written: {error.strerror}") from error


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of a result, which is the same after it has been written and read."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _score_file(out: Path, task: Task) -> Path:
    return out / f"{task.name}_score.json"

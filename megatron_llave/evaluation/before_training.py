"""The scores before training, which an evaluation shows beside its own: llave evaluate prepared --before.

A score says little without them: a model with random weights may already be far above chance.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_llave.checkpoint.folders import POSITION, read_position
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.embedder import LoadedModel
from megatron_llave.errors import CheckpointError, DataError, require
from megatron_llave.evaluation.task import SetResult, Task
from megatron_llave.files import read_json
from megatron_llave.models import build_model

INITIAL = "initial"
"""Value of --before that evaluates the weights that the run started from."""
REPORT = "report.json"


def initial_model(model: LoadedModel) -> LoadedModel:
    """Build a second model beside a trained one, with the weights that its run started from.

    These are the weights in checkpoint.init or, without it, the random ones of train.seed, as training draws them.

    Raises:
        CheckpointError: the checkpoint was not trained here, or the weights in checkpoint.init are gone.
    """
    source, cfg = model.source, model.cfg
    if source is None or source.is_hf or read_position(source.folder) is None:
        folder = "the model" if source is None else source.folder
        hint = f"evaluate the weights before training by themselves, and give their {REPORT}"
        raise CheckpointError(f"--before {INITIAL}: {folder} has no {POSITION}, so no training run saved it; {hint}")
    start = find_pretrained(cfg.checkpoint.init) if cfg.checkpoint.init else None
    seed = None if start else cfg.train.seed
    chunks = build_model(cfg.model, cfg.parallel, model.groups, device(), seed)
    if start is not None:
        start.load(chunks, model.groups, base=cfg.lora.base)
    for chunk in chunks:
        chunk.eval()
    return replace(model, chunks=chunks, source=start, average=False)


def read_scores(path: str | Path, tasks: Sequence[Task], ties: str) -> dict[str, float]:
    """Read Precision@1 in percent of the sets that a report of an earlier evaluation has, by name.

    Args:
        path: a report.json, or its folder.
        tasks: the tasks of this evaluation.
        ties: their tie rule.

    Raises:
        DataError: the file is not a report.
        ConfigError: it has none of the sets, has one with other queries or candidates, or was scored by another rule.
    """
    path = Path(path)
    path = path / REPORT if path.is_dir() else path
    report = read_json(path, hint=f"--before takes `{INITIAL}` or the {REPORT} of an earlier evaluation")
    try:
        scored = {entry["name"]: entry for entry in report["sets"]}
        scores = {name: float(entry["precision_at_1"]) for name, entry in scored.items()}
        counts = {name: (entry["num_queries"], entry["num_candidates"]) for name, entry in scored.items()}
        rule = report["ties"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not the {REPORT} of an evaluation: {type(error).__name__} {error}") from error
    require(rule == ties, f"--before: {path} was scored with --ties {rule}, and this evaluation uses {ties}")
    known = [task for task in tasks if task.name in scores]
    require(len(known) > 0, f"--before: {path} has none of these sets: {', '.join(task.name for task in tasks)}")
    for task in known:
        here = (len(task.queries), task.num_candidates)
        there = counts[task.name]
        message = f"--before: set {task.name} has {there[0]} queries and {there[1]} candidates in {path}, but"
        require(here == there, f"{message} {here[0]} and {here[1]} here")
    return {task.name: scores[task.name] for task in known}


def with_scores(results: Sequence[SetResult], before: dict[str, float]) -> list[SetResult]:
    """The results with the scores before training of those sets that `before` has."""
    return [replace(result, before_training=before.get(result.name)) for result in results]

"""Where the numbers of an evaluation come from: which weights, data, settings and program versions."""

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch.distributed as dist

from megatron_llave.checkpoint.folders import require_intact
from megatron_llave.config.redact import without_secrets
from megatron_llave.embedding.embedder import LoadedModel
from megatron_llave.evaluation.task import Task
from megatron_llave.hub import name_of
from megatron_llave.models import family_of
from megatron_llave.planning.plan import count_parameters
from megatron_llave.report.html_page import Section
from megatron_llave.versions import program_versions

FINGERPRINT = 16
"""Number of hexadecimal digits of the fingerprint of the evaluation sets."""


def describe_evaluation(model: LoadedModel, tasks: Sequence[Task], data: str) -> dict[str, Any]:
    """What a report says about its evaluation, by name.

    Args:
        model: the model that was evaluated, as `load_model` returns it.
        tasks: the evaluation sets, if they are tasks; their fingerprint depends on the inputs and on their order.
        data: where the sets were read from.

    Raises:
        CheckpointError: the checkpoint is not complete any more.
    """
    assert model.source is not None
    cfg, source = model.cfg, model.source
    parameters = sum(count_parameters(cfg.model).values())
    step = None if source.is_hf else require_intact(source.folder)["step"]
    digest = hashlib.sha256("".join(task.digest for task in tasks).encode()).hexdigest()[:FINGERPRINT]
    about = {
        "checkpoint": name_of(source.folder) or str(source.folder),
        "step": step,
        "averaged weights": model.average,
        "model": f"{cfg.model.family}, preset {cfg.model.preset or 'none'}, {parameters / 1e6:,.4g} M parameters",
        "data": without_secrets(data),
        **({"fingerprint of the sets": digest} if tasks else {}),
        "command": shlex.join(map(without_secrets, sys.argv)),
        "processes": dist.get_world_size(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": program_versions(),
        "precision": cfg.model.precision,
        **family_of(cfg.model).input_settings(cfg.data, cfg.model),
    }
    if step:
        loss, init = cfg.loss, without_secrets(cfg.checkpoint.init or "random weights")
        about["training"] = (
            f"seed {cfg.train.seed}, {cfg.train.global_batch_size} pairs per step, negatives {loss.negatives}, "
            f"hard negatives {cfg.data.hard_negatives}, temperature {loss.temperature:g}, alpha {loss.alpha:g}, "
            f"learning rate {cfg.optimizer.learning_rate:g}, started from {init}"
        )
    return about


def head_line(about: Mapping[str, Any]) -> str:
    """The first line of a report: checkpoint, step, data and date."""
    return ", ".join(f"{name} {about[name]}" for name in ("checkpoint", "step", "data", "date") if name in about)


def about_section(about: Mapping[str, Any]) -> Section:
    """The section of a report that says all of it."""
    rows = [(name, "none" if value is None else str(value)) for name, value in about.items()]
    return Section("About this evaluation", "", ("what", "value"), rows)

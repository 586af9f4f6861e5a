"""What the card of an exported model says about its training: recipe, data, scores, program versions, configuration.

All of it comes from the files of the checkpoint and of the output directory that it lies in. Paths of the machine are
left out: of a folder or file only its own name is told.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf

from megatron_llave.checkpoint import folders
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json
from megatron_llave.training.logger import EVALUATIONS_FILE


def without_paths(value: Any) -> Any:
    """Return a configuration, or a value in it, in which each text with a slash is what follows its last slash."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def shared_config(cfg: RunConfig) -> str:
    """Return the configuration of a run in YAML, without paths."""
    return OmegaConf.to_yaml(OmegaConf.create(without_paths(asdict(cfg))))


def training_record(folder: Path, cfg: RunConfig) -> str:
    """Return sections of the card, in Markdown: recipe, data and scores; for a checkpoint of a run.

    Args:
        folder: the checkpoint. The scores are those of the last evaluation up to it, if it lies in its output
            directory.
        cfg: the configuration in it.

    Raises:
        CheckpointError: a file of the checkpoint is damaged.
    """
    manifest = folders.require_intact(folder)
    lines = ["## Recipe", "", *_table(("what", "value"), _recipe(cfg, manifest))]
    position = folder / folders.POSITION
    if position.is_file():
        subsets = read_json(position, error=CheckpointError).get("subsets") or {}
        rows = [(name, s.get("pairs"), s.get("weight"), s.get("taken")) for name, s in subsets.items()]
        lines += ["", "## Data", "", f"Shards in `{PurePath(cfg.data.path).name}`:", ""]
        lines += _table(("subset", "pairs", "weight", "pairs drawn so far"), rows)
    evaluation = _last_evaluation(folder, manifest["step"])
    if evaluation is not None:
        scores, candidates = evaluation["precision_at_1"], evaluation.get("candidates") or {}
        rows = [(name, _number(score), candidates.get(name)) for name, score in scores.items()]
        lines += ["", "## Scores", "", f"Precision@1 in percent after {evaluation['step']} steps:", ""]
        lines += _table(("set", "Precision@1", "candidates"), rows)
    return "\n".join(["", *lines, ""])


def _recipe(cfg: RunConfig, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    loss, optimizer, train = cfg.loss, cfg.optimizer, cfg.train
    yield "steps", f"{manifest['step'] or train.steps} of {train.steps}, {train.global_batch_size} pairs each"
    negatives = f"negatives of the {loss.negatives.replace('_', ' ')}, {cfg.data.hard_negatives} hard ones per pair"
    hardness = f"alpha {loss.alpha:g} (hardness {loss.hardness}, reward {loss.reward})"
    yield "loss", f"hardness-weighted contrastive, temperature {loss.temperature:g}, {hardness}, {negatives}"
    rates = "".join(f", {part} {rate:g}" for part, rate in optimizer.part_learning_rates.items())
    moments = f"betas {optimizer.beta1:g} and {optimizer.beta2:g}, weight decay {optimizer.weight_decay:g}"
    warmup = optimizer.warmup_steps or round(optimizer.warmup_fraction * train.steps)
    schedule = f"{warmup} steps of warmup, cosine to {optimizer.min_learning_rate:g}"
    rate = f"learning rate {optimizer.learning_rate:g}{rates}"
    yield "optimizer", f"AdamW, {rate}, {schedule}, {moments}, gradients clipped at {optimizer.clip_gradient:g}"
    if cfg.lora.rank:
        targets = ", ".join(cfg.lora.targets)
        yield "LoRA", f"rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g}, dropout {cfg.lora.dropout:g}, on {targets}"
    frozen = "all weights but the adapters" if cfg.lora.rank else ", ".join(cfg.model.freeze) or "none"
    yield "frozen parts", frozen
    yield "started from", PurePath(cfg.checkpoint.init).name if cfg.checkpoint.init else "random weights"
    yield "precision, kernels", f"{cfg.model.precision}, {cfg.model.kernels}"
    if manifest["layout"]:
        yield "parallel ranks", ", ".join(f"{name} {size}" for name, size in manifest["layout"].items())
    yield "seed", str(train.seed)
    if "programs" in manifest:
        yield "programs", manifest["programs"]


def _table(head: Sequence[str], rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> list[str]:
    cells = [["" if value is None else str(value).replace("|", "\\|") for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *cells)]


def _number(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.1f}"


def _last_evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the last evaluation of the run up to a step; None: there is none, or no output directory."""
    file = folder.absolute().parents[1] / EVALUATIONS_FILE
    if folder.absolute().parent.name != folders.FOLDER or not file.is_file():
        return None
    found = None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step and isinstance(record["precision_at_1"], dict):
                found = record
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed
    return found

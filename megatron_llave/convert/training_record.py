"""What the card of an exported model says about its training: recipe, data, scores, program versions, configuration.

All of it comes from the files of the checkpoint and of the output directory that it lies in. Paths of the machine and
secrets are left out (config/redact.py). Of weights that no run has written, it says whether they are converted or
merged.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.merged_parts import is_merged, read_parts
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.redact import A_COMMAND, config_without_paths, own_name
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json
from megatron_llave.hub import is_pinned
from megatron_llave.training.logger import EVALUATIONS_FILE

MERGED = "Merged from several checkpoints; what follows is the configuration of the first"
CONVERTED = "Converted, not trained: the weights are those the conversion started from."
TRAINED = "Trained by megatron_llave; the configuration:"
WEIGHTED_MEAN = "Merged: the weights are the weighted mean of those of several checkpoints"
FIRST = "The configuration of the first of them:"
NO_RECIPE = "No run has trained the first of them, whose configuration a merged checkpoint has; so no recipe is told."


def shared_config(folder: Path, cfg: RunConfig) -> str | None:
    """Return the configuration of the run of a checkpoint in YAML, without paths; None: no run has trained it.

    The arguments are those of `training_record`.

    Raises:
        CheckpointError: a file of the checkpoint is damaged.
    """
    if not cfg.train.steps:
        return None
    head = f"# {MERGED}.\n" if is_merged(folders.require_intact(folder), cfg) else ""
    return head + OmegaConf.to_yaml(OmegaConf.create(config_without_paths(asdict(cfg))))


def training_record(folder: Path, cfg: RunConfig) -> str:
    """Return the last sections of the card, in Markdown: training and, of a run's weights, recipe, data and scores.

    Args:
        folder: the checkpoint. The scores are those of the last evaluation up to it, if it lies in its output
            directory.
        cfg: the configuration in it.

    Raises:
        CheckpointError: a file of the checkpoint is damaged.
    """
    manifest = folders.require_intact(folder)
    lines = ["## Training", "", *_origin(folder, cfg, manifest)]
    config = shared_config(folder, cfg)
    if config is not None:
        lines += ["", "```yaml", config.strip(), "```", "", *_run_sections(folder, cfg, manifest)]
    return "\n".join(["", *lines, ""])


def _origin(folder: Path, cfg: RunConfig, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that say where the weights came from, and what follows."""
    if not is_merged(manifest, cfg):
        init = cfg.checkpoint.init or ""
        converted = f"{CONVERTED} They are those of {init}." if is_pinned(init) else CONVERTED
        yield TRAINED if cfg.train.steps else converted
        return
    parts = [(part.name, f"{part.share:g}", part.weights) for part in read_parts(manifest, folder)]
    yield from [f"{WEIGHTED_MEAN}{':' if parts else '.'}", ""]
    if parts:
        yield from [*_table(("checkpoint", "share", "its weights"), parts), ""]
    yield FIRST if cfg.train.steps else NO_RECIPE


def _run_sections(folder: Path, cfg: RunConfig, manifest: Mapping[str, Any]) -> list[str]:
    """Return the sections about the run whose configuration the checkpoint has."""
    lines = ["## Recipe", "", *_table(("what", "value"), _recipe(cfg, manifest))]
    position = folder / folders.POSITION
    if position.is_file():
        subsets = read_json(position, error=CheckpointError).get("subsets") or {}
        rows = [(name, s.get("pairs"), s.get("weight"), s.get("taken")) for name, s in subsets.items()]
        place = own_name(cfg.data.path)
        told = "that a command fetches" if place == A_COMMAND else f"in `{place}`"
        lines += ["", "## Data", "", f"Shards {told}:", ""]
        lines += _table(("subset", "pairs", "weight", "pairs drawn so far"), rows)
    evaluation = last_evaluation(folder, manifest["step"])
    if evaluation is not None:
        scores, candidates = evaluation["precision_at_1"], evaluation.get("candidates") or {}
        rows = [(name, _number(score), candidates.get(name)) for name, score in scores.items()]
        lines += ["", "## Scores", "", f"Precision@1 in percent after {evaluation['step']} steps:", ""]
        lines += _table(("set", "Precision@1", "candidates"), rows)
    return lines


def _recipe(cfg: RunConfig, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    optimizer, train = cfg.optimizer, cfg.train
    if is_merged(manifest, cfg):
        yield "weights", MERGED
    else:
        yield "steps", f"{manifest['step']} of {train.steps}, {train.global_batch_size} pairs each"
    general = _loss(cfg.loss, cfg.data.hard_negatives)
    yield "loss", general
    for name in cfg.data.subsets:
        own = _loss(loss_of_subset(cfg, name), cfg.data.hard_negatives)
        if own != general:
            yield f"loss of {name}", own
    if cfg.data.negatives:
        yield "mined hard negatives", own_name(cfg.data.negatives)
    if cfg.data.order:
        yield "mined hard batches", own_name(cfg.data.order)
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
    yield "started from", own_name(cfg.checkpoint.init) if cfg.checkpoint.init else "random weights"
    yield "precision, kernels", f"{cfg.model.precision}, {cfg.model.kernels}"
    if manifest["layout"]:
        yield "parallel ranks", ", ".join(f"{name} {size}" for name, size in manifest["layout"].items())
    yield "seed", str(train.seed)
    if "programs" in manifest:
        yield "programs", manifest["programs"]


def _loss(loss: LossConfig, hard_negatives: int) -> str:
    temperature = f"temperature {loss.temperature:g}"
    if loss.temperature_learning != "none":
        number = "one for all subsets" if loss.temperature_learning == "one" else "one for each subset"
        temperature = f"temperature learned from {loss.temperature:g} on ({number})"
    if loss.objective == "cosent":
        return f"CoSENT, {temperature}, negatives {loss.negatives}"
    hardness = f"alpha {loss.alpha:g} (hardness {loss.hardness}, reward {loss.reward})"
    negatives = f"negatives {loss.negatives}, {hard_negatives} hard ones per pair"
    contrastive = f"hardness-weighted contrastive, {temperature}, {hardness}, {negatives}"
    if loss.soft_labels is None:
        return contrastive
    student = loss.soft_label_student_temperature
    temperatures = f"temperature {loss.soft_label_temperature:g}" + (f", student {student:g}" if student else "")
    soft = f"{loss.soft_label_loss} against soft labels ({loss.soft_labels}, {temperatures})"
    return f"{loss.contrastive_weight:g} x {contrastive}; plus {loss.soft_label_weight:g} x {soft}"


def _table(head: Sequence[str], rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> list[str]:
    cells = [["" if value is None else str(value).replace("|", "\\|") for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *cells)]


def _number(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.1f}"


def last_evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """Return the last evaluation of the run up to a step; None: there is none, or no output directory."""
    parent = folder.absolute().parent
    file = parent.parent / EVALUATIONS_FILE
    if parent.name != folders.FOLDER or not file.is_file():
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

"""Start of a run: which weights or checkpoint it starts from, how many steps it has, and its output directory.

`train` calls these functions in order. The first rank looks at the files and tells all others what it found, so that
all ranks take the same way.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.assets import start_assets
from megatron_llave.checkpoint.async_writer import layout
from megatron_llave.checkpoint.pretrained import Base, Pretrained, read_base
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.checks import require_same_adapters, validate
from megatron_llave.config.load import save_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.pipeline import steps_of_epochs
from megatron_llave.data.tokenizer import find_tokenizer
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.errors import CheckpointError, ConfigError, require
from megatron_llave.hub import is_name, is_pinned, name_of

logger = logging.getLogger(__name__)

AUTO = "auto"


def starting_from(pretrained: Pretrained, cfg: RunConfig) -> RunConfig:
    """Return `cfg` with the vocabulary and, unless it names one, the tokenizer of the weights that the run starts from.

    A model of the hub gets the commit that it has now, so that the run's files say which weights these are.

    Raises:
        ConfigError: cfg.model gives other sizes than the weights have, or cfg.lora has other adapters than they have.
    """
    tokenizer = cfg.data.tokenizer or pretrained.find_tokenizer()
    init = name_of(pretrained.folder) or cfg.checkpoint.init
    cfg = replace(
        cfg,
        model=pretrained.adopt(cfg.model),
        data=replace(cfg.data, tokenizer=tokenizer),
        checkpoint=replace(cfg.checkpoint, init=init),
    )
    validate(cfg)
    if pretrained.cfg.lora.rank:
        remedy = "lora.rank=0 merges them and trains all weights"
        require_same_adapters(cfg.lora, pretrained.cfg.lora, str(pretrained.folder), remedy)
    return cfg


def with_former_init(cfg: RunConfig) -> RunConfig:
    """Return `cfg` with the commit that the run began from, where it is resumed and names a model of the hub again.

    Raises:
        CheckpointError: checkpoint.resume names no checkpoint.
    """
    init, resume = cfg.checkpoint.init or "", cfg.checkpoint.resume
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if is_pinned(init) or not is_name(init) or resume is None and not is_restart:
        return cfg
    folder = Path(cfg.train.output) if resume in (None, AUTO) else folders.find(resume)
    before = folders.saved_config(folder).checkpoint.init if (folder / folders.CONFIG).is_file() else None
    is_same = before is not None and is_pinned(before) and before.split("@")[0] == init.split("@")[0]
    return replace(cfg, checkpoint=replace(cfg.checkpoint, init=before)) if is_same else cfg


def base_of(cfg: RunConfig, pretrained: Pretrained | None, resumed: Path | None) -> Base | None:
    """Return which weights the run trains adapters for, if its checkpoints leave them out; found by the first rank.

    Raises:
        CheckpointError: the checkpoint `resumed` has adapters for others.
    """
    if pretrained is None or not cfg.lora.leaves_out_base and not _leaves_out_base(resumed):
        return None
    base = from_first_rank(lambda: pretrained.as_base(cfg.lora.base))
    if _leaves_out_base(resumed):
        before = read_base(resumed)
        if before.sha256 != base.sha256:
            what = f"checkpoint {resumed} has adapters for the weights that were in {before.source}, and {base.source}"
            hint = "resume with the checkpoint.init of its run"
            raise CheckpointError(f"{what}, of checkpoint.init={cfg.checkpoint.init}, holds others (SHA-256); {hint}")
    return base if cfg.lora.leaves_out_base else None


def needs_weights(resumed: Path | None) -> bool:
    """Whether the run gets weights from checkpoint.init: it is new, or its checkpoint leaves them out."""
    return resumed is None or _leaves_out_base(resumed)


def _leaves_out_base(checkpoint: Path | None) -> bool:
    return checkpoint is not None and folders.saved_config(checkpoint).lora.leaves_out_base


def with_steps(cfg: RunConfig) -> RunConfig:
    """Return `cfg` with train.steps, computed from train.epochs if it is not given.

    Raises:
        ConfigError: neither of them is given.
        DataError: the data set's index cannot be read.
    """
    if cfg.train.steps:
        return cfg
    require(cfg.train.epochs > 0, f"train.steps={cfg.train.steps} must be at least 1, or train.epochs be given")
    steps = from_first_rank(lambda: steps_of_epochs(cfg))
    require(steps >= 1, f"train.epochs={cfg.train.epochs} has not one step of {cfg.train.global_batch_size} pairs")
    return replace(cfg, train=replace(cfg.train, steps=steps))


def find_checkpoint(cfg: RunConfig) -> Path | None:
    """Return the checkpoint that the run resumes from, looked up by the first rank, or None for a new run.

    Raises:
        ConfigError: the run is new, but its output directory has checkpoints.
        CheckpointError: the checkpoint that was named is incomplete.
    """
    return from_first_rank(lambda: _find_checkpoint(cfg))


def _find_checkpoint(cfg: RunConfig) -> Path | None:
    output, resume = cfg.train.output, cfg.checkpoint.resume
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (resume is None or folders.all_steps(output)):
        resume = AUTO  # torchrun has started this run again, which may have got beyond what it began with
    if resume is None:
        steps = folders.all_steps(output)
        hint = "--resume auto resumes it; for a new run choose another train.output"
        require(not steps, f"train.output={output} has a checkpoint after {max(steps, default=0)} steps: {hint}")
        return None
    if resume != AUTO:
        folder = folders.find(resume)
        if folders.require_complete(folder)["layout"] is None:
            hint = "start a new run from it with checkpoint.init"
            raise CheckpointError(f"checkpoint {folder} holds weights alone, which no run can resume from; {hint}")
        for left in folders.abandon_later(output, folder):
            logger.warning("going back to %s: the later %s is now %s", folder, left.stem, left)
        return folder
    folder = folders.newest_usable(output, lambda problem: logger.warning("not resumed from: %s", problem))
    steps = folders.all_steps(output)
    require(folder is not None or not steps, f"train.output={output}: none of its {len(steps)} checkpoints is usable")
    if folder:
        logger.info("resuming from %s", folder)
    else:
        logger.info("no checkpoint in %s: a new run", output)
    return folder


def resume(state: TrainingState, folder: Path, cfg: RunConfig) -> int:
    """Load checkpoint `folder` and return the number of steps that were done when it was saved.

    Raises:
        CheckpointError: the checkpoint is of another model, or cannot be loaded.
    """
    manifest = folders.require_complete(folder)
    changed = folders.require_same_run(folder, cfg)
    if changed and dist.get_rank() == 0:
        logger.warning("since checkpoint %s changed: %s", folder, "; ".join(changed))
    is_same_layout = manifest["layout"] == layout(state.groups, cfg)
    state.load(folder, manifest["step"], is_same_layout)
    return manifest["step"]


def make_folder(cfg: RunConfig, pretrained: Pretrained | None, base: Base | None = None) -> Path:
    """Write the merged configuration and the files that every checkpoint copies into the output directory.

    The arguments are those of `start_assets`.

    Raises:
        ConfigError: the output directory cannot be written.
    """
    output = Path(cfg.train.output)
    if dist.get_rank() == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
            save_config(cfg, output / folders.CONFIG)
            start_assets(output, pretrained, find_tokenizer(cfg.data), base)
        except OSError as error:
            raise ConfigError(f"train.output={output} cannot be written: {error.strerror}") from error
    dist.barrier()
    return output

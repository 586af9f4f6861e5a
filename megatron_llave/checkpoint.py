"""Checkpoints through megatron-core's dist_checkpointing: one format that loads at every layout.

    OUTPUT/checkpoints/step-0002400/    weights, optimizer, schedule, step, config.yaml, data.json (where the data is)
    OUTPUT/checkpoints/latest           the name of the newest whole one

A checkpoint is written under a temporary name, renamed when whole, and made current by replacing `latest` in one move:
a killed save leaves the previous one current.
"""

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module, Parameter

from megatron_llave import config_file
from megatron_llave.config import RunConfig
from megatron_llave.errors import CheckpointError

FOLDER = "checkpoints"
POINTER = "latest"
CONFIG = "config.yaml"
POSITION = "data.json"
ASSETS = "assets"
"""Folder with the tokenizer and, of a converted model, what an export gives back (conversion.py); in a run's folder,
and in each of its checkpoints, where large files are links to the run's."""
AVERAGE = "average."
"""Before the names of averaged weights."""


def save(
    cfg: RunConfig,
    step: int,
    chunks: list[Module],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    groups: ProcessGroupCollection,
    position: dict | None = None,
    averages: dict[Parameter, Tensor] | None = None,
) -> Path:
    """Write a checkpoint after `step` steps into the run's folder and make it current; every rank takes part.

    Args:
        cfg: the run.
        step: steps done.
        chunks: this rank's model chunks.
        optimizer: its states are saved with it.
        schedule: of the learning rate.
        groups: the layout.
        position: where the data stands after these steps (data/pipeline.py).
        averages: averaged weights of the trained parameters, saved too; None: there are none.

    Returns:
        The checkpoint's folder.
    """
    folder = Path(cfg.train.output) / FOLDER
    final = folder / f"step-{step:07d}"
    partial = folder / f"{final.name}.partial"
    if dist.get_rank() == 0:
        _begin(partial, cfg, position)
    dist.barrier()
    metadata = state_metadata(groups)
    state = _model_state(chunks, metadata)
    if any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()):
        # A pipeline stage that is all frozen has no optimizer state, which megatron-core does not expect.
        optimizer_input = dict(state) if len(chunks) > 1 else state["model"]
        state["optimizer"] = optimizer.sharded_state_dict(optimizer_input, is_loading=False, metadata=metadata)
    if averages is not None:
        state |= _average_state(chunks, metadata, averages)
    state["schedule"] = schedule.state_dict()
    state["step"] = step
    metadata.pop("dp_cp_group")
    dist_checkpointing.save(state, str(partial), content_metadata=metadata)
    dist.barrier()
    if dist.get_rank() == 0:
        replaced = folder / f"{final.name}.replaced"
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)
        pointer = folder / f"{POINTER}.partial"
        pointer.write_text(final.name + "\n")
        os.replace(pointer, folder / POINTER)
    dist.barrier()
    return final


def _begin(folder: Path, cfg: RunConfig, position: dict | None) -> None:
    """An empty checkpoint folder with all that is no tensor."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config_file.save(cfg, folder / CONFIG)
    if position is not None:
        (folder / POSITION).write_text(json.dumps(position, indent=1) + "\n")
    assets = Path(cfg.train.output) / ASSETS
    if assets.is_dir():
        shutil.copytree(assets, folder / ASSETS, copy_function=link)


def link(source: str, target: str) -> None:
    """A hard link, so that a large file is stored once; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the current one of a run's output folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for folder in (path, path / FOLDER):
        if (folder / POINTER).is_file():
            path = folder / (folder / POINTER).read_text(errors="replace").strip()
            break
    try:
        is_checkpoint = dist_checkpointing.check_is_distributed_checkpoint(str(path))
    except ValueError as error:  # its JSON is damaged
        raise CheckpointError(f"{path}/metadata.json is damaged: {error}") from error
    if not (path / CONFIG).is_file() or not is_checkpoint:
        raise CheckpointError(
            f"{path} is neither a checkpoint (it would hold {CONFIG} and metadata.json) nor a run's folder with "
            f"{FOLDER}/{POINTER}"
        )
    return path


def read_position(folder: Path) -> dict | None:
    """Where the data stood when checkpoint `folder` was saved; None for one that has no steps behind it.

    Raises:
        CheckpointError: it is damaged.
    """
    file = folder / POSITION
    if not file.is_file():
        return None
    try:
        position = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(position, dict) or not {"step", "subsets"} <= position.keys():
        raise CheckpointError(f"{file} is damaged: it does not say where the data stands")
    return position


def require_average(folder: Path, cfg: RunConfig, average: bool) -> None:
    """Refuse `average` for a checkpoint that has no averaged weights.

    Raises:
        CheckpointError: its run had no averages.
    """
    if average and cfg.loss.reward != "ema":
        raise CheckpointError(f"{folder} has no averaged weights: its run had loss.reward={cfg.loss.reward}, not ema")


def load_weights(
    path: str | Path, chunks: list[Module], groups: ProcessGroupCollection, average: bool = False
) -> None:
    """Fill the chunks with the weights of checkpoint folder `path`, whatever layout it was saved at.

    Args:
        path: the checkpoint.
        chunks: this rank's model chunks.
        groups: the layout of this run.
        average: take the averaged weights of a run with loss.reward=ema.

    Raises:
        CheckpointError: the files are damaged or hold another model, or there are no averaged weights.
    """
    metadata = state_metadata(groups)
    loaded = _load(path, _model_state(chunks, metadata))
    for key, chunk in zip(_model_keys(chunks), chunks):
        chunk.load_state_dict(loaded[key])
    if average:
        # Loading takes only shapes from here, and casts the averages to the weights' dtype.
        loaded = _load(path, _average_state(chunks, metadata, {}))
        for key, chunk in zip(_model_keys(chunks), chunks):
            averages = loaded.get(AVERAGE + key, {})  # a stage may have nothing that is trained
            weights = {name.removeprefix(AVERAGE): value for name, value in averages.items()}
            chunk.load_state_dict(weights, strict=False)  # frozen weights have no average


def _load(path: str | Path, state: dict) -> dict:
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:  # many kinds, all meaning that the checkpoint cannot be used
        raise unusable(path, error) from error


def failure(error: BaseException) -> BaseException:
    """What went wrong; torch wraps the errors of all ranks into one of its own, which is no Exception."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def unusable(path: str | Path, error: BaseException) -> CheckpointError:
    """One line for what a reader of checkpoint `path` ran into."""
    error = failure(error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"checkpoint {path} cannot be loaded: {reason}")


def state_metadata(groups: ProcessGroupCollection) -> dict:
    """How megatron-core lays optimizer states out: "fully reshardable" loads at any number of data-parallel ranks."""
    return dict(
        distrib_optim_sharding_type="fully_reshardable",
        singleton_local_shards=False,
        chained_optim_avoid_prefix=True,
        dp_cp_group=groups.dp_cp,
    )


def _model_keys(chunks: list[Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _model_state(chunks: list[Module], metadata: dict) -> dict:
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in zip(_model_keys(chunks), chunks)}


def _average_state(chunks: list[Module], metadata: dict, averages: dict[Parameter, Tensor]) -> dict:
    """The trained parameters of the chunks under names of their own, with these values in place of theirs."""
    states = {}
    for key, chunk in zip(_model_keys(chunks), chunks):
        state = chunk.sharded_state_dict(prefix=AVERAGE, metadata=metadata)
        trained = {name: part for name, part in state.items() if getattr(part.data, "requires_grad", False)}
        for part in trained.values():
            part.data = averages.get(part.data, part.data)
            if hasattr(part, "dtype"):  # a factory, of a matrix that is saved in parts, has none
                part.dtype = part.data.dtype
        if trained:
            states[AVERAGE + key] = trained
    return states

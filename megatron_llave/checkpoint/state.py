"""The tensors of a checkpoint: weights, optimizer state, averages and random states, collected for a save and loaded.

They are megatron-core's sharded state dicts, so that a checkpoint that was saved at one parallel layout loads at every
other one. folders.py has the folders, async_writer.py writes them.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_llave.checkpoint.folders import AVERAGE, reading, saved_config
from megatron_llave.checkpoint.fp8_scales import EXTRA, SCALES, load_scales, requested_scales, saved_scales
from megatron_llave.checkpoint.optimizer_state import (
    SHARDING,
    Values,
    own_settings,
    owned_values,
    restore,
    sharded_optimizer_state,
)
from megatron_llave.checkpoint.safe_reads import check_objects, safe_reads
from megatron_llave.config.lora import LoraConfig
from megatron_llave.models.lora import draws_random_numbers, is_adapter
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.optimizer import Trainable
from megatron_llave.training.temperature import LearnedTemperature


@dataclass
class TrainingState:
    """Everything that a checkpoint stores as tensors, on this rank."""

    chunks: list[Module]
    """This rank's model chunks, without the data-parallel wrapper."""
    trainable: Trainable
    """Optimizer and schedule."""
    average: ExponentialMovingAverage | None
    """Averaged weights; None unless loss.reward=ema."""
    groups: ProcessGroupCollection
    """Process groups of the parallel layout."""
    temperature: LearnedTemperature | None = None
    """Learned temperatures; None with loss.temperature_learning=none."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Whether adapters are saved without the weights beside them."""

    def to_save(self, step: int) -> dict:
        """Return the sharded state dict after `step` steps. Its tensors are the ones in use, not copies."""
        self.trainable.wait_for_weights()
        metadata = state_metadata(self.groups)
        state = _model_state(self.chunks, metadata, self.lora)
        if self._is_trained():
            state["optimizer"] = self._optimizer_state(state, owned_values(self.trainable.optimizer))
        if self.average is not None:
            state |= _average_state(self.chunks, metadata, self.average.tensors())
            state["average_updates"] = self.average.updates
        if self.temperature is not None:
            state["temperature"] = self.temperature.to_save()
        state["step"] = step
        return state | self._random_state()

    def load(self, folder: Path, step: int, is_same_layout: bool) -> None:
        """Resume from checkpoint `folder`.

        Args:
            folder: a checkpoint of a run with the same model, frozen parts, adapters and loss.reward. Weights that it
                leaves out are in the chunks already.
            step: steps that were done when it was saved.
            is_same_layout: whether the parallel layout is the same; if not, dropout draws other random numbers.

        Raises:
            CheckpointError: the checkpoint is damaged or of another model.
        """
        with reading(folder):
            with own_settings(self.trainable.optimizer):
                loaded = self._load_all(folder, is_same_layout)
            if self.average is not None:
                self.average.restore(self._loaded_averages(loaded), loaded["average_updates"])
            if self.temperature is not None:  # a checkpoint of a run that did not learn it has none
                self.temperature.restore(loaded.get("temperature", {}))
            if is_same_layout and "random" in loaded:
                _restore_random(loaded["random"])
        self.trainable.schedule.num_steps = 0
        self.trainable.schedule.step(increment=step)

    def _load_all(self, folder: Path, is_same_layout: bool) -> dict:
        """Return the checkpoint's tensors after weights and optimizer state have been put in place."""
        metadata = state_metadata(self.groups)
        state = _model_state(self.chunks, metadata, saved_config(folder).lora, folder)
        optimizer = self.trainable.optimizer
        if self._is_trained():
            values = owned_values(optimizer)
            state["optimizer"] = self._optimizer_state(state, values)
        if self.average is not None:
            state |= _average_state(self.chunks, metadata, self.average.tensors())
        if is_same_layout:
            state |= self._random_state()
        loaded = _load(folder, state)
        for key, chunk in zip(_model_keys(self.chunks), self.chunks):
            _fill(chunk, loaded[key])
        if self._is_trained():
            restore(optimizer, loaded["optimizer"], values)
        return loaded

    def _is_trained(self) -> bool:
        """Whether this rank has optimizer state; a pipeline stage that is completely frozen has none."""
        return any(parameter.requires_grad for chunk in self.chunks for parameter in chunk.parameters())

    def _optimizer_state(self, state: dict, values: Values) -> dict:
        models = {key: state[key] for key in _model_keys(self.chunks)}
        return sharded_optimizer_state(self.trainable.optimizer, models, values)

    def _random_state(self) -> dict:
        """Return the random states of this rank; none without dropout, which alone draws from them."""
        if not draws_random_numbers(self.chunks[0]):
            return {}
        states = {name: value.clone() for name, value in get_cuda_rng_tracker().get_states().items()}
        random = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state(), "tracker": states}
        groups = (self.groups.pp, self.groups.tp, self.groups.dp_cp)
        shape, offset = tuple(group.size() for group in groups), tuple(group.rank() for group in groups)
        return {"random": ShardedObject("random", random, shape, offset)}

    def _loaded_averages(self, loaded: dict) -> dict[Parameter, Tensor]:
        averages = {}
        for key, chunk in zip(_model_keys(self.chunks), self.chunks):
            parameters = dict(chunk.named_parameters())
            for name, value in loaded.get(AVERAGE + key, {}).items():
                averages[parameters[name.removeprefix(AVERAGE)]] = value
        return averages


def load_weights(path: str | Path, chunks: list[Module], groups: ProcessGroupCollection, average: bool = False) -> None:
    """Fill the chunks with the weights of checkpoint folder `path`, which may have been saved at any parallel layout.

    What the checkpoint does not hold stays as it is: adapters, or the weights that its adapters are for.

    Args:
        path: the checkpoint.
        chunks: this rank's model chunks.
        groups: process groups of this run's parallel layout.
        average: load the averaged weights of a run with loss.reward=ema.

    Raises:
        CheckpointError: the files are damaged, hold another model, or have no averaged weights.
    """
    with reading(path):
        _load_weights(path, chunks, groups, average)


def _load_weights(path: str | Path, chunks: list[Module], groups: ProcessGroupCollection, average: bool) -> None:
    metadata = state_metadata(groups)
    loaded = _load(path, _model_state(chunks, metadata, saved_config(path).lora, Path(path)))
    for key, chunk in zip(_model_keys(chunks), chunks):
        _fill(chunk, loaded[key])
    if average:
        # Loading takes only shapes from here, and casts the averages to the weights' dtype.
        loaded = _load(path, _average_state(chunks, metadata, {}))
        for key, chunk in zip(_model_keys(chunks), chunks):
            averages = loaded.get(AVERAGE + key, {})  # a pipeline stage may be completely frozen
            weights = {name.removeprefix(AVERAGE): value for name, value in averages.items()}
            chunk.load_state_dict(weights, strict=False)  # frozen weights have no average


def state_metadata(groups: ProcessGroupCollection) -> dict:
    """Return how tensors are stored: the optimizer's so that they load at any number of data-parallel ranks."""
    return dict(
        distrib_optim_sharding_type=SHARDING,
        singleton_local_shards=False,
        chained_optim_avoid_prefix=True,
        dp_cp_group=groups.dp_cp,
    )


def sharded_parameters(chunk: Module, metadata: dict, prefix: str = "") -> dict:
    """Return megatron-core's sharded state dict of a model chunk without the extra states of its layers.

    Each kind of layer has other extra states: Transformer Engine's last norm has one, the local norm has none, and
    those for FP8 are pickles. Without them, a checkpoint of either kernel loads into the other.

    Args:
        chunk: a model chunk, without the data-parallel wrapper.
        metadata: that of `state_metadata`.
        prefix: is put before each name.
    """
    state = chunk.sharded_state_dict(prefix=prefix, metadata=metadata)
    return {name: part for name, part in state.items() if not name.endswith(EXTRA)}


def _fill(chunk: Module, loaded: dict) -> None:
    """Load the parameters of a chunk that were asked for, and what FP8 scales there are."""
    load_scales(chunk, {name: loaded.pop(name) for name in list(loaded) if name.endswith(SCALES)})
    missing, unexpected = chunk.load_state_dict(loaded, strict=False)
    kinds = {is_adapter(name) for name in loaded}
    wrong = [name for name in missing if is_adapter(name) in kinds] + unexpected
    wrong = [name for name in wrong if not name.endswith(EXTRA)]
    assert not wrong, f"{wrong[0]} is in the model or in its sharded state dict, but not in both"


def _load(path: str | Path, state: dict) -> dict:
    with safe_reads(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)  # of torch, about megatron-core
        check_objects(Path(path))
        return dist_checkpointing.load(state, str(path))


def _model_keys(chunks: list[Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _model_state(chunks: list[Module], metadata: dict, lora: LoraConfig, folder: Path | None = None) -> dict:
    """Return parameters and FP8 scales of each chunk: those to save, or those to load from checkpoint `folder`.

    `lora` is of the run that saves, or that has saved: whether there are adapters, and weights beside them.
    """
    states = {}
    for key, chunk in zip(_model_keys(chunks), chunks):
        scales = requested_scales(chunk, metadata, folder) if folder else saved_scales(chunk, metadata)
        parameters = sharded_parameters(chunk, metadata)
        held = {
            name: part
            for name, part in parameters.items()
            if (lora.rank > 0 if is_adapter(name) else not lora.leaves_out_base)
        }
        states[key] = held | scales
    return states


def _average_state(chunks: list[Module], metadata: dict, averages: dict[Parameter, Tensor]) -> dict:
    """Return the sharded state of the trained parameters under averaged names, with these values instead of theirs."""
    states = {}
    for key, chunk in zip(_model_keys(chunks), chunks):
        state = sharded_parameters(chunk, metadata, AVERAGE)
        trained = {name: part for name, part in state.items() if getattr(part.data, "requires_grad", False)}
        for part in trained.values():
            part.data = averages.get(part.data, part.data)
            if hasattr(part, "dtype"):  # a factory, of a matrix that is saved in parts, has none
                part.dtype = part.data.dtype
        if trained:
            states[AVERAGE + key] = trained
    return states


def _restore_random(random: dict) -> None:
    torch.set_rng_state(random["cpu"])
    torch.cuda.set_rng_state(random["device"])
    get_cuda_rng_tracker().set_states(random["tracker"])

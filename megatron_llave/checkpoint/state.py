"""What of a run's tensors a checkpoint holds: weights, optimizer, averages, random states; taken apart and put back.

Through megatron-core's sharded state dicts, so that what was saved at one layout loads at every other. folders.py
has the folders, async_writer.py the writing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module, Parameter

from megatron_llave.checkpoint.folders import AVERAGE, unusable
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.optimizer import Trainable


@dataclass
class TrainingState:
    """Everything a checkpoint holds of a run that is no file of its own, on this rank."""

    chunks: list[Module]
    """This rank's model chunks, not wrapped."""
    trainable: Trainable
    """Optimizer and schedule."""
    average: ExponentialMovingAverage | None
    """Averaged weights, of a run with loss.reward=ema."""
    groups: ProcessGroupCollection
    """The layout."""

    def to_save(self, step: int) -> dict:
        """The sharded state dict after `step` steps; its tensors are those in use, not copies."""
        self.trainable.wait_for_weights()
        metadata = state_metadata(self.groups)
        state = _model_state(self.chunks, metadata)
        if self._is_trained():
            state["optimizer"] = self._optimizer_state(state, metadata, is_loading=False)
        if self.average is not None:
            state |= _average_state(self.chunks, metadata, self.average.tensors())
            state["average_updates"] = self.average.updates
        state["step"] = step
        return state | self._random_state()

    def load(self, folder: Path, step: int, is_same_layout: bool) -> None:
        """Go on from checkpoint `folder` after `step` steps.

        Args:
            folder: the checkpoint, of a run with the same model, frozen parts and reward.
            step: steps it has behind it.
            is_same_layout: the processes are laid out as they were; else dropout goes on with other random numbers.

        Raises:
            CheckpointError: it is damaged or of another model.
        """
        with _own_settings(self.trainable.optimizer):
            loaded = self._load_all(folder, is_same_layout)
        if self.average is not None:
            self.average.restore(self._loaded_averages(loaded), loaded["average_updates"])
        if is_same_layout and "random" in loaded:
            _restore_random(loaded["random"])
        self.trainable.schedule.num_steps = 0
        self.trainable.schedule.step(increment=step)

    def _load_all(self, folder: Path, is_same_layout: bool) -> dict:
        """The checkpoint's tensors; weights and optimizer are in place then."""
        metadata = state_metadata(self.groups)
        state = _model_state(self.chunks, metadata)
        optimizer = self.trainable.optimizer
        if self._is_trained():
            _make_states(optimizer)
            state["optimizer"] = self._optimizer_state(state, metadata, is_loading=True)
        if self.average is not None:
            state |= _average_state(self.chunks, metadata, self.average.tensors())
        if is_same_layout:
            state |= self._random_state()
        loaded = _load(folder, state)
        for key, chunk in zip(_model_keys(self.chunks), self.chunks):
            chunk.load_state_dict(loaded[key])
        if self._is_trained():
            with _steps_of_torch_adamw(_distributed(optimizer)):
                optimizer.load_state_dict(loaded["optimizer"])
        return loaded

    def _is_trained(self) -> bool:
        """Whether this rank has optimizer state; a pipeline stage that is all frozen has none, nor expects it."""
        return any(parameter.requires_grad for chunk in self.chunks for parameter in chunk.parameters())

    def _optimizer_state(self, state: dict, metadata: dict, is_loading: bool) -> dict:
        # Of several chunks the nested dict: their names are the same.
        models = {key: state[key] for key in _model_keys(self.chunks)}
        models = models if len(models) > 1 else state["model"]
        return self.trainable.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)

    def _random_state(self) -> dict:
        """Random states of this rank, where dropout draws from them."""
        config = self.chunks[0].config
        if config.hidden_dropout == 0 and config.attention_dropout == 0:
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


def state_metadata(groups: ProcessGroupCollection) -> dict:
    """How megatron-core lays optimizer states out: "fully reshardable" loads at any number of data-parallel ranks."""
    return dict(
        distrib_optim_sharding_type="fully_reshardable",
        singleton_local_shards=False,
        chained_optim_avoid_prefix=True,
        dp_cp_group=groups.dp_cp,
    )


def _load(path: str | Path, state: dict) -> dict:
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:  # many kinds, all meaning that the checkpoint cannot be used
        raise unusable(path, error) from error


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


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers of a chain that have parameters on this rank."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if not getattr(one, "is_stub_optimizer", False)]


def _make_states(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the states that it otherwise makes in its first step; megatron-core loads into them.

    It does so itself for the AdamW of Transformer Engine and apex.
    """
    if HAVE_APEX_OR_TE:
        return
    for one in _distributed(optimizer):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                if not one.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                    one.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}


@contextmanager
def _own_settings(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Learning rates, decay and first steps stay those of this run's configuration while a checkpoint is loaded.

    megatron-core takes them from the checkpoint and, already when it is asked what it would load, from its own groups
    of parameters, which it tells apart by wd_mult alone: parts with rates of their own would swap them.
    """
    given = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, given):
        group.update(values)


@contextmanager
def _steps_of_torch_adamw(optimizers: list[DistributedOptimizer]) -> Iterator[None]:
    """Mend what megatron-core's loading does to the step count that torch's AdamW keeps beside each parameter.

    It asks the checkpoint for that count, which is not there as a tensor, and then gives all parameters one and the
    same tensor, which each of them advances: the next update would be off by a quarter of the learning rate.
    """
    if HAVE_APEX_OR_TE:
        yield
        return
    for one in optimizers:
        one._set_main_param_and_optimizer_states = _keeping_step(one)
    try:
        yield
    finally:
        for one in optimizers:
            del one._set_main_param_and_optimizer_states
            for state in one.optimizer.state.values():
                state["step"] = state["step"].clone()


def _keeping_step(one: DistributedOptimizer):
    original = one._set_main_param_and_optimizer_states

    def set_states(parameter: Parameter, tensors: dict[str, Tensor]) -> None:
        group, order = one.model_param_group_index_map[parameter]
        state = one.optimizer.state[one.optimizer.param_groups[group]["params"][order]]
        original(parameter, {"step": state["step"], **tensors})

    return set_states


def _restore_random(random: dict) -> None:
    torch.set_rng_state(random["cpu"])
    torch.cuda.set_rng_state(random["device"])
    get_cuda_rng_tracker().set_states(random["tracker"])

"""The optimizer's part of a checkpoint: float32 weights and two moments of every trained parameter.

megatron-core's distributed optimizer splits the gradient buffer over the data-parallel ranks, so that each rank owns a
range of the elements of some parameters. megatron-core's own way to save them so that they load at every layout gathers
all ranges on every rank first: 12 bytes of host memory per parameter and rank, and 4 bytes per element of a bucket on
the device. Here each rank saves and loads its own ranges where they are, as boxes of the parameters' tensors. The
tensors in the files are the same and have the same names: megatron-core reads what this file writes, and vice versa.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

SHARDING = "fully_reshardable"
"""megatron-core's name of the format of the files."""
MOMENTS = ("exp_avg", "exp_avg_sq")
Values = dict[Parameter, dict[str, Tensor]]
"""For each parameter, the elements [n] of `param`, the weight that is updated, and of MOMENTS that a rank owns."""


def owned_values(optimizer: MegatronOptimizer) -> Values:
    """Return what this rank owns in float32: the tensors in use, or copies in the host's memory of less precise ones.

    Moments that do not exist yet, before the first step or after steps that were all skipped, are created.
    """
    [distributed] = _with_parameters(optimizer)
    if not distributed.optimizer.state:
        with own_settings(optimizer):
            make_states(optimizer)
    values = {parameter: _in_use(distributed, parameter) for parameter in distributed.model_param_group_index_map}
    for named in values.values():
        for name, value in named.items():
            named[name] = value.detach() if value.dtype == torch.float32 else value.to("cpu", torch.float32)
    return values


def sharded_optimizer_state(optimizer: MegatronOptimizer, models: dict, values: Values) -> dict:
    """Return the sharded state dict of what this rank owns.

    Args:
        optimizer: the optimizer of this rank, which has trained parameters.
        models: the sharded state dict of this rank's model chunks, with the parameters themselves as data.
        values: those of `owned_values`, which become its tensors. Loading writes into them.
    """
    [distributed] = _with_parameters(optimizer)
    kinds = (ShardedTensor, ShardedTensorFactory)
    parts = {part.data: part for part in nested_values(models) if isinstance(part, kinds)}
    boxes: list[ShardedTensor] = []
    for parameter, named in values.items():
        buffer, dtype, bucket = distributed.model_param_gbuf_map[parameter]
        owned = distributed.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
        for name, value in named.items():
            boxes += _sharded_boxes(parts[parameter], f"optimizer.state.{name}.", value, owned.start)
    state = distributed.state_dict()
    for group in state["optimizer"]["param_groups"]:  # that of offloaded states has classes, which no file may hold
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]
    return state | {"param_state": dict(enumerate(boxes)), "param_state_sharding_type": SHARDING}


def make_states(optimizer: MegatronOptimizer) -> None:
    """Create the moments of an optimizer that has not taken a step yet; a checkpoint is loaded into them."""
    for distributed in _with_parameters(optimizer):
        if isinstance(distributed.optimizer, HybridDeviceOptimizer):
            for inner in distributed.optimizer.sub_optimizers:
                _make_states(inner)
            distributed.optimizer._sync_sub_optimizers_state_to_hdo()
        elif HAVE_APEX_OR_TE:
            distributed.load_state_dict(distributed.state_dict())  # creates them if there are none
        else:
            _make_states(distributed.optimizer)


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter.data) for name in MOMENTS}
                device = parameter.device if group.get("fused") else "cpu"
                steps = {"step": torch.zeros((), device=device)} if isinstance(optimizer, torch.optim.AdamW) else {}
                optimizer.state[parameter] = steps | moments


def restore(optimizer: MegatronOptimizer, loaded: dict, values: Values) -> None:
    """Finish a load: put the loaded values where they are not yet, and set the number of updates.

    Args:
        optimizer: the optimizer of this rank, which has trained parameters.
        loaded: the loaded state dict.
        values: those that it was loaded into.
    """
    [distributed] = _with_parameters(optimizer)
    for parameter, named in values.items():
        for name, kept in _in_use(distributed, parameter).items():
            if kept.dtype != torch.float32:
                kept.copy_(named[name])
    if isinstance(distributed.optimizer, HybridDeviceOptimizer):
        # megatron-core's own way makes all states anew from the bf16 weights. These are in place already.
        step = loaded["optimizer"]["param_groups"][0]["step"]
        for inner in distributed.optimizer.sub_optimizers:
            for group in inner.param_groups:
                group["step"] = int(step)  # where Transformer Engine's AdamW counts
            for state in inner.state.values():
                if "step" in state:
                    state["step"].fill_(step)
        return
    distributed.load_state_dict({name: value for name, value in loaded.items() if not name.startswith("param_state")})
    if not HAVE_APEX_OR_TE:
        # torch's AdamW counts for each parameter. megatron-core gives all of them one shared tensor, which each would
        # increment: the next update would be off by a quarter of the learning rate.
        for state in distributed.optimizer.state.values():
            state["step"] = state["step"].clone()


def _in_use(distributed: DistributedOptimizer, parameter: Parameter) -> dict[str, Tensor]:
    """Return the weight that is updated, and its moments, as the optimizer keeps them."""
    group, order = distributed.model_param_group_index_map[parameter]
    main = distributed.optimizer.param_groups[group]["params"][order]
    state = distributed.optimizer.state[main]
    return {"param": state.get("master_param", main)} | {name: state[name] for name in MOMENTS}


@contextmanager
def own_settings(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Keep learning rates, weight decay and first steps as configured while a checkpoint is loaded inside.

    megatron-core overwrites them with those of the checkpoint. It does so even while it creates the moments, where it
    tells groups of parameters apart by wd_mult alone: parts with different rates would swap them, and a group without
    a key such as that of its first step would get that of another one.
    """
    given = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, given):
        for key in group.keys() - values.keys() - {"params", "step"}:
            del group[key]
        group.update(values)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and size of the boxes that hold the elements `start` to `stop`, in their order.

    Args:
        shape: of a tensor whose elements are counted row by row; at least one dimension.
        start: first element.
        stop: the one behind the last; if it is `start`, there are no boxes.
    """
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    while start < stop:
        first, begin = divmod(start, row)
        if begin or stop < start + row:  # a part of one row
            end = min(row, begin + stop - start)
            for offset, size in boxes_of_range(shape[1:], begin, end):
                yield (first, *offset), (1, *size)
            start += end - begin
        else:
            rows = (stop - start) // row
            yield (first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
            start += rows * row


def _sharded_boxes(
    part: ShardedTensor | ShardedTensorFactory, prefix: str, value: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """Yield the boxes of `value` [n], the elements from `start` on of the parameter that `part` describes."""
    stop = start + value.numel()
    wholes = part.build() if isinstance(part, ShardedTensorFactory) else [part]  # a gated matrix is saved in two
    for whole in wholes:
        first = whole.data.storage_offset() - part.data.storage_offset()
        low, high = max(start, first), min(stop, first + whole.data.numel())
        before = whole.global_offset[: whole.prepend_axis_num]
        done = low - start
        for offset, size in boxes_of_range(whole.local_shape, low - first, high - first):
            number, size = math.prod(size), (1,) * len(before) + size
            inside = (0,) * len(before) + offset
            yield ShardedTensor(
                prefix + whole.key,
                value[done : done + number].view(size),
                value.dtype,
                size,
                whole.global_shape,
                tuple(map(sum, zip(whole.global_offset, inside))),
                axis_fragmentations=None,  # boxes of many sizes
                replica_id=(*whole.replica_id[:2], 0),  # no other data-parallel rank has it
                allow_shape_mismatch=whole.allow_shape_mismatch,
            )
            done += number


def _with_parameters(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Return the optimizers of a chain that have parameters on this rank: one at most, as the model has no experts."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]

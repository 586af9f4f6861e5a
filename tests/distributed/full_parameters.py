"""Whole parameters and gradients under their global names, put together from the ranks of each replica: for comparing
layouts."""

import megatron_llave  # noqa: F401  (before megatron-core, so that a process starts in half the time)

# isort: split
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load, save
from torch import Tensor

from megatron_llave.models.blocks.initialization import named_global_parameters
from megatron_llave.training.optimizer import Trainable


def full_gradients(trainable: Trainable, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """Gradients after forward_backward, on every rank; the distributed optimizer left each rank only its share."""
    for chunk in trainable.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(groups.dp_cp.size())[groups.dp_cp.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=groups.dp_cp)
    return _full([chunk.module for chunk in trainable.chunks], groups, lambda parameter: parameter.main_grad)


def full_weights(chunks: list[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """Weights, on every rank."""
    return _full(chunks, groups, lambda parameter: parameter)


def _full(chunks, groups, value) -> dict[str, Tensor]:
    own = {}
    for chunk in chunks:
        for name, parameter in named_global_parameters(chunk):
            if parameter.requires_grad:
                own[name] = _gather_tensor_parallel(value(parameter).detach(), parameter, groups.tp)
    if groups.pp.size() == 1:
        return own
    stages = [None] * groups.pp.size()
    dist.all_gather_object(stages, save(own), group=groups.pp)
    return {name: tensor for stage in stages for name, tensor in load(stage).items()}


def _gather_tensor_parallel(part, parameter, group) -> Tensor:
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    if getattr(parameter, "is_gated", False):
        return torch.cat([p.chunk(2)[0] for p in parts] + [p.chunk(2)[1] for p in parts])
    return torch.cat(parts, dim=parameter.partition_dim)


def worst_relative_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[str, float]:
    """The parameter whose difference from the reference is largest, relative to the reference's norm."""
    assert set(ours) == set(reference), set(ours) ^ set(reference)
    errors = {name: _relative_error(ours[name], reference[name]) for name in ours}
    name = max(errors, key=errors.get)
    return name, errors[name]


def _relative_error(ours: Tensor, reference: Tensor) -> float:
    """Rows that only one of them has are padding of the vocabulary, and must be zero."""
    rows = max(len(ours), len(reference))
    ours, reference = (torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])]) for x in (ours, reference))
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-12))


def let_go(trainable: Trainable) -> None:
    """Make an end of it: megatron-core's gradient hooks keep it and its groups alive where Python cannot see it."""
    trainable.wait_for_weights()  # a gather still under way would write into memory that is given back
    for chunk in trainable.chunks:
        vars(chunk).clear()

"""Wraps the model's chunks in megatron-core's data parallelism, distributed AdamW and learning-rate schedule."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_llave.config.model import PARTS
from megatron_llave.config.optimizer import OptimizerConfig as OptimizerSection
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed.process_groups import device
from megatron_llave.errors import require

PART_PARAMETERS = {
    "vision": ("vision.*",),
    "projector": ("projector.*", "image_newline"),
    "language": ("language.*",),
}
"""Patterns that match the names of the parameters of each part."""
LATE, SCALE = "lr_start_step", "lr_scale"
"""Keys of a parameter group for the first step that trains it, and for a factor of its learning rate at every step; a
group without these keys is trained from step 0, at the rate of its part."""
LAYER_OF_VISION = re.compile(r"^module\.vision\..*\blayers\.(\d+)\.")


@dataclass
class Trainable:
    """The wrapped model with its optimizer and schedule."""

    chunks: list[DistributedDataParallel]
    """This rank's pipeline chunks, each with one buffer of float32 gradients."""
    optimizer: MegatronOptimizer
    """Distributed AdamW; its states are split over the data-parallel ranks."""
    schedule: OptimizerParamScheduler
    """Sets the learning rate of the next step."""

    def zero_gradients(self) -> None:
        """Prepare the gradient buffers for a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._gather_weights()  # does nothing but before the first step: `update` has started it after every other one

    def squared_norms(self) -> Tensor:
        """Squares [4] of the norm of the step's gradient before clipping, the same on every rank.

        The first is over all parameters, the others over those of each of PARTS, in this order; 0 for a part without
        gradient. They lie on the device, and the host does not wait for them, as it does in megatron-core's function.
        """
        self.optimizer.prepare_grads()
        parts, part_of = _parts(self.optimizer), self._part_of_gradients()
        gradients = [gradient for part in parts for gradient in _gradients(part)]
        norms = torch._foreach_norm(gradients) if gradients else ()  # one kernel, as in torch.nn.utils.get_total_norm
        of_parts = [[n for n, g in zip(norms, gradients) if part_of[id(g)] == part] for part in PARTS]
        squares = torch.stack([_squared_total(some) for some in (norms, *of_parts)])
        dist.all_reduce(squares, group=parts[0].get_grad_stats_parallel_group())
        return squares

    def _part_of_gradients(self) -> dict[int, str]:
        """Name of the model's part for the identity of every gradient that the optimizer has prepared."""
        found = {}
        for part in _parts(self.optimizer):
            for parameter, (group, order) in getattr(part, "model_param_group_index_map", {}).items():
                main = part.optimizer.param_groups[group]["params"][order]
                gradient = main.decoupled_grad if _is_decoupled(part) else main.grad
                found[id(gradient)] = self._part_of_parameters[parameter]
        return found

    @cached_property
    def _part_of_parameters(self) -> dict[Parameter, str]:
        named = [item for chunk in self.chunks for item in chunk.module.named_parameters()]
        return {parameter: part_of(name) for name, parameter in named}

    def update(self, gradient_norm: float | None) -> None:
        """Take the optimizer step with the gradients of `squared_norms`, clipped, and advance the schedule.

        Args:
            gradient_norm: norm of the whole gradient; None: leave out the optimizer step.
        """
        self.wait_for_weights()  # modules that this step did not run may still be gathering what the optimizer writes
        if gradient_norm is not None:
            for part in _parts(self.optimizer):
                if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
                    most = part.config.clip_grad
                    clip_grad_by_total_norm_fp32(parameters, most, gradient_norm, _is_decoupled(part))
            self.optimizer.step_with_ready_grads()
        self._gather_weights()
        self.schedule.step(increment=1)

    def describe(self) -> str:
        """Which code updates the weights, for example "AdamW of torch"."""
        inner = inner_optimizers(self.optimizer)
        names = {_name(part) for one in inner for part in getattr(one, "sub_optimizers", [one])}  # device and host
        return ", ".join(sorted(names)) or "nothing to update"

    def wait_for_weights(self) -> None:
        """With parallel.overlap, wait until the updated weights are gathered; forward passes do so layer by layer."""
        for bucket in self._overlapped_buckets():
            _wait(bucket)

    def _gather_weights(self) -> None:
        """With parallel.overlap, start to gather the updated weights.

        The forward passes of the layers would start this in the order in which they run, which differs on a rank whose
        micro batch has no images.
        """
        for bucket in self._overlapped_buckets():
            if not bucket.param_gather_dispatched:
                _wait(bucket)
                bucket.start_param_sync()

    def _overlapped_buckets(self) -> Iterator[Any]:
        """Buckets in the order in which the forward pass needs them."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                yield from reversed(chunk.bucket_groups)


def part_of(name: str) -> str:
    """Return the part of the model, one of PARTS, that has the parameter of this name."""
    return next(part for part, patterns in PART_PARAMETERS.items() if any(fnmatch(name, p) for p in patterns))


def _squared_total(norms: Sequence[Tensor]) -> Tensor:
    """Square of the norm of all tensors that have these norms; on the device."""
    if not norms:
        return torch.zeros((), device=device())
    return torch.linalg.vector_norm(torch.stack(list(norms))).square()


def _wait(bucket: Any) -> None:
    """Wait for the end of a gather of weights, if one was started."""
    if bucket.param_gather_handle is not None:
        bucket.param_gather_handle.wait()
        bucket.param_gather_handle = None


def _name(optimizer: torch.optim.Optimizer) -> str:
    fused = "fused " if optimizer.defaults.get("fused") else ""
    return f"{fused}{type(optimizer).__name__} of {type(optimizer).__module__.split('.')[0]}"


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that update the weights; none on a rank on which all parameters are frozen."""
    return [part.optimizer for part in _parts(optimizer) if getattr(part, "optimizer", None) is not None]


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_decoupled(part: MegatronOptimizer) -> bool:
    """Whether gradients are not in `grad`, since the optimizer gives bf16 weights float32 gradients."""
    return part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


def _gradients(part: MegatronOptimizer) -> list[Tensor]:
    """Return the gradients that count for the norm; megatron-core 0.19 has another name for this than 0.16."""
    name = "get_grads_for_grad_norm" if hasattr(part, "get_grads_for_grad_norm") else "get_main_grads_for_grad_norm"
    return getattr(part, name)()


def choose_fused(optimizer: torch.optim.Optimizer, fused: bool | None) -> None:
    """Choose whether torch's AdamW updates all weights in one kernel; others, which are always fused, stay as they are.

    megatron-core does not pass the choice on, and a checkpoint would bring that of the machine that wrote it.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    optimizer.defaults["fused"] = fused
    _keep_choice(optimizer, {"param_groups": optimizer.param_groups})
    # Before it loads a state, since fused updates count the steps on the device.
    optimizer.register_load_state_dict_pre_hook(_keep_choice)


def _keep_choice(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["fused"] = optimizer.defaults["fused"]


def build_trainable(cfg: RunConfig, chunks: list[Module], groups: ProcessGroupCollection) -> Trainable:
    """Wrap the chunks, build optimizer and schedule, and set the hooks by which megatron-core finishes a step."""
    overlap = cfg.parallel.overlap
    data_parallel = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        align_param_gather=overlap,  # Trainable starts the gathers, so no layer may start that of the next one
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=data_parallel,
            module=chunk,
            disable_bucketing=index > 0,  # as in Megatron-LM: later chunks finish the backward too late to overlap
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    config = _optimizer_config(cfg, chunks[0].config.params_dtype)
    optimizer = get_megatron_optimizer(config, wrapped, _overrides(cfg, config), use_gloo_process_groups=False)
    for inner in inner_optimizers(optimizer):
        choose_fused(inner, True if torch.cuda.is_available() else None)
    no_sync = [chunk.no_sync for chunk in wrapped]
    for chunk in wrapped:
        hooks = get_model_config(chunk)
        hooks.finalize_model_grads_func = finalize_model_grads
        hooks.grad_scale_func = optimizer.scale_loss
        if overlap:
            hooks.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return Trainable(wrapped, optimizer, _build_schedule(cfg, optimizer))


def require_runnable(section: OptimizerSection) -> None:
    """Raise a ConfigError if this machine lacks what the optimizer needs."""
    key = f"optimizer.moments={section.moments}"
    if section.offload_fraction > 0:
        key = f"optimizer.offload_fraction={section.offload_fraction}"
        require(torch.cuda.is_available(), f"{key} needs a GPU; without one nothing can be offloaded")
    ok = USING_TE_OPTIMIZER or (section.offload_fraction, section.moments) == (0, "fp32")
    require(ok, f"{key} needs Transformer Engine, which is not installed")


def _optimizer_config(cfg: RunConfig, params_dtype: torch.dtype) -> OptimizerConfig:
    section = cfg.optimizer
    moments = torch.bfloat16 if section.moments == "bf16" else torch.float32
    offloads = section.offload_fraction > 0
    return OptimizerConfig(
        optimizer="adam",
        lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.epsilon,
        clip_grad=section.clip_gradient,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=cfg.parallel.overlap,
        use_precision_aware_optimizer=offloads or moments != torch.float32,
        store_param_remainders=False,  # whole float32 weights, which every other optimizer can go on with
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        optimizer_cpu_offload=offloads,
        optimizer_offload_fraction=section.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=section.offload_overlap,
    )


def _overrides(cfg: RunConfig, config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's overrides (no weight decay of vectors), and rates and first steps of parts and layers."""
    overrides, section = get_standard_config_overrides(config), cfg.optimizer
    for part in sorted(section.part_learning_rates.keys() | section.part_start_steps.keys()):
        names = tuple(f"module.{name}" for name in PART_PARAMETERS[part])
        rate = section.part_learning_rates.get(part, section.learning_rate)
        values = {"max_lr": rate, "min_lr": min(section.min_learning_rate, rate)}
        values |= {LATE: section.part_start_steps[part]} if part in section.part_start_steps else {}
        overrides[ParamKey(name=names)] = ParamGroupOverride(**values)
    layers = cfg.model.vision.num_layers
    for above in range(1, layers + 1) if section.vision_layer_decay < 1 else ():
        below = ParamWithNamePredicate(f"{above} layers above", partial(_has_above, above, layers))
        scale = {SCALE: section.vision_layer_decay**above}
        overrides[ParamKey(with_name_predicate=below)] = ParamGroupOverride(**scale)
    return overrides


def _has_above(above: int, layers: int, parameter: Parameter, name: str) -> bool:
    """Whether this many of the vision encoder's layers come after the parameter: after its embeddings all of them."""
    if not name.startswith("module.vision."):
        return False
    layer = LAYER_OF_VISION.match(name)
    return above == (layers - 1 - int(layer[1]) if layer else layers)


class _Schedule(OptimizerParamScheduler):
    """megatron-core's schedule, with a rate of 0 for a part until its first step, and factors of layers."""

    def get_lr(self, param_group: dict) -> float:
        is_late = self.num_steps < param_group.get(LATE, 0)
        return 0.0 if is_late else super().get_lr(param_group) * param_group.get(SCALE, 1.0)


def _build_schedule(cfg: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    section = cfg.optimizer
    warmup = section.warmup_steps or round(section.warmup_fraction * cfg.train.steps)
    return _Schedule(
        optimizer,
        init_lr=0.0,
        max_lr=section.learning_rate,
        min_lr=section.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(cfg.train.steps, warmup + 1),
        lr_decay_style="cosine",
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=max(cfg.train.steps, 1),
        wd_incr_style="constant",
    )


def learning_rate(trainable: Trainable) -> float:
    """Learning rate of the next update."""
    return max(group["lr"] for group in trainable.optimizer.param_groups)

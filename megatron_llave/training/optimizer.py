"""megatron-core's data-parallel wrapper, distributed AdamW and learning-rate schedule around the model's chunks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch.nn import Module

from megatron_llave.config.schema import RunConfig

PART_PARAMETERS = {
    "vision": ("vision.*",),
    "projector": ("projector.*", "image_newline"),
    "language": ("language.*",),
}
"""Names of the parameters of each part, as patterns."""
LATE = "lr_start_step"
"""Under which a group of parameters has its first step, if it is not 0."""


@dataclass
class Trainable:
    """The model as training sees it."""

    chunks: list[DistributedDataParallel]
    """This rank's pipeline chunks, each with one buffer of float32 gradients."""
    optimizer: MegatronOptimizer
    """Distributed AdamW; its states are split over the data-parallel ranks."""
    schedule: OptimizerParamScheduler
    """Sets the learning rate of the next step."""

    def zero_gradients(self) -> None:
        """Start a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._gather_weights()  # before the first step nobody has

    def gradient_norm(self) -> float:
        """Norm of the step's gradient over all parameters, the same on every rank; before clipping."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def update(self, is_skipped: bool = False) -> None:
        """Take the optimizer step, unless its gradient is to be thrown away, and move the schedule on."""
        self.wait_for_weights()  # of modules that this step did not run: the optimizer writes where they are read
        if not is_skipped:
            self.optimizer.step()
        self._gather_weights()
        self.schedule.step(increment=1)

    def describe(self) -> str:
        """Whose code updates the weights: "AdamW of torch"."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        kinds = {type(one.optimizer) for one in chained if getattr(one, "optimizer", None) is not None}
        return ", ".join(f"{kind.__name__} of {kind.__module__.split('.')[0]}" for kind in kinds) or "nothing to update"

    def wait_for_weights(self) -> None:
        """Until the updated weights are here, with parallel.overlap; forwards wait by themselves, layer by layer."""
        for bucket in self._overlapped_buckets():
            _wait(bucket)

    def _gather_weights(self) -> None:
        """Start to gather the updated weights, with parallel.overlap.

        Not left to the layers' forwards, which would start it in the order in which they run: that of a rank whose
        micro batch has no pictures is another one.
        """
        for bucket in self._overlapped_buckets():
            if not bucket.param_gather_dispatched:
                _wait(bucket)
                bucket.start_param_sync()

    def _overlapped_buckets(self) -> Iterator[Any]:
        """In the order in which forwards need them."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                yield from reversed(chunk.bucket_groups)


def _wait(bucket: Any) -> None:
    """Until a gather of weights that was started has ended."""
    if bucket.param_gather_handle is not None:
        bucket.param_gather_handle.wait()
        bucket.param_gather_handle = None


def build_trainable(cfg: RunConfig, chunks: list[Module], groups: ProcessGroupCollection) -> Trainable:
    """Wrap the chunks, build optimizer and schedule, and tell megatron-core's schedules how to finish a step."""
    overlap = cfg.parallel.overlap
    data_parallel = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        align_param_gather=overlap,  # Trainable starts the gathers, so no layer starts the next one's
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=data_parallel,
            module=chunk,
            disable_bucketing=index > 0,  # as Megatron-LM: later chunks finish too late in the backward to overlap
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    config = _optimizer_config(cfg, chunks[0].config.params_dtype)
    optimizer = get_megatron_optimizer(config, wrapped, _overrides(cfg, config))
    no_sync = [chunk.no_sync for chunk in wrapped]
    for chunk in wrapped:
        hooks = get_model_config(chunk)
        hooks.finalize_model_grads_func = finalize_model_grads
        hooks.grad_scale_func = optimizer.scale_loss
        if overlap:
            hooks.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return Trainable(wrapped, optimizer, _build_schedule(cfg, optimizer))


def _optimizer_config(cfg: RunConfig, params_dtype: torch.dtype) -> OptimizerConfig:
    own = cfg.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=own.learning_rate,
        min_lr=own.min_learning_rate,
        weight_decay=own.weight_decay,
        adam_beta1=own.beta1,
        adam_beta2=own.beta2,
        adam_eps=own.epsilon,
        clip_grad=own.clip_gradient,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=cfg.parallel.overlap,
    )


def _overrides(cfg: RunConfig, config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's own (no weight decay of vectors), and the learning rates and first steps of parts."""
    overrides, own = get_standard_config_overrides(config), cfg.optimizer
    for part in sorted(own.part_learning_rates.keys() | own.part_start_steps.keys()):
        names = tuple(f"module.{name}" for name in PART_PARAMETERS[part])
        rate = own.part_learning_rates.get(part, own.learning_rate)
        values = {"max_lr": rate, "min_lr": min(own.min_learning_rate, rate)}
        values |= {LATE: own.part_start_steps[part]} if part in own.part_start_steps else {}
        overrides[ParamKey(name=names)] = ParamGroupOverride(**values)
    return overrides


class _Schedule(OptimizerParamScheduler):
    """megatron-core's, with a learning rate of 0 for a part until its first step."""

    def get_lr(self, param_group: dict) -> float:
        return 0.0 if self.num_steps < param_group.get(LATE, 0) else super().get_lr(param_group)


def _build_schedule(cfg: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    own = cfg.optimizer
    warmup = own.warmup_steps or round(own.warmup_fraction * cfg.train.steps)
    return _Schedule(
        optimizer,
        init_lr=0.0,
        max_lr=own.learning_rate,
        min_lr=own.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(cfg.train.steps, warmup + 1),
        lr_decay_style="cosine",
        start_wd=own.weight_decay,
        end_wd=own.weight_decay,
        wd_incr_steps=max(cfg.train.steps, 1),
        wd_incr_style="constant",
    )


def learning_rate(trainable: Trainable) -> float:
    """The learning rate the next update will use."""
    return max(group["lr"] for group in trainable.optimizer.param_groups)

"""megatron-core's data-parallel wrapper, distributed AdamW and learning-rate schedule around the model's chunks."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch.nn import Module

from megatron_llave.config import RunConfig


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

    def update(self) -> float:
        """Take the optimizer step and move the schedule on; returns the gradient norm before clipping."""
        _, gradient_norm, _ = self.optimizer.step()
        self.schedule.step(increment=1)
        return float(gradient_norm or 0.0)


def build_trainable(cfg: RunConfig, chunks: list[Module], groups: ProcessGroupCollection) -> Trainable:
    """Wrap the chunks, build optimizer and schedule, and tell megatron-core's schedules how to finish a step."""
    data_parallel = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
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
    optimizer = get_megatron_optimizer(_optimizer_config(cfg, chunks[0].config.params_dtype), wrapped)
    for chunk in wrapped:
        config = get_model_config(chunk)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
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
    )


def _build_schedule(cfg: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    own = cfg.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=own.learning_rate,
        min_lr=own.min_learning_rate,
        lr_warmup_steps=own.warmup_steps,
        lr_decay_steps=max(cfg.train.steps, own.warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=own.weight_decay,
        end_wd=own.weight_decay,
        wd_incr_steps=max(cfg.train.steps, 1),
        wd_incr_style="constant",
    )


def learning_rate(trainable: Trainable) -> float:
    """The learning rate the next update will use."""
    return max(group["lr"] for group in trainable.optimizer.param_groups)

"""Checks that a model and a batch can be split over the processes as configured."""

from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig
from megatron_llave.errors import ConfigError


def validate_layout(model: ModelConfig, layout: ParallelConfig, world_size: int) -> int:
    """Check that the model can be split over `world_size` processes as configured.

    Returns:
        The number of data-parallel ranks.

    Raises:
        ConfigError: one line with the keys and numbers that do not fit.
    """
    model_parallel = layout.tensor * layout.pipeline * layout.context
    sizes = f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} x parallel.context={layout.context}"
    if world_size % model_parallel:
        raise ConfigError(f"{world_size} processes cannot be split into {sizes}: not a multiple of {model_parallel}")
    _validate_tensor(model, layout)
    _validate_pipeline(model.language.num_layers, layout)
    if layout.context > 1 and (model.kernels, model.precision) == ("transformer_engine", "fp32"):
        raise ConfigError(
            f"parallel.context={layout.context}: Transformer Engine shares no attention in model.precision=fp32; use "
            "bf16, or model.kernels=local"
        )
    return world_size // model_parallel


def _validate_tensor(model: ModelConfig, layout: ParallelConfig) -> None:
    if layout.sequence and layout.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of at least 2")
    for part, values in (("vision", model.vision), ("language", model.language)):
        for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
            value = getattr(values, name, layout.tensor)
            if value % layout.tensor:
                raise ConfigError(f"model.{part}.{name}={value} is not divisible by parallel.tensor={layout.tensor}")
    hidden = model.language.hidden_size  # width of the projector's inner layer, which tensor parallelism splits
    if hidden % layout.tensor:
        raise ConfigError(f"model.language.hidden_size={hidden} is not divisible by parallel.tensor={layout.tensor}")


def _validate_pipeline(layers: int, layout: ParallelConfig) -> None:
    stages, chunks, first = layout.pipeline, layout.virtual_pipeline, layout.first_stage_layers
    if chunks > 1 and stages == 1:
        raise ConfigError(f"parallel.virtual_pipeline={chunks} needs parallel.pipeline of at least 2")
    if first is not None and (stages == 1 or not 1 <= first < layers):
        raise ConfigError(
            f"parallel.first_stage_layers={first} must be 1 to {layers - 1} and needs parallel.pipeline of at least 2"
        )
    rest, rest_stages = (layers, stages) if first is None else (layers - first, stages - 1)
    less = "" if first is None else f" less parallel.first_stage_layers={first}"
    if rest % (rest_stages * chunks) or (first or 0) % chunks:
        raise ConfigError(
            f"model.language.num_layers={layers}{less} cannot be split evenly over {rest_stages} pipeline stages x "
            f"{chunks} chunks"
        )


def validate_batch(cfg: RunConfig, data_parallel: int) -> None:
    """Check that the global batch can be split into equal micro batches over the data-parallel ranks.

    Raises:
        ConfigError: one line with the numbers that do not fit.
    """
    total, layout = cfg.train.global_batch_size, cfg.parallel
    micro = cfg.train.micro_batch_size or max(1, total // data_parallel)
    if total % (data_parallel * micro):
        times = f"train.micro_batch_size={micro} x " if cfg.train.micro_batch_size else ""
        raise ConfigError(
            f"train.global_batch_size={total} is not a multiple of {times}{data_parallel} data-parallel ranks"
        )
    micro_batches = total // (data_parallel * micro)
    is_counted = cfg.train.tokens_per_micro_batch is None  # else empty ones are added
    if is_counted and layout.virtual_pipeline > 1 and micro_batches % layout.pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline={layout.virtual_pipeline} needs a number of micro batches that "
            f"parallel.pipeline={layout.pipeline} divides, but train.global_batch_size={total} with "
            f"train.micro_batch_size={micro} gives {micro_batches}"
        )

"""Schedules of the temperature and of the hardness weight."""

from dataclasses import replace

from torch import Tensor

from megatron_llave.config.loss import LossConfig


def at_step(config: LossConfig, step: int) -> LossConfig:
    """The configuration with the temperature and the hardness weight of `step`, which counts from 0."""
    return replace(config, temperature=temperature_at(config, step), alpha=alpha_at(config, step))


def is_warming_up(config: LossConfig, step: int) -> bool:
    """Whether the temperature of a step is on its way from temperature_start."""
    return config.temperature_start is not None and step < config.temperature_warmup_steps


def temperature_at(config: LossConfig, step: int) -> float:
    """Temperature of a step. It falls geometrically from temperature_start to temperature during the warmup."""
    if not is_warming_up(config, step):
        return config.temperature
    done = step / config.temperature_warmup_steps
    return config.temperature_start ** (1 - done) * config.temperature**done


def current_temperature(config: LossConfig, log_temperature: Tensor | None) -> float | Tensor:
    """Temperature of a step, of which a loss takes the gradient with respect to its logarithm where it is learned."""
    return config.temperature if log_temperature is None else log_temperature.exp()


def alpha_at(config: LossConfig, step: int) -> float:
    """Hardness weight of a step. It rises linearly from 0 to alpha during the warmup."""
    return config.alpha * min(1.0, step / config.alpha_warmup_steps) if config.alpha_warmup_steps else config.alpha

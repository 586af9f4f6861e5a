"""Temperature and hardness weight of a step."""

from megatron_llave.config.schema import LossConfig


def temperature_at(config: LossConfig, step: int) -> float:
    """Temperature of a step: from temperature_start to temperature, geometrically."""
    if config.temperature_start is None or step >= config.temperature_warmup_steps:
        return config.temperature
    done = step / config.temperature_warmup_steps
    return config.temperature_start ** (1 - done) * config.temperature**done


def alpha_at(config: LossConfig, step: int) -> float:
    """Hardness weight of a step: linearly from 0 to alpha."""
    return config.alpha * min(1.0, step / config.alpha_warmup_steps) if config.alpha_warmup_steps else config.alpha

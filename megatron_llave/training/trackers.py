"""Where a run's numbers go besides log.jsonl: TensorBoard, Weights & Biases. Both are optional packages.

logger.py gives every record to each of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_run_id"
"""In the run's folder, so that a resumed run goes on as the same one."""


class Sink(Protocol):
    """Takes what was logged."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def close(self) -> None:
        """The run is over."""


class TensorBoard:
    """Scalars in a folder of event files; steps that a resumed run repeats replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Raise ConfigError where the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.tensorboard=true needs the package tensorboard (pip install tensorboard)") from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """See Sink."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Sink."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project."""

    def __init__(self, output: Path, project: str, config: Mapping[str, Any]) -> None:
        """Raise ConfigError where the package is missing."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"log.wandb_project={project} needs the package wandb (pip install wandb)") from error
        file = output / WANDB_FILE
        known = file.read_text().strip() if file.is_file() else None
        resume = "allow" if known else None
        self._run = wandb.init(project=project, name=output.name, id=known, resume=resume, config=dict(config))
        file.write_text(self._run.id + "\n")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """See Sink."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See Sink."""
        self._run.finish()


def open_sinks(cfg: LogConfig, output: Path, first_step: int, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks that the configuration asks for.

    Args:
        cfg: the section `log`.
        output: folder of the run.
        first_step: the next one to be logged, from 1.
        config: the whole configuration, to be kept with the numbers.

    Raises:
        ConfigError: a package is missing.
    """
    sinks: list[Sink] = []
    if cfg.tensorboard:
        sinks.append(TensorBoard(output / TENSORBOARD_FOLDER, first_step))
    if cfg.wandb_project:
        sinks.append(WeightsAndBiases(output, cfg.wandb_project, config))
    return sinks

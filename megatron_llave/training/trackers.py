"""TensorBoard and Weights & Biases as further destinations of a run's metrics. Both are optional packages.

logger.py passes every record to each of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_run_id"
"""File in the output directory with the id of the run, so that a resumed run continues it."""


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Finish after the last step."""


class TensorBoard:
    """Writes scalars into event files; steps that a resumed run repeats replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the tracker, or raise ConfigError where the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.tensorboard=true needs the package tensorboard (pip install tensorboard)") from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class WeightsAndBiases:
    """Writes into a run of a Weights & Biases project."""

    def __init__(self, output: Path, project: str, config: Mapping[str, Any]) -> None:
        """Open the tracker, or raise ConfigError where the package is missing."""
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
        """See Tracker."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def open_trackers(cfg: LogConfig, output: Path, first_step: int, config: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers that the configuration names.

    Args:
        cfg: the section `log`.
        output: output directory of the run.
        first_step: number of the next step that is logged, from 1.
        config: the whole configuration, which is stored with the metrics.

    Raises:
        ConfigError: a package is missing.
    """
    trackers: list[Tracker] = []
    if cfg.tensorboard:
        trackers.append(TensorBoard(output / TENSORBOARD_FOLDER, first_step))
    if cfg.wandb_project:
        trackers.append(WeightsAndBiases(output, cfg.wandb_project, config))
    return trackers

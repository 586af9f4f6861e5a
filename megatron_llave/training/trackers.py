"""TensorBoard and Weights & Biases as further destinations of a run's metrics. Both are optional packages.

logger.py passes every record to each of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from megatron_llave.config.redact import config_without_secrets
from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError
from megatron_llave.training.metrics import GRADIENT_NORMS

GROUPS = {
    "train": (
        *("learning_rate", *GRADIENT_NORMS, "temperature", "temperature_gradient", "alpha"),
        *("soft_label_loss", "bad_steps"),
    ),
    "similarity": (
        *("positive_similarity", "hardest_negative_similarity"),
        *("similarity_margin", "similarity_auc", "similarity_overlap", "effective_negatives", "hardest_share"),
    ),
    "data": (
        *("pairs", "targets", "hard_negatives", "tokens", "tiles", "squared_lengths", "patch_pairs"),
        *("skipped", "cut", "data_seconds"),
    ),
    "performance": ("seconds", "save_seconds", "tflops", "mfu", "memory_gb"),
}
"""Group -> keys of a record; the name of a scalar is GROUP/KEY. `scalars_of` adds the groups' further scalars."""
GROUP_OF = {key: group for group, keys in GROUPS.items() for key in keys}
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_run_id"
"""File in the output directory with the id of the run, so that a resumed run continues it."""


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Names and values of a step's scalars, the same for every tracker.

    The loss is `loss/all` and `loss/SUBSET`, because its level differs between subsets. A learned temperature is
    `temperature/SUBSET` too. The throughput is
    `performance/pairs_per_second` and `performance/tokens_per_second`. Lists, texts and None are left out; a number
    without a group gets the group `train`.
    """
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
    scalars = {}
    if "loss" in numbers:
        loss = numbers.pop("loss")
        scalars = {"loss/all": loss, **({f"loss/{record['subset']}": loss} if "subset" in record else {})}
    if "temperature_gradient" in numbers and "subset" in record:
        scalars[f"temperature/{record['subset']}"] = numbers["temperature"]
    scalars |= {f"{GROUP_OF.get(key, 'train')}/{key}": value for key, value in numbers.items()}
    for key in ("pairs", "tokens"):
        if key in numbers and numbers.get("seconds", 0) > 0:
            scalars[f"performance/{key}_per_second"] = numbers[key] / numbers["seconds"]
    return scalars


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Finish after the last step."""


class TensorBoard:
    """Writes scalars into event files, and the configuration as text; repeated steps replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Any]) -> None:
        """Open the tracker, or raise ConfigError where the package is missing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.tensorboard=true needs the package tensorboard (pip install tensorboard)") from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)
        text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
        self._writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), first_step)

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
        config: the whole configuration, which is stored with the metrics, but for secrets (config/redact.py).

    Raises:
        ConfigError: a package is missing.
    """
    trackers: list[Tracker] = []
    config = config_without_secrets(config)
    if cfg.tensorboard:
        trackers.append(TensorBoard(output / TENSORBOARD_FOLDER, first_step, config))
    if cfg.wandb_project:
        trackers.append(WeightsAndBiases(output, cfg.wandb_project, config))
    return trackers

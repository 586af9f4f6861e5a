"""TensorBoard, Weights & Biases and MLflow as further destinations of a run's metrics. All are optional packages.

logger.py passes the values of every step (tracked_values.py) to each of them.
"""

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from megatron_llave.config.redact import config_without_secrets, without_secrets
from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError, DataError, import_optional, one_line
from megatron_llave.files import write_text
from megatron_llave.training.tracked_values import Histogram

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_run_id"
"""File in the output directory with the id of the run, so that a resumed run continues it."""
MLFLOW_FILE = "mlflow_run_id"
"""As WANDB_FILE."""
MLFLOW_BATCH, MLFLOW_LONGEST = 1000, 500
"""Numbers in a request, and characters of a parameter: as many as each MLflow takes."""
MOST_WAITING, MOST_TASKS = 200_000, 1000
"""Numbers and tasks that are kept for a server that does not take them; the oldest numbers are dropped beyond it."""
SECONDS_TO_SEND = 60
"""How long the end of a run waits for MLflow's server."""
EVERY_STEP, SCORE = "performance/seconds", "precision_at_1/"
"""A number that each step has, and the beginning of the names of those that only evaluations have."""
LONGEST_REASON = 300
"""Characters of the reason in the warning about a tracker."""


class Tracker(Protocol):
    """Receives the metrics of a run."""

    def step(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Record the metrics of a step."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Record an RGB image that was made after a step."""

    def close(self) -> None:
        """Finish after the last step."""


class TensorBoard:
    """Writes scalars into event files, and the configuration as text; repeated steps replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int, config: Mapping[str, Any]) -> None:
        """Open the tracker, or raise ConfigError where the package is missing."""
        needs, install = "log.tensorboard=true needs", "pip install tensorboard"
        tensorboard = import_optional("torch.utils.tensorboard", needs, install, "tensorboard")
        self._writer = tensorboard.SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)
        text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
        self._writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), first_step)

    def step(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """See Tracker. The sums of a histogram, which TensorBoard shows nowhere, are those of its bins' middles."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for name, histogram in histograms.items():
            counts, edges = np.array(histogram.counts), histogram.edges
            middles = (edges[1:] + edges[:-1]) / 2
            sums = int(counts.sum()), float(counts @ middles), float(counts @ middles**2)
            bins = {"bucket_limits": edges[1:].tolist(), "bucket_counts": histogram.counts}
            self._writer.add_histogram_raw(name, histogram.low, histogram.high, *sums, **bins, global_step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See Tracker."""
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class WeightsAndBiases:
    """Writes into a run of a Weights & Biases project; steps that the run has already are not sent again."""

    def __init__(self, output: Path, project: str, first_step: int, config: Mapping[str, Any]) -> None:
        """Open the tracker, or raise ConfigError where the package is missing."""
        wandb = import_optional("wandb", f"log.wandb_project={project} needs", "pip install wandb")
        known = known_run(output / WANDB_FILE, first_step)
        resume = "allow" if known else None
        self._wandb = wandb
        # Without the words of the command line, which may have secrets as the configuration may.
        settings = wandb.Settings(x_disable_meta=True)
        self._run = wandb.init(
            project=project, name=output.name, id=known, resume=resume, config=dict(config), settings=settings
        )
        write_text(output / WANDB_FILE, self._run.id + "\n")
        self._first = self._run.step if known else 0
        tell_of_repeated_steps("Weights & Biases", first_step, self._first - 1)

    def step(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """See Tracker."""
        drawn = {n: self._wandb.Histogram(np_histogram=(h.counts, h.edges.tolist())) for n, h in histograms.items()}
        self._log(step, {**values, **drawn})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See Tracker."""
        self._log(step, {name: self._wandb.Image(image)})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


class MlflowRun:
    """Writes into a run of an MLflow experiment; steps that the run has already are not sent again.

    A thread sends what has been recorded, up to MLFLOW_BATCH numbers at a time, so that training waits for no server.
    MLflow has no histograms, and gets none.
    """

    def __init__(
        self, output: Path, experiment: str, uri: str | None, first_step: int, config: Mapping[str, Any]
    ) -> None:
        """Open the tracker, or raise ConfigError where the package is missing."""
        mlflow = import_optional("mlflow", f"log.mlflow_experiment={experiment} needs", "pip install mlflow-skinny")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # of 7, which take minutes without a server
        logging.getLogger("urllib3.connectionpool").setLevel(
            logging.ERROR
        )  # a line for each retry, beside Forgiving's warning
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient(uri)
        known = known_run(output / MLFLOW_FILE, first_step)
        run = self._client.get_run(known) if known else self._new_run(experiment, output.name)
        self._id = run.info.run_id
        write_text(output / MLFLOW_FILE, self._id + "\n")
        self._client.update_run(self._id, status="RUNNING")
        self._write_parameters(run.data.params, config, first_step)
        keys = [key for key in run.data.metrics if key == EVERY_STEP or key.startswith(SCORE)]
        self._last = {key: max(one.step for one in self._client.get_metric_history(self._id, key)) for key in keys}
        tell_of_repeated_steps("MLflow", first_step, self._last.get(EVERY_STEP, -1))
        self._last_image = max((step for key, step in self._last.items() if key != EVERY_STEP), default=-1)
        self._waiting: deque[Any] = deque(maxlen=MOST_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: list[Future] = []

    def step(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """See Tracker. Raises what an earlier call has failed with in the meantime."""
        now = int(time.time() * 1000)
        for key, value in ((mlflow_key(name), value) for name, value in values.items()):
            if step > self._last.get(key if key.startswith(SCORE) else EVERY_STEP, -1):
                self._waiting.append(self._entities.Metric(key, value, now, step))
        self._send(self._send_waiting)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See Tracker."""
        if step > self._last_image:
            self._send(lambda: self._client.log_image(self._id, image, key=mlflow_key(name), step=step))

    def close(self) -> None:
        """See Tracker; waits for at most SECONDS_TO_SEND."""
        sent = [*self._sent, self._thread.submit(lambda: self._client.set_terminated(self._id))]
        done, late = wait(sent, SECONDS_TO_SEND)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._raise_failures(done)
        if late:
            raise DataError(f"the server has not taken everything within {SECONDS_TO_SEND} s")

    def _new_run(self, experiment: str, name: str) -> Any:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        return self._client.create_run(number, run_name=name)

    def _send(self, task: Callable[[], Any]) -> None:
        """Let the thread do something, and raise what has failed before."""
        done = [one for one in self._sent if one.done()]
        self._sent = [one for one in self._sent if not one.done()]
        if len(self._sent) < MOST_TASKS:
            self._sent.append(self._thread.submit(task))
        self._raise_failures(done)

    @staticmethod
    def _raise_failures(done: Iterable[Future]) -> None:
        for one in done:
            one.result()

    def _send_waiting(self) -> None:
        while self._waiting:
            count = min(MLFLOW_BATCH, len(self._waiting))
            self._client.log_batch(self._id, [self._waiting.popleft() for _ in range(count)])

    def _write_parameters(self, known: Mapping[str, str], config: Mapping[str, Any], first_step: int) -> None:
        """Write the configuration as parameters; what a resumed run has changed as tags, since parameters are fixed."""
        values = {key: str(value)[:MLFLOW_LONGEST] for key, value in flattened(config)}
        new = [self._entities.Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._id, params=new[start : start + 100])
        for key, value in values.items():
            if known.get(key, value) != value:
                self._client.set_tag(self._id, f"{key} from step {first_step}", value)


def mlflow_key(name: str) -> str:
    """A name as MLflow takes it: letters, digits, and some signs, of which others become underscores."""
    return re.sub(r"[^/\w.\- ]", "_", name)


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (section.key, value) of the values of a configuration that are no mappings with something in them."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{mlflow_key(str(key))}.")
        else:
            yield f"{prefix}{mlflow_key(str(key))}", value


class Forgiving:
    """A tracker whose failures cost what it does not record, and one warning, but never the run."""

    def __init__(self, name: str, build: Callable[[], Tracker]) -> None:
        """Open the tracker that `build` returns; `name` is the key that has asked for it.

        Raises:
            ConfigError: its package is missing.
        """
        self._name, self._has_warned, self._tracker = name, False, None
        with self._survived():
            self._tracker = build()

    def step(self, step: int, values: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """See Tracker."""
        with self._survived():
            if self._tracker is not None:
                self._tracker.step(step, values, histograms)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """See Tracker."""
        with self._survived():
            if self._tracker is not None:
                self._tracker.image(step, name, image)

    def close(self) -> None:
        """See Tracker."""
        with self._survived():
            if self._tracker is not None:
                self._tracker.close()

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # a tracker's package may raise anything, and none of it is worth a run
            if not self._has_warned:
                self._has_warned = True
                reason = without_secrets(f"{type(error).__name__}: {one_line(error)[:LONGEST_REASON]}")
                logger.warning("%s: %s; the run continues without what cannot be recorded", self._name, reason)


def known_run(file: Path, first_step: int) -> str | None:
    """The id of the run that a resumed run goes on with, from a file of its output directory; None: a new run.

    A run that begins at its first step is a new one, also in an output directory where an earlier one has failed.
    """
    return file.read_text().strip() or None if file.is_file() and first_step > 1 else None


def tell_of_repeated_steps(tracker: str, first_step: int, last_known: int) -> None:
    """Say which steps a resumed run repeats without sending them, since a tracker cannot replace those it has."""
    if first_step <= last_known:
        logger.info("%s has the steps %d to %d already and keeps them as they are", tracker, first_step, last_known)


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
    config = config_without_secrets(config)
    named: dict[str, Callable[[], Tracker]] = {}
    if cfg.tensorboard:
        named["log.tensorboard"] = lambda: TensorBoard(output / TENSORBOARD_FOLDER, first_step, config)
    if cfg.wandb_project:
        named["log.wandb_project"] = lambda: WeightsAndBiases(output, cfg.wandb_project, first_step, config)
    if cfg.mlflow_experiment:
        named["log.mlflow_experiment"] = lambda: MlflowRun(
            output, cfg.mlflow_experiment, cfg.mlflow_uri, first_step, config
        )
    return [Forgiving(name, build) for name, build in named.items()]

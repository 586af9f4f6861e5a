"""Measures cost and benefit of gathering the negatives, and models the cost on clusters.

`run_communication` starts ranks.py once for each number of processes, predicts the measured times with model.py, and
passes both to report.py. A result that already exists and has the same settings is not measured again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.communication.model import (
    Channel,
    Collective,
    cluster_steps,
    fit_channels,
    local_seconds,
    oversubscription,
)
from benchmarks.communication.report import Measured, write_report
from megatron_llave.config.load import load_config, override_config, save_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import DataError, UserError, require
from megatron_llave.files import read_json, write_json
from megatron_llave.study.run_folder import reason

FIXED = (
    "optimizer.learning_rate=0",  # so that all steps see the same weights
    "optimizer.min_learning_rate=0",
    "loss.mask_same_target=false",
    "loss.reward=self",
    "loss.matryoshka_dims=[]",
    "data.hard_negatives=0",
    "data.workers=0",
    "train.micro_batch_size=null",
    "checkpoint.init=null",
)
"""Overrides of every launch. They select the paper's loss, whose collectives `model.loss_collectives` lists."""
TIMEOUT_SECONDS = 3600
"""Time limit of a launch."""
END_SECONDS = 30
"""Time within which torchrun must end its ranks before it is killed."""
RANKS = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Launch:
    """The settings of a measurement with one number of processes."""

    cfg: RunConfig
    processes: int
    steps: int
    checkpoint: str | None
    out: Path

    @property
    def result(self) -> Path:
        """The JSON file that the ranks write."""
        return self.out / f"processes-{self.processes}.json"

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, in the form in which JSON returns it."""
        cores = len(os.sched_getaffinity(0))
        settings = {"config": asdict(self.cfg), "processes": self.processes, "cores": cores}
        return json.loads(json.dumps(settings | {"steps": self.steps, "checkpoint": self.checkpoint}))

    def is_done(self) -> bool:
        """Whether the result exists and has these settings."""
        try:
            return read_json(self.result)["settings"] == self.settings()
        except (DataError, KeyError):  # a missing or damaged result is measured again
            return False


def plan_launches(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    processes: Sequence[int],
    pairs: int,
    steps: int,
    checkpoint: str | None,
) -> list[Launch]:
    """Plan the launches, in rising order of processes.

    Args:
        config: YAML file with the model, the data and the loss; every rank is data parallel.
        overrides: section.key=value settings, which take precedence over the file; FIXED takes precedence over them.
        out: folder for the results.
        processes: numbers of processes; each is measured in its own launch.
        pairs: number of pairs per process, at least 2.
        steps: approximate number of batches measured per launch, after one warm-up batch; each subset has equally many.
        checkpoint: output directory of a run, or checkpoint, whose weights are loaded; None uses random weights, with
            which the number of effective negatives means little.

    Raises:
        ConfigError: the configuration cannot work with these numbers.
    """
    require(pairs >= 2, f"{pairs} pairs per process: a single pair has no negatives of its own; take at least 2")
    require(steps >= 1, f"{steps} steps are none to measure; take at least 1")
    require(bool(processes) and min(processes) >= 1, f"{processes} are no numbers of processes")
    launches = []
    for number in sorted(set(processes)):
        cfg = load_config(config, [*overrides, *FIXED, f"train.global_batch_size={number * pairs}"])
        starts = [
            f"data.subsets.{name}.start_step=0" for name in cfg.data.subsets
        ]  # all subsets are in the mixture from the start
        rates = [f"optimizer.part_learning_rates.{part}=0" for part in cfg.optimizer.part_learning_rates]
        cfg = override_config(cfg, [*starts, *rates])
        layout = cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.context
        require(layout == 1, "parallel.tensor, pipeline and context must be 1, as in tiny.yaml")
        launches.append(Launch(cfg, number, steps, checkpoint, out))
    return launches


def run_communication(launches: Sequence[Launch], out: Path, report: Callable[[str], None]) -> None:
    """Measure, model, and write communication.md, .csv and .png into `out`, which is created if it is missing.

    The links are fitted at the smallest number of processes above 1. `report` is called with a line for each launch.

    Raises:
        UserError: a rank failed or hung; the message contains its error, or names the file with its output.
    """
    out.mkdir(parents=True, exist_ok=True)
    for launch in launches:
        if launch.is_done():
            report(f"{launch.processes} processes: measured before")
            continue
        report(f"{launch.processes} processes: measuring")
        run_ranks(launch)
    write_report(predict([read_json(launch.result) for launch in launches]), cluster_steps(), out)
    report(f"report: {out / 'communication.md'}")


def run_ranks(launch: Launch, timeout: float = TIMEOUT_SECONDS) -> None:
    """Start the ranks under torchrun and wait until they have written their result.

    Raises:
        UserError: a rank failed, or the ranks have not ended after `timeout` seconds.
    """
    name = f"processes-{launch.processes}"
    config, request, log = (launch.out / f"{name}.{ending}" for ending in ("yaml", "request.json", "log"))
    save_config(launch.cfg, config)
    asked = {"config": str(config), "steps": launch.steps, "checkpoint": launch.checkpoint}
    write_json(request, asked | {"result": str(launch.result), "settings": launch.settings()})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, str(launch.processes), str(RANKS), str(request)]
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": search_path}
    # Use a file because a pipe can fill up, and because a surviving rank would hold a pipe open.
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise UserError(f"{launch.processes} processes: no end after {timeout:g} s, see {log}") from None
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its ranks
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    if status:
        raise UserError(f"{launch.processes} processes: {reason(log, status)}")


def predict(results: Sequence[dict[str, Any]]) -> list[Measured]:
    """Combine the results with the predictions of the model.

    Args:
        results: results of ranks.measure with their settings, in rising order of processes.
    """
    several = [result for result in results if result["settings"]["processes"] > 1]
    reference = _fit(several[0]) if several else {}
    measured = []
    for result in results:
        settings = result["settings"]
        ranks, cores = settings["processes"], settings["cores"]
        collectives = [Collective(kind, whole) for kind, whole, _ in result["collectives"]]
        slowdown = oversubscription(ranks, cores)
        measured.append(
            Measured(
                processes=ranks,
                cores=cores,
                pairs=settings["config"]["train"]["global_batch_size"] // ranks,
                steps=len(result["subsets"]),
                checkpoint=settings["checkpoint"],
                moving=sum(seconds for *_, seconds in result["collectives"]),
                modelled=local_seconds(collectives, ranks, reference, slowdown),
                modelled_own=local_seconds(collectives, ranks, _fit(result), slowdown),
                fitted_at=several[0]["settings"]["processes"] if several else 0,
                channels=reference,
                **{name: value for name, value in result.items() if name in Measured.__dataclass_fields__},
            )
        )
    return measured


def _fit(result: dict[str, Any]) -> dict[str, Channel]:
    """Fit the channels to the calibration of a launch; there are none for a single rank."""
    ranks = result["settings"]["processes"]
    samples = [(Collective(kind, whole), seconds) for kind, whole, seconds in result["calibration"]]
    return fit_channels(samples, ranks, oversubscription(ranks, result["settings"]["cores"]))

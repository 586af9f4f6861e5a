"""One run of a study: its folder, the commands that make it, and its state as read from the folder.

variants.py lists the runs and queue.py starts them. A run is trained and evaluated like any other run, by the commands
that a user would type.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_llave.checkpoint.folders import differences
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError, require
from megatron_llave.evaluation.benchmarks.prepared import is_prepared
from megatron_llave.files import read_json
from megatron_llave.launch.start import RANK
from megatron_llave.study.variants import START, Run
from megatron_llave.training.run_state import STATE_FILE

PLANNED = "planned.yaml"
OUTPUT = "output.log"
EVALUATION = "evaluation"
MERGED = "merged"


@dataclass(frozen=True)
class Plan:
    """Settings that all runs of a study share."""

    config: Path
    """File of the base configuration."""
    start_config: Path | None
    """File of the configuration of the run that each seed trains first; None: no such run."""
    out: Path
    """Folder of the study."""
    overrides: tuple[str, ...]
    """Overrides of every run, which precede those of its variant."""
    per_run: int
    """Number of processes of a run."""

    def folder(self, run: Run) -> Path:
        """Folder of a run."""
        return self.out / run.name

    def overrides_of(self, run: Run) -> list[str]:
        """All overrides of a run's configuration file."""
        last = [f"train.seed={run.seed}", f"train.output={quoted(self.folder(run))}"]
        if run.start is not None:
            last.append(f"checkpoint.init={quoted(self.out / run.start)}")
        return [*self.overrides, *run.variant.overrides, *last]

    def config_of(self, run: Run) -> Path:
        """Configuration file of a run."""
        return self.start_config if run.variant.name == START and self.start_config else self.config

    def load(self, run: Run) -> RunConfig:
        """Configuration of a run.

        Raises:
            ConfigError: the configuration cannot work.
        """
        return load_config(self.config_of(run), self.overrides_of(run))


def quoted(path: Path) -> str:
    """A path as a quoted YAML string, because an unquoted one may hold the start of a comment (` #`)."""
    return json.dumps(str(path), ensure_ascii=False)


def is_finished(folder: Path) -> bool:
    """Whether a run has been trained and evaluated."""
    return (folder / EVALUATION / "report.json").is_file()


def commands(plan: Plan, run: Run, cfg: RunConfig) -> Iterator[list[str]]:
    """Commands that make a run: training or merging, then the evaluation. Ask for one when the one before has ended."""
    folder = plan.folder(run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.per_run)]
    checkpoint = folder
    if run.variant.merge:
        checkpoint = folder / MERGED
        parts = [f"{plan.out / name}={share:g}" for name, (_, share) in zip(run.needs, run.variant.merge)]
        if not checkpoint.exists():
            yield [sys.executable, str(RANK), "merge", *parts, "--to", str(checkpoint)]
    else:
        settings = ["--config", str(plan.config_of(run)), *plan.overrides_of(run), "--resume", "auto"]
        yield [*torchrun, "-m", "megatron_llave.train", *settings]
        require_trained(folder)
    data = cfg.evaluate.path or cfg.data.path
    given = ["--checkpoint", str(checkpoint), "--data", data, "--out", str(folder / EVALUATION)]
    command = "prepared" if is_prepared(Path(data)) else "mmeb"
    if command == "mmeb":
        given += ["--images", cfg.evaluate.images or data]
        given += ["--subsets", ",".join(cfg.evaluate.sets)] if cfg.evaluate.sets else []
    layout = [f"parallel.{key}={getattr(cfg.parallel, key)}" for key in ("tensor", "pipeline", "sequence")]
    yield [*torchrun, str(RANK), "evaluate", command, *given, *layout]


def require_trained(folder: Path) -> None:
    """Refuse to evaluate a run that was stopped before its last step, after which torchrun's exit status is 0 too.

    Raises:
        CheckpointError: the message gives the reason of the stop.
    """
    file = folder / STATE_FILE
    state = read_json(file, hint="the training could not write it", error=CheckpointError)
    if state["state"] != "finished":
        raise CheckpointError(f"{state['state']} after step {state['step']}: {state['reason']}")


def require_same_settings(folder: Path, cfg: RunConfig) -> None:
    """Refuse a folder that holds a run with other settings.

    Raises:
        ConfigError: the message names the settings that differ.
    """
    planned = folder / PLANNED
    if planned.is_file():
        before, now = asdict(load_config(planned)), asdict(cfg)
        for settings in (before, now):  # the same path may be written in several ways
            del settings["train"]["output"], settings["checkpoint"]["init"]
        changed = "; ".join(differences(before, now))
        require(not changed, f"{folder} holds a run with other settings: {changed}; choose another --out")


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Processes on this machine that train or evaluate the run in `folder`; they may outlive a killed torchrun."""
    words = {f"train.output={quoted(folder)}", str(folder / EVALUATION)}
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if words.intersection(process.info["cmdline"] or [])]


def reason(output: Path, status: int) -> str:
    """The last error message in a run's output, or its exit status where there is none."""
    lines = output.read_text(errors="replace").splitlines()[-200:]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"exit status {status}, see {output}"

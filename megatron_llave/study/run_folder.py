"""One run of a study: its folder, the commands that make it, and what its folder tells of it.

Between arms.py, which says what runs there are, and queue.py, which starts them. A run is trained and evaluated as any
run is, by the commands that a user would type.
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
from megatron_llave.study.arms import START, Run
from megatron_llave.training.fault_tolerance import STATE_FILE

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PLANNED = "planned.yaml"
OUTPUT = "output.log"
EVALUATION = "evaluation"
MERGED = "merged"


@dataclass(frozen=True)
class Plan:
    """What all runs of a study share."""

    config: Path
    """Base configuration."""
    start_config: Path | None
    """Configuration of the run that each seed starts from, if it trains one."""
    out: Path
    overrides: tuple[str, ...]
    """For every run, before those of its arm."""
    per_run: int
    """Processes of a run."""

    def folder(self, run: Run) -> Path:
        """Of a run."""
        return self.out / run.name

    def overrides_of(self, run: Run) -> list[str]:
        """Everything that a run has over its configuration file."""
        own = [f"train.seed={run.seed}", f"train.output={quoted(self.folder(run))}"]
        if run.start is not None:
            own.append(f"checkpoint.init={quoted(self.out / run.start)}")
        return [*self.overrides, *run.arm.overrides, *own]

    def config_of(self, run: Run) -> Path:
        """The file that a run starts from."""
        return self.start_config if run.arm.name == START and self.start_config else self.config

    def load(self, run: Run) -> RunConfig:
        """What a run is configured to be.

        Raises:
            ConfigError: it cannot work.
        """
        return load_config(self.config_of(run), self.overrides_of(run))


def quoted(path: Path) -> str:
    """As a string of YAML, in which a space and a # would begin a comment."""
    return json.dumps(str(path), ensure_ascii=False)


def is_finished(folder: Path) -> bool:
    """Whether a run's folder has all that a study wants of it."""
    return (folder / EVALUATION / "report.json").is_file()


def commands(plan: Plan, run: Run, cfg: RunConfig) -> Iterator[list[str]]:
    """What makes a run: training or merging, then the evaluation. Each is asked for when the one before has ended."""
    folder = plan.folder(run)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.per_run)]
    checkpoint = folder
    if run.arm.merge:
        checkpoint = folder / MERGED
        parts = [f"{plan.out / name}={share:g}" for name, (_, share) in zip(run.needs, run.arm.merge)]
        if not checkpoint.exists():
            yield [sys.executable, str(TOOLS / "merge.py"), *parts, "--to", str(checkpoint)]
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
    yield [*torchrun, str(TOOLS / "evaluate.py"), command, *given, *layout]


def require_trained(folder: Path) -> None:
    """Refuse to evaluate a run that was stopped before its last step, with which torchrun ends well too.

    Raises:
        CheckpointError: says who stopped it.
    """
    file = folder / STATE_FILE
    state = read_json(file, hint="the training could not write it", error=CheckpointError)
    if state["state"] != "finished":
        raise CheckpointError(f"{state['state']} after step {state['step']}: {state['reason']}")


def require_same_settings(folder: Path, cfg: RunConfig) -> None:
    """Refuse a folder that holds a run with other settings.

    Raises:
        ConfigError: names what differs.
    """
    planned = folder / PLANNED
    if planned.is_file():
        before, now = asdict(load_config(planned)), asdict(cfg)
        for one in (before, now):  # paths, which may be written in another way
            del one["train"]["output"], one["checkpoint"]["init"]
        changed = "; ".join(differences(before, now))
        require(not changed, f"{folder} holds a run with other settings: {changed}; choose another --out")


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Processes on this machine that train or evaluate the run in `folder`: ranks outlive a torchrun that is killed."""
    words = {f"train.output={quoted(folder)}", str(folder / EVALUATION)}
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if words.intersection(process.info["cmdline"] or []):
            found.append(process)
    return found


def reason(output: Path, status: int) -> str:
    """What a run said in its last line that tells of an error; where it said nothing, its status."""
    lines = output.read_text(errors="replace").splitlines()[-200:]
    said = [line for line in lines if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else f"exit status {status}, see {output}"

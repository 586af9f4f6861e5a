"""Runs of a study in a queue: as many at a time as the processes allow, each trained and evaluated as any run is.

Second step of a study. A finished run is never done again, one that was interrupted goes on from its newest checkpoint,
one that failed is tried again by the next call. Nothing is held in memory that a kill could lose: a run is finished
when its evaluation's report is there.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import torch

from megatron_llave import config_file
from megatron_llave.checkpoint import differences
from megatron_llave.config import RunConfig
from megatron_llave.config_model import require
from megatron_llave.data.evaluation_sets import is_prepared
from megatron_llave.errors import CheckpointError
from megatron_llave.fault_tolerance import STATE_FILE
from megatron_llave.study.arms import START, Run

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PLANNED = "planned.yaml"
OUTPUT = "output.log"
LOCK = ".lock"
EVALUATION = "evaluation"
MERGED = "merged"
POLL_SECONDS = 0.5
END_SECONDS = 300
"""A run that is asked to stop may take so long to save."""


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
        own = [f"train.seed={run.seed}", f"train.output={self.folder(run)}"]
        if run.start is not None:
            own.append(f"checkpoint.init={self.out / run.start}")
        return [*self.overrides, *run.arm.overrides, *own]

    def config_of(self, run: Run) -> Path:
        """The file that a run starts from."""
        return self.start_config if run.arm.name == START and self.start_config else self.config

    def load(self, run: Run) -> RunConfig:
        """What a run is configured to be.

        Raises:
            ConfigError: it cannot work.
        """
        return config_file.load(self.config_of(run), self.overrides_of(run))


@dataclass
class Outcome:
    """How the runs ended."""

    failed: dict[str, str] = field(default_factory=dict)
    """Run -> why."""
    num_done: int = 0
    """Finished by this call."""
    num_before: int = 0
    """Finished before it."""


@dataclass
class _Active:
    """A run that is going on."""

    run: Run
    slot: int
    commands: Iterator[list[str]]
    process: subprocess.Popen
    lock: IO[str]
    started: float


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
    evaluate = [*torchrun, str(TOOLS / "evaluate.py")]
    data = cfg.evaluate.path or cfg.data.path
    sets = []
    if not is_prepared(Path(data)):
        evaluate.append("mmeb")
        sets = [
            "--images",
            cfg.evaluate.images or data,
            *(["--subsets", *cfg.evaluate.sets] if cfg.evaluate.sets else []),
        ]
    layout = [f"parallel.{key}={getattr(cfg.parallel, key)}" for key in ("tensor", "pipeline", "sequence")]
    given = ["--checkpoint", str(checkpoint), "--data", data, "--out", str(folder / EVALUATION)]
    yield [*evaluate, *given, *layout, *sets]


def require_trained(folder: Path) -> None:
    """Refuse to evaluate a run that was stopped before its last step, with which torchrun ends well too.

    Raises:
        CheckpointError: says who stopped it.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the training could not write it")
    state = json.loads(file.read_text())
    if state["state"] != "finished":
        raise CheckpointError(f"{state['state']} after step {state['step']}: {state['reason']}")


def check(plan: Plan, runs: Sequence[Run]) -> dict[str, RunConfig]:
    """The configuration of every run, all of which can work and none of which contradicts what its folder holds.

    Raises:
        ConfigError: one cannot, or a folder has a run with other settings; nothing has been started then.
    """
    cfgs = {}
    for run in runs:
        cfgs[run.name] = plan.load(run)
        planned = plan.folder(run) / PLANNED
        if planned.is_file():
            before, now = asdict(config_file.load(planned)), asdict(cfgs[run.name])
            changed = "; ".join(differences(before, now))
            require(not changed, f"{plan.folder(run)} holds a run with other settings: {changed}; choose another --out")
    return cfgs


def run_all(plan: Plan, runs: Sequence[Run], processes: int, report: Callable[[str], None]) -> Outcome:
    """Run what is not finished, `processes` // plan.per_run at a time, and wait for it.

    Args:
        plan: what the runs share.
        runs: those that others need first.
        processes: at a time; on GPUs each has one of its own.
        report: told in one line of each run that starts or ends.

    Raises:
        ConfigError: a run cannot work, or contradicts its folder.
    """
    queue = _Queue(plan, check(plan, runs), list(runs), list(range(processes // plan.per_run)), report)
    queue.drop_finished()
    queue.outcome.num_before = len(queue.finished)
    try:
        while queue.waiting or queue.active:
            queue.drop_hopeless()
            queue.start_ready()
            time.sleep(POLL_SECONDS)
            queue.collect()
            queue.drop_finished()
    finally:
        _end(queue.active)
    return queue.outcome


@dataclass
class _Queue:
    """Where the runs of a study are."""

    plan: Plan
    cfgs: dict[str, RunConfig]
    waiting: list[Run]
    free: list[int]
    """Slots: a run in slot s has the s-th per_run GPUs."""
    report: Callable[[str], None]
    active: list[_Active] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    """Runs that another process was at when they were to be started."""
    outcome: Outcome = field(default_factory=Outcome)

    def drop_finished(self) -> None:
        """Runs that need nothing more, since an earlier call or another study has done them."""
        for run in [run for run in self.waiting if is_finished(self.plan.folder(run))]:
            self.waiting.remove(run)
            self.finished.add(run.name)

    def drop_hopeless(self) -> None:
        """Runs that need one that has failed, or one that nobody here will do."""
        here = self.finished | {run.name for run in self.waiting} | {one.run.name for one in self.active}
        for run in list(self.waiting):
            for name in run.needs:
                if name not in here and not is_finished(self.plan.out / name):
                    why = "has failed" if name in self.outcome.failed else "is not finished"
                    self.outcome.failed[run.name] = f"it needs {name}, which {why}"
            if run.name in self.outcome.failed:
                self.waiting.remove(run)

    def start_ready(self) -> None:
        """As many as there are slots for; those that another process is at come last."""
        ready = [run for run in self.waiting if all(is_finished(self.plan.out / name) for name in run.needs)]
        for run in sorted(ready, key=lambda run: run.name in self.elsewhere):
            if not self.free:
                return
            started = _start(self.plan, run, self.cfgs[run.name], self.free[0])
            if started is None:
                if run.name not in self.elsewhere:
                    self.report(f"{run.name}: another process is at it, perhaps one that a killed study left; waiting")
                self.elsewhere.add(run.name)
            else:
                self.report(f"{run.name}: started")
                self.active.append(started)
                self.free.pop(0)
                self.waiting.remove(run)

    def collect(self) -> None:
        """Runs that are over."""
        for one in [one for one in self.active if _has_ended(one, self.outcome, self.plan, self.report)]:
            self.active.remove(one)
            self.free.append(one.slot)
            one.lock.close()
            if one.run.name not in self.outcome.failed:
                self.finished.add(one.run.name)
                self.outcome.num_done += 1


def _start(plan: Plan, run: Run, cfg: RunConfig, slot: int) -> _Active | None:
    """The run's first process; None while another one is at it: of a second study, or left behind by a killed one."""
    folder = plan.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    config_file.save(cfg, folder / PLANNED)
    steps = commands(plan, run, cfg)
    return _Active(run, slot, steps, _launch(plan, folder, next(steps), slot, lock), lock, time.monotonic())


def _launch(plan: Plan, folder: Path, command: list[str], slot: int, lock: IO[str]) -> subprocess.Popen:
    """Start one command of a run. It holds the lock too: should the study be killed, until it has ended itself."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    if torch.cuda.device_count():
        own = range(slot * plan.per_run, (slot + 1) * plan.per_run)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] if len(visible) > i else str(i) for i in own)
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=env,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )


def _has_ended(one: _Active, outcome: Outcome, plan: Plan, report: Callable[[str], None]) -> bool:
    """Whether a run is over; starts its next command when one has ended well."""
    status = one.process.poll()
    if status is None:
        return False
    folder = plan.folder(one.run)
    minutes = (time.monotonic() - one.started) / 60
    why = ""
    if status == 0:
        try:
            following = next(one.commands, None)
        except CheckpointError as error:
            following, why = None, str(error)
        if following is not None:
            one.process = _launch(plan, folder, following, one.slot, one.lock)
            return False
        if is_finished(folder):
            report(f"{one.run.name}: finished after {minutes:.1f} min")
            return True
    outcome.failed[one.run.name] = why or reason(folder / OUTPUT, status)
    report(f"{one.run.name}: failed after {minutes:.1f} min: {outcome.failed[one.run.name]}")
    return True


def reason(output: Path, status: int) -> str:
    """What a run said in its last line that tells of an error; where it said nothing, its status."""
    lines = output.read_text(errors="replace").splitlines()[-200:]
    said = [line for line in lines if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else f"exit status {status}, see {output}"


def _end(active: Sequence[_Active]) -> None:
    """Ask the runs that are going on to save and stop, and wait for it."""
    for one in active:
        one.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for one in active:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, 9)
        one.lock.close()

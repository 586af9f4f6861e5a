"""Runs of a study in a queue: as many at a time as the processes allow, each trained and evaluated as any run is.

Second step of a study. A finished run is never done again, one that was interrupted goes on from its newest checkpoint,
one that failed is tried again by the next call. Nothing is held in memory that a kill could lose: a run is finished
when its evaluation's report is there.
"""

import fcntl
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import psutil
import torch

from megatron_llave.checkpoint.folders import differences
from megatron_llave.config.load import load_config, save_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError, ConfigError, require
from megatron_llave.files import atomic_write, read_json
from megatron_llave.study.arms import Run
from megatron_llave.study.run_folder import (
    OUTPUT,
    PLANNED,
    Plan,
    commands,
    is_finished,
    ranks_of,
    reason,
    require_same_settings,
)

STUDY = "study.json"
LOCK = ".lock"
POLL_SECONDS = 0.5
SAVE_SECONDS = 240
"""torchrun waits so long for ranks that it has asked to stop, which save first."""
END_SECONDS = SAVE_SECONDS + 60


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


def check_study(plan: Plan, name: str) -> None:
    """Keep what all runs in the study's folder have in common, or compare with what was kept.

    Raises:
        ConfigError: its runs are of another study, base configuration, start or number of processes.
    """
    cfg = load_config(plan.config, plan.overrides)
    start = load_config(plan.start_config, plan.overrides) if plan.start_config else None
    own = {"study": name, "config": asdict(cfg), "start": start and asdict(start), "processes per run": plan.per_run}
    own = json.loads(json.dumps(own))
    file = plan.out / STUDY
    plan.out.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=plan.out, prefix=".study", suffix=".partial") as partial:
        json.dump(own, partial, indent=1)
        partial.flush()
        with suppress(FileExistsError):
            os.link(partial.name, file)  # unlike a rename it leaves the file of whoever was first
    hint = "choose another --out"
    changed = "; ".join(differences(read_json(file, hint=hint, error=ConfigError), own))
    require(not changed, f"{plan.out} holds another study or other settings: {changed}; {hint}")


def check(plan: Plan, runs: Sequence[Run]) -> dict[str, RunConfig]:
    """The configuration of every run, all of which can work and none of which contradicts what its folder holds.

    Raises:
        ConfigError: one cannot, or a folder has a run with other settings; nothing has been started then.
    """
    cfgs = {}
    for run in runs:
        cfgs[run.name] = plan.load(run)
        require_same_settings(plan.folder(run), cfgs[run.name])
    return cfgs


def run_all(plan: Plan, study: str, runs: Sequence[Run], processes: int, report: Callable[[str], None]) -> Outcome:
    """Run what is not finished, `processes` // plan.per_run at a time, and wait for it.

    Args:
        plan: what the runs share.
        study: its name.
        runs: those that others need first.
        processes: at a time; on GPUs each has one of its own.
        report: told in one line of each run that starts or ends.

    Raises:
        ConfigError: a run cannot work, or contradicts its folder or the study's; or there are too few GPUs.
    """
    cfgs = check(plan, runs)
    check_study(plan, study)
    visible_gpus(processes)
    queue = _Queue(plan, cfgs, list(runs), list(range(processes // plan.per_run)), report)
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
            if started is None and not is_finished(self.plan.folder(run)):
                if run.name not in self.elsewhere:
                    self.report(f"{run.name}: another process is at it, perhaps one that a killed study left; waiting")
                self.elsewhere.add(run.name)
            elif started is not None:
                self.report(f"{run.name}: started")
                self.active.append(started)
                self.free.pop(0)
                self.waiting.remove(run)

    def collect(self) -> None:
        """Runs that are over."""
        for one in [one for one in self.active if _advance(one, self.outcome, self.plan, self.report)]:
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
    if is_finished(folder) or ranks_of(folder):
        lock.close()
        return None
    require_same_settings(folder, cfg)  # another study may have begun it since the check
    with atomic_write(folder / PLANNED) as temporary:
        save_config(cfg, temporary)
    steps = commands(plan, run, cfg)
    return _Active(run, slot, steps, _launch(plan, folder, next(steps), slot, lock), lock, time.monotonic())


def visible_gpus(processes: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or would; nothing on a machine without GPUs.

    Raises:
        ConfigError: there are fewer than `processes`.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    require(len(names) >= processes, f"--processes {processes} is more than the {len(names)} GPUs there are")
    return names


def _launch(plan: Plan, folder: Path, command: list[str], slot: int, lock: IO[str]) -> subprocess.Popen:
    """Start one command of a run. It holds the lock too: should the study be killed, until it has ended itself."""
    env = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS), **os.environ}
    first = slot * plan.per_run
    gpus = visible_gpus(first + plan.per_run)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + plan.per_run])
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


def _advance(one: _Active, outcome: Outcome, plan: Plan, report: Callable[[str], None]) -> bool:
    """Start the next command of a run when one has ended well; True when the run is over."""
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


def _end(active: Sequence[_Active]) -> None:
    """Ask the runs that are going on to save and stop, and wait for it."""
    for one in active:
        one.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for one in active:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            root = psutil.Process(one.process.pid)
            for process in [*root.children(recursive=True), root]:
                process.kill()
        one.lock.close()

"""Runs the runs of a study from a queue, as many at a time as the number of processes allows.

This is the second step of a study. A finished run is never repeated, an interrupted one resumes from its newest
checkpoint, and a failed one is tried again by the next call. A kill loses nothing, because all state is on disk: a run
is finished when the report of its evaluation exists.
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
from megatron_llave.study.variants import Run

STUDY = "study.json"
LOCK = ".lock"
POLL_SECONDS = 0.5
SAVE_SECONDS = 240
"""How long torchrun waits for ranks that it has asked to stop, and which save before they do."""
END_SECONDS = SAVE_SECONDS + 60


@dataclass
class Outcome:
    """Results of the runs."""

    failed: dict[str, str] = field(default_factory=dict)
    """Name of a run that failed -> why it failed."""
    num_done: int = 0
    """Number of runs that this call has finished."""
    num_before: int = 0
    """Number of runs that were finished before this call."""


@dataclass
class _Active:
    """A run in progress."""

    run: Run
    slot: int
    commands: Iterator[list[str]]
    process: subprocess.Popen
    lock: IO[str]
    started: float


def check_study(plan: Plan, name: str) -> None:
    """Write the settings that all runs of the study share into its folder, or compare them with those of before.

    Raises:
        ConfigError: the folder holds runs of another study, base configuration, start or number of processes.
    """
    cfg = load_config(plan.config, plan.overrides)
    start = load_config(plan.start_config, plan.overrides) if plan.start_config else None
    settings = {
        "study": name,
        "config": asdict(cfg),
        "start": start and asdict(start),
        "processes per run": plan.per_run,
    }
    settings = json.loads(json.dumps(settings))
    file = plan.out / STUDY
    plan.out.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=plan.out, prefix=".study", suffix=".partial") as partial:
        json.dump(settings, partial, indent=1)
        partial.flush()
        with suppress(FileExistsError):
            os.link(partial.name, file)  # unlike a rename, a link keeps the file of the first process
    hint = "choose another --out"
    changed = "; ".join(differences(read_json(file, hint=hint, error=ConfigError), settings))
    require(not changed, f"{plan.out} holds another study or other settings: {changed}; {hint}")


def check(plan: Plan, runs: Sequence[Run]) -> dict[str, RunConfig]:
    """Load the configuration of every run, before any is started.

    Raises:
        ConfigError: a configuration cannot work, or the folder of a run holds one with other settings.
    """
    cfgs = {}
    for run in runs:
        cfgs[run.name] = plan.load(run)
        require_same_settings(plan.folder(run), cfgs[run.name])
    return cfgs


def run_all(plan: Plan, study: str, runs: Sequence[Run], processes: int, report: Callable[[str], None]) -> Outcome:
    """Run what is not finished, `processes` // plan.per_run runs at a time, and wait for all of them.

    Args:
        plan: settings that the runs share.
        study: name of the study.
        runs: the runs; those that others need come first.
        processes: number of processes at a time; on GPUs each process has one of its own.
        report: called with a line of text for each run that starts or ends.

    Raises:
        ConfigError: a run cannot work, its folder or that of the study has other settings, or there are too few GPUs.
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
    """The runs of a study by their state."""

    plan: Plan
    cfgs: dict[str, RunConfig]
    waiting: list[Run]
    free: list[int]
    """Free slots; a run in slot s uses the s-th group of `per_run` GPUs."""
    report: Callable[[str], None]
    active: list[_Active] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    """Runs that could not be started because another process was working on them."""
    outcome: Outcome = field(default_factory=Outcome)

    def drop_finished(self) -> None:
        """Drop the waiting runs that are finished, by an earlier call or by another study in the same folder."""
        for run in [run for run in self.waiting if is_finished(self.plan.folder(run))]:
            self.waiting.remove(run)
            self.finished.add(run.name)

    def drop_hopeless(self) -> None:
        """Drop the waiting runs that need a run which has failed or which is not in the queue."""
        here = self.finished | {run.name for run in self.waiting} | {active.run.name for active in self.active}
        for run in list(self.waiting):
            for name in run.needs:
                if name not in here and not is_finished(self.plan.out / name):
                    why = "has failed" if name in self.outcome.failed else "is not finished"
                    self.outcome.failed[run.name] = f"it needs {name}, which {why}"
            if run.name in self.outcome.failed:
                self.waiting.remove(run)

    def start_ready(self) -> None:
        """Start as many runs as there are free slots; those that another process works on come last."""
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
        """Remove the active runs that have ended."""
        for active in [active for active in self.active if _advance(active, self.outcome, self.plan, self.report)]:
            self.active.remove(active)
            self.free.append(active.slot)
            active.lock.close()
            if active.run.name not in self.outcome.failed:
                self.finished.add(active.run.name)
                self.outcome.num_done += 1


def _start(plan: Plan, run: Run, cfg: RunConfig, slot: int) -> _Active | None:
    """Start a run; None while another process works on it, of a second study or of a killed one."""
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
    require_same_settings(folder, cfg)  # another study may have started it since the check
    with atomic_write(folder / PLANNED) as temporary:
        save_config(cfg, temporary)
    steps = commands(plan, run, cfg)
    return _Active(run, slot, steps, _launch(plan, folder, next(steps), slot, lock), lock, time.monotonic())


def visible_gpus(processes: int) -> list[str]:
    """Names of the GPUs as in CUDA_VISIBLE_DEVICES; an empty list on a machine without GPUs.

    Raises:
        ConfigError: there are fewer GPUs than `processes`.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    require(len(names) >= processes, f"--processes {processes} is more than the {len(names)} GPUs there are")
    return names


def _launch(plan: Plan, folder: Path, command: list[str], slot: int, lock: IO[str]) -> subprocess.Popen:
    """Start one command of a run. It inherits the lock, so that it holds it even after a kill of the study."""
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


def _advance(active: _Active, outcome: Outcome, plan: Plan, report: Callable[[str], None]) -> bool:
    """Start the next command of a run when one has succeeded; True when the run has ended."""
    status = active.process.poll()
    if status is None:
        return False
    folder = plan.folder(active.run)
    minutes = (time.monotonic() - active.started) / 60
    why = ""
    if status == 0:
        try:
            following = next(active.commands, None)
        except CheckpointError as error:
            following, why = None, str(error)
        if following is not None:
            active.process = _launch(plan, folder, following, active.slot, active.lock)
            return False
        if is_finished(folder):
            report(f"{active.run.name}: finished after {minutes:.1f} min")
            return True
    outcome.failed[active.run.name] = why or reason(folder / OUTPUT, status)
    report(f"{active.run.name}: failed after {minutes:.1f} min: {outcome.failed[active.run.name]}")
    return True


def _end(active: Sequence[_Active]) -> None:
    """Ask the active runs to save and stop, and wait until they have."""
    for entry in active:
        entry.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for entry in active:
        try:
            entry.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            root = psutil.Process(entry.process.pid)
            for process in [*root.children(recursive=True), root]:
                process.kill()
        entry.lock.close()

"""Two starts into one output directory, Ctrl-C, and what is left of a run whose launcher was killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from forking import end

from benchmarks.kill_resume import SECONDS_TO_BE_GONE, of, start
from megatron_llave.training.run_state import read_state

pytestmark = pytest.mark.long


@pytest.fixture
def endless(openmoji_data: Path, tmp_path: Path) -> Iterator[tuple]:
    """A run on two ranks that has done a step and does not end by itself: its launcher, and its output directory."""
    run = tmp_path / "run"
    launcher = start(run, openmoji_data, "train.steps=1000000", "checkpoint.interval=100000")
    deadline = time.monotonic() + 200
    while not (run / "log.jsonl").is_file() or not (run / "log.jsonl").stat().st_size:
        assert launcher.is_alive() and time.monotonic() < deadline, run.with_suffix(".log").read_text()
        time.sleep(0.05)
    yield launcher, run
    end([launcher])


def test_second_start_is_refused_and_killed_launcher_leaves_nothing(endless, openmoji_data: Path) -> None:
    launcher, run = endless
    ranks, children = of(launcher)
    assert len(ranks) == 2 and len(children) >= 2
    output = run.with_suffix(".log")
    before = len(output.read_text())
    second = start(run, openmoji_data)
    second.join(200)
    said = output.read_text()[before:].splitlines()
    assert second.exitcode == 1
    [line] = [line for line in said if line.startswith("error: ")]
    assert f"another process is writing into {run}: process {ranks[0].pid} on " in line
    assert not any("Traceback" in line for line in said)
    assert read_state(run)["state"] == "running" and read_state(run)["pid"] == ranks[0].pid

    os.kill(launcher.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs([*ranks, *children], SECONDS_TO_BE_GONE)
    assert not alive
    state = read_state(run)
    assert (state["state"], state["reason"]) == ("stopped", "torchrun is gone")
    assert (run / "checkpoints" / f"step-{state['step']:07d}" / "manifest.json").is_file()


def test_ranks_of_a_tool_end_with_their_launcher() -> None:
    """An evaluation has nothing to save, so it ends at once and leaves its folder to the next one."""
    module = "import sys, time; from megatron_llave.processes import end_with_launcher; end_with_launcher()"
    rank = f"{module}; print('ready', file=sys.stderr, flush=True); time.sleep(600)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", launcher], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "ready\n"
        started = psutil.Process(process.pid).children()
        process.kill()
        assert not psutil.wait_procs(started, SECONDS_TO_BE_GONE)[1]
        assert f"error: torchrun (process {process.pid}) is gone; its ranks end" in process.stderr.read()


def test_ctrl_c_saves_and_is_one_line(endless) -> None:
    """To all processes of the run, as a terminal sends it, and once more, as torchrun does."""
    launcher, run = endless
    ranks, children = of(launcher)
    for process in [*ranks, *children, *ranks]:
        process.send_signal(signal.SIGINT)
    launcher.join(200)
    assert launcher.exitcode == 0
    said = run.with_suffix(".log").read_text()
    assert said.count("Ctrl-C: the run saves after this step and stops") == 1
    assert "Traceback" not in said and "KeyboardInterrupt" not in said
    state = read_state(run)
    assert (state["state"], state["reason"]) == ("stopped", "Ctrl-C")
    assert (run / "checkpoints" / f"step-{state['step']:07d}" / "manifest.json").is_file()

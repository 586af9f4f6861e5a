"""Requests to stop, steps that are not finite, ranks that hang: alone here, over several ranks by check_watchdog.py."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_ranks import run_torchrun

from megatron_llave.errors import DivergedError
from megatron_llave.training.fault_tolerance import EXIT_HUNG, FiniteSteps, StopReason, StopRequests, read_norms

pytestmark = pytest.mark.long

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_is_a_request(groups, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    requests = StopRequests(tmp_path, None)
    assert requests.reason() == ""
    os.kill(os.getpid(), number)
    assert requests.reason() == StopReason[number.name].value
    requests.close()
    assert signal.getsignal(number) == before


def test_ctrl_c_during_the_handling_of_ctrl_c_is_the_same_one(groups, tmp_path: Path, monkeypatch) -> None:
    requests, said = StopRequests(tmp_path, None), []

    def write(_: int, text: bytes) -> None:
        said.append(text)
        if len(said) < 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        signal.raise_signal(signal.SIGINT)
    assert len(said) == 1 and requests.reason() == "Ctrl-C"
    requests.close()


def test_stop_file_is_a_request_of_this_run_alone(groups, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()  # of the run before
    requests = StopRequests(tmp_path, None)
    assert requests.reason() == ""
    (tmp_path / "stop").touch()
    assert requests.reason() == "a file 'stop' in train.output"
    requests.close()


def test_time_limit_is_a_request(groups, tmp_path: Path) -> None:
    requests = StopRequests(tmp_path, 1e-6)
    time.sleep(0.01)
    assert requests.reason() == "train.time_limit_minutes"
    requests.close()
    requests = StopRequests(tmp_path, 60)  # since this process started
    assert requests.reason() == ""
    requests.close()


def shares(loss: float, *positives: float) -> list:
    return [(torch.tensor(loss), SimpleNamespace(positive=torch.tensor(positives)))]


BATCHES = [SimpleNamespace(subset="birds", keys=["a", "b"]), SimpleNamespace(subset="birds", keys=["c"])]


def check(finite: FiniteSteps, squared_norm: float, results: list, step: int) -> bool:
    (norm, *_), is_finite = read_norms(torch.tensor([squared_norm, 1.0]), results)
    assert norm == squared_norm or not math.isfinite(squared_norm)
    return finite.check(is_finite, results, BATCHES, step)


def test_steps_that_are_not_finite_are_counted_and_named(groups, caplog) -> None:
    finite = FiniteSteps(2, groups)
    assert check(finite, 1.0, shares(0.5, 0.1, 0.2, 0.3), 0)
    assert not check(finite, 1.0, shares(math.nan, 0.1, 0.2, math.nan), 1)
    assert "step 2 is skipped" in caplog.text and "the embeddings of birds/c are not finite" in caplog.text
    assert not check(finite, math.inf, shares(0.5, 0.1, 0.2, 0.3), 2)
    assert "no pair stands out" in caplog.text
    assert check(finite, 1.0, shares(0.5, 0.1, 0.2, 0.3), 3)
    assert not check(finite, math.nan, [], 4) and not check(finite, math.nan, [], 5)
    with pytest.raises(DivergedError, match="3 steps in a row .* train.max_bad_steps=2; in step 7 .* birds/a, birds/b"):
        check(finite, math.nan, shares(math.nan, math.nan, math.nan, 0.1), 6)
    assert finite.num_bad == 5


HANGS = """
import time
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.training.fault_tolerance import Watchdog
cpu_emulation.enable()
process_groups.initialize_distributed(300)
watchdog = Watchdog(2)
watchdog.progress("looking for its glasses")
def wait_for_ever(): time.sleep(100)
wait_for_ever()
"""


def test_process_that_hangs_ends_with_its_stack() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=250)
    assert done.returncode == EXIT_HUNG
    assert "no progress for 2 s: rank 0" in done.stderr and "last heard of: looking for its glasses" in done.stderr
    assert "wait_for_ever" in done.stderr
    assert time.monotonic() - started < 200  # that of gloo is longer


NAMED = {
    "stops": r"for 6 s: rank 1 \(process \d+ on .*\) does not answer: stopped or lost; last heard of: in step [45]",
    "sleeps": r"for 6 s: rank 1 .* is the furthest behind; its stack follows; last heard of: in step 5",
    "dies": r"Root Cause \(first observed failure\):(\n.*){3}\n  rank      : 1 [^=]*Signal 9 \(SIGKILL\)",
}


@pytest.mark.parametrize("how", NAMED)
def test_rank_that_is_lost_ends_all_and_is_named(how: str) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_torchrun(2, HERE / "distributed" / "check_watchdog.py", how, timeout=250)
    assert "exit code 1" in str(caught.value), "it should have ended by itself"
    assert re.search(NAMED[how], str(caught.value)), str(caught.value)
    assert how != "sleeps" or "fall_asleep" in str(caught.value)
    assert "lost another rank" not in str(caught.value)
    assert time.monotonic() - started < 200  # that of gloo is longer

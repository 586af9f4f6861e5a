"""How a process ends with an error: one line, the status, and what torchrun is told (errors.exit_with_one_line)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_llave import errors
from megatron_llave.errors import ConfigError, exit_with_one_line


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> list[Path]:
    """The files through which two ranks tell torchrun of their errors; those of this process are rank 0's."""
    made = [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(2)]
    for file in made:
        file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(made[0]))
    monkeypatch.setattr(errors, "SECONDS_FOR_FIRST_RANK", 0)
    return made


def raised(error: BaseException) -> int | str | None:
    with pytest.raises(SystemExit) as caught, exit_with_one_line():
        raise error
    return caught.value.code


def test_torchruns_report_has_our_line_and_the_right_rank(files: list[Path], capsys) -> None:
    assert raised(ConfigError("loss.alpha=-1 must be at least 0")) == 2
    assert capsys.readouterr().err == "error: loss.alpha=-1 must be at least 0\n"
    time.sleep(1.1)  # torchrun compares whole seconds
    ended = {rank: ProcessFailure(rank, 4000 + rank, code, str(files[rank])) for rank, code in ((1, -15), (0, 2))}
    report = str(ChildFailedError("train", ended))
    cause = report[report.index("Root Cause") :]
    assert "rank      : 0 " in cause and "exitcode  : 2 " in cause
    assert "error: loss.alpha=-1 must be at least 0" in cause


def test_ranks_with_the_same_error_say_it_once(files: list[Path], capsys, monkeypatch) -> None:
    held = signal.getsignal(signal.SIGTERM)
    for rank in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(files[rank]))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert raised(ConfigError("one")) == 2
    assert raised(ConfigError("two")) == 2
    signal.signal(signal.SIGTERM, held)
    assert capsys.readouterr().err == "error: one\nerror: two\n"


@pytest.mark.parametrize("is_worth_a_restart", [False, True])
def test_torchrun_does_not_restart_what_a_restart_cannot_mend(monkeypatch, is_worth_a_restart: bool) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(errors.os, "kill", lambda *given: signals.append(given))
    error = ConfigError("wrong")
    error.is_worth_a_restart = is_worth_a_restart
    assert raised(error) == 2
    assert signals == ([] if is_worth_a_restart else [(os.getppid(), signal.SIGTERM)])


def test_crash_keeps_its_traceback_and_is_named(files: list[Path], capsys) -> None:
    with pytest.raises(TypeError), exit_with_one_line():
        raise TypeError("no such\nthing")
    assert capsys.readouterr().err == ""
    message = json.loads(files[0].read_text())["message"]
    assert message["message"] == "TypeError: no such thing (its traceback is above)"


def test_file_that_the_system_refuses_is_one_line(files: list[Path], capsys) -> None:
    assert raised(PermissionError(13, "Permission denied", "closed/a.yaml")) == 2
    assert capsys.readouterr().err == "error: closed/a.yaml cannot be used: Permission denied\n"
    assert json.loads(files[0].read_text())["message"]["message"].endswith("cannot be used: Permission denied")


def test_too_little_memory_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit), exit_with_one_line():
        torch.empty(10**15)
    assert capsys.readouterr().err.startswith("error: the memory of this machine is too small (can't allocate memory: ")


def test_reader_of_the_output_may_end_first() -> None:
    loop = "with exit_with_one_line():\n for i in range(10**6): print(i)"
    code = f"from megatron_llave.errors import exit_with_one_line\n{loop}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(100) == 141


def test_ctrl_c_before_the_first_step_is_one_line(capsys) -> None:
    assert raised(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted by Ctrl-C\n"


def test_rank_that_lost_another_one_tells_torchrun_nothing(files: list[Path], capsys, monkeypatch) -> None:
    monkeypatch.setattr(errors.os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    assert raised(RuntimeError("Connection closed by peer [127.0.0.1]:1234")) == 1
    assert "error: rank 0 lost another rank, which says why itself (Connection closed" in capsys.readouterr().err
    assert not files[0].exists()

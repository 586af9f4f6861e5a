"""Locks on folders: who is named, whose lock is taken over, and what is left."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_llave import locks
from megatron_llave.errors import DataError
from megatron_llave.locks import WRITER_FILE, is_locked, lock_folder

HOLDER = """
import os, sys, time
from megatron_llave.locks import lock_folder
with lock_folder(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(float(sys.argv[3])), os._exit(0)
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def held(tmp_path: Path):
    """Start a process that holds a folder; yields a function that returns it and the folder."""
    started: list[subprocess.Popen] = []

    def hold(how: str = "alone", seconds: float = 0) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), how, str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "SLURM_JOB_ID": "77"}))
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1], tmp_path / "run"

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_second_writer_is_refused_with_the_name_of_the_first(held, caplog) -> None:
    process, folder = held()
    assert is_locked(folder)
    for _ in range(10):
        with pytest.raises(DataError) as caught, lock_folder(folder):
            pass
    named = rf"process {process.pid} on {socket.gethostname()}, job 77, started "
    assert f"another process is writing into {folder}: {named}" in str(caught.value)
    process.kill()
    process.wait()
    assert not is_locked(folder)
    with lock_folder(folder):
        assert is_locked(folder)
    assert not list(folder.iterdir())
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"folder {folder}: taking over from process {process.pid}") and line.endswith("is gone")


def test_forks_of_a_killed_process_are_waited_for(held, caplog) -> None:
    process, folder = held("fork", 1.5)
    process.kill()
    process.wait()
    started = time.monotonic()
    with lock_folder(folder):
        assert time.monotonic() - started > 0.5
    assert "waiting for the end of process" in caplog.text and "taking over" in caplog.text


def elsewhere(folder: Path, age: float, **given) -> Path:
    """The file of a writer on another machine, touched `age` seconds ago."""
    folder.mkdir()
    file = folder / WRITER_FILE
    record = {"host": "node7", "pid": 4242, "boot": "another", "job": "", "start": "0", "since": "today"}
    file.write_text(json.dumps({**record, **given}))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_writer_on_another_machine_lives_as_long_as_it_touches_its_file(tmp_path: Path, caplog, monkeypatch) -> None:
    elsewhere(tmp_path / "old", 61)
    with lock_folder(tmp_path / "old"):
        assert "taking over from process 4242 on node7, started today, which is gone" in caplog.text
    file = elsewhere(tmp_path / "run", 20)
    touching = threading.Timer(0.8, os.utime, [file])
    touching.start()
    with pytest.raises(DataError, match="process 4242 on node7"), lock_folder(tmp_path / "run"):
        pass
    assert json.loads(file.read_text())["pid"] == 4242, "it keeps its lock"
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.0)
    monotonic = time.monotonic  # a clock of this machine that runs ahead of the file server's changes nothing
    monkeypatch.setattr(locks.time, "monotonic", lambda: 2 * monotonic())
    os.utime(file)
    with lock_folder(tmp_path / "run"):
        pass
    assert "waiting for the end of process 4242" in caplog.text


def test_requeued_job_waits_for_its_earlier_start(tmp_path: Path, monkeypatch, caplog) -> None:
    file = elsewhere(tmp_path / "run", 0, job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    touching = [threading.Timer(0.3, os.utime, [file]), threading.Timer(1.2, file.unlink)]
    for timer in touching:
        timer.start()
    with lock_folder(tmp_path / "run"):
        assert not any(timer.is_alive() for timer in touching)
    assert "waiting for the end of process 4242 on node7, job 77" in caplog.text


def test_file_system_without_locks(tmp_path: Path, monkeypatch) -> None:
    """The process table tells on one machine, the touches on others."""

    def fail(*given: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with lock_folder(tmp_path / "run"):
        with pytest.raises(DataError, match=f"process {os.getpid()} on"), lock_folder(tmp_path / "run"):
            pass
        record = json.loads((tmp_path / "run" / WRITER_FILE).read_text())
    assert not (tmp_path / "run").exists(), "it was made for nothing"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / WRITER_FILE).write_text(json.dumps(record | {"born": 0}))  # another process has its number
    with lock_folder(tmp_path / "run"):
        pass
    # A container on this machine has process numbers of its own, which the process table here does not show.
    (tmp_path / "run" / WRITER_FILE).write_text(json.dumps(record | {"born": 0, "space": "another"}))
    assert is_locked(tmp_path / "run")
    os.utime(tmp_path / "run" / WRITER_FILE, (time.time() - locks.STALE_SECONDS - 1,) * 2)
    assert not is_locked(tmp_path / "run")


@pytest.mark.skipif(os.getuid() > 0, reason="only root can become another user")
def test_who_may_not_write_sees_the_lock(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    with lock_folder(tmp_path / "run"):
        os.seteuid(65534)
        try:
            assert is_locked(tmp_path / "run")
        finally:
            os.seteuid(0)


def test_removed_folder_is_locked_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    folder = tmp_path / "run"
    with lock_folder(folder):
        (folder / WRITER_FILE).unlink()
        folder.rmdir()
        folder.mkdir()
        deadline = time.monotonic() + 20
        while not is_locked(folder):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_process_that_was_taken_over_ends(tmp_path: Path, held, monkeypatch) -> None:
    process, folder = held()
    file = folder / WRITER_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"token": "other", "pid": 1, "host": "node8"}))
    assert process.wait(60) == locks.EXIT_TAKEN_OVER

"""Starts scripts as forks of one process that has loaded the package; a new Python needs three to six seconds for that.

A fork behaves like a process that a user starts: it has the name and arguments of the script, the environment and the
working directory of the test, and its output goes to files. A test of something that only a new Python shows, such as
imports, must start one, with `run_command` in run_ranks.py or with subprocess.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
SERVERS: set[int] = set()
"""Process ids of the fork servers that this process has started here."""


def fork(
    command: list[str], outputs: tuple[str, str], env: dict[str, str], largest_file: int | None = None
) -> BaseProcess:
    """Start a script in a fork.

    Args:
        command: the script and its arguments.
        outputs: the files to which stdout and stderr are appended.
        env: environment variables in addition to those of the test.
        largest_file: maximum size in bytes of each file that the script writes, which simulates a full disk.
    """
    _start_server()
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), **env}
    process = FORKS.Process(target=_become, args=(command, outputs, full_env, os.getcwd(), largest_file))
    process.start()
    return process


def run_script(
    script: str | Path, *args: str | Path, timeout: float = 200, largest_file: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `script args` in a fork and wait for it, like subprocess.run; no file may grow beyond `largest_file` bytes.

    Raises:
        subprocess.TimeoutExpired: the script did not end within `timeout` seconds and was killed.
    """
    command = [str(script), *map(str, args)]
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = fork(command, (out.name, err.name), {}, largest_file)
        try:
            if not connection.wait([process.sentinel], timeout):
                raise subprocess.TimeoutExpired(command, timeout, out.read(), err.read())
        finally:
            end([process])
        return subprocess.CompletedProcess(command, process.exitcode, out.read(), err.read())


def end(processes: Iterable[BaseProcess]) -> None:
    """Kill the processes that are still running, and wait until all have ended."""
    started = list(processes)
    kill_trees(process.pid for process in started if process.is_alive())
    for process in started:
        process.join()


def kill_trees(processes: Iterable[int]) -> None:
    """Kill processes and all their descendants, whatever process group or session these are in."""
    for process in processes:
        try:
            root = psutil.Process(process)
            for member in [*root.children(recursive=True), root]:
                member.kill()
        except psutil.NoSuchProcess:
            continue  # the process has ended by itself in the meantime


def search_path() -> str:
    """The value of PYTHONPATH that includes the package and the helpers of the tests."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([inherited] if inherited else [])])


def _start_server() -> None:
    """Start the fork server, unless it is running, with a PYTHONPATH on which it finds the modules to preload.

    One that the package has started in this process, for its own workers, has loaded less and is replaced.
    """
    if forkserver._forkserver._forkserver_pid not in SERVERS:
        forkserver._forkserver._stop()
        FORKS.set_forkserver_preload(["preloaded"])
    held = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=search_path(), OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
        SERVERS.add(forkserver._forkserver._forkserver_pid)
    finally:
        for name, value in held.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _become(
    command: list[str], outputs: tuple[str, str], env: dict[str, str], folder: str, largest_file: int | None
) -> None:
    """Make this fork like a process that a user or torchrun starts, and run the script in it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    # A fork inherits the start method of the fork server; restore the default.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent)]
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    runpy.run_path(command[0], run_name="__main__")

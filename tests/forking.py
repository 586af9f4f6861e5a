"""Starts scripts as forks of one process that has loaded the package, which takes each new Python three to six seconds.

A fork behaves as a process that a user starts: it has the script's name and arguments, the environment and the working
directory of the test, and files for what it prints. What a new Python alone shows, imports above all, needs a real one:
`run_command` in run_ranks.py, or subprocess.
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
FORKS.set_forkserver_preload(["preloaded"])


def fork(
    command: list[str], outputs: tuple[str, str], env: dict[str, str], largest_file: int | None = None
) -> BaseProcess:
    """Start `command`, a script with its arguments.

    Args:
        command: the script and its arguments.
        outputs: the files that get what it prints and what it says on stderr.
        env: variables it has beside those of the test.
        largest_file: bytes beyond which no file that it writes may grow, as if the disk were full.
    """
    _start_server()
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), **env}
    process = FORKS.Process(target=_become, args=(command, outputs, own, os.getcwd(), largest_file))
    process.start()
    return process


def run_script(
    script: str | Path, *args: str | Path, timeout: float = 200, largest_file: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `script args` alone, as subprocess.run does with a Python; no file may grow beyond `largest_file` bytes.

    Raises:
        subprocess.TimeoutExpired: it has not ended after `timeout` seconds, and is killed.
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
    """Kill what is still running, and reap all."""
    started = list(processes)
    kill_trees(process.pid for process in started if process.is_alive())
    for process in started:
        process.join()


def kill_trees(processes: Iterable[int]) -> None:
    """Kill processes, and all that they have started, whatever process group or session it is in."""
    for process in processes:
        try:
            root = psutil.Process(process)
            for one in [*root.children(recursive=True), root]:
                one.kill()
        except psutil.NoSuchProcess:
            continue  # it ended by itself meanwhile


def search_path() -> str:
    """PYTHONPATH with the package and the helpers of the tests."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([inherited] if inherited else [])])


def _start_server() -> None:
    """Start the fork server, unless it runs, where it finds what it is to load."""
    held = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=search_path(), OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in held.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _become(
    command: list[str], outputs: tuple[str, str], env: dict[str, str], folder: str, largest_file: int | None
) -> None:
    """In a fork: be what a user or torchrun would have started."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    # The fork server has left its own way of starting processes to its forks.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent)]
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    runpy.run_path(command[0], run_name="__main__")

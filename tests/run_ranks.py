"""Runs a script on several ranks, for the tests of the parallel code.

A failure on any rank fails the test with that rank's traceback; a hang fails it after `timeout` and leaves no process.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
TAIL_CHARACTERS = 12000
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megatron_llave.train", "megatron_llave.evaluation.evaluate"])


def run_ranks(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Run `script args` on `world` ranks, in the environment that torchrun gives, and return what all of them printed.

    The ranks are forks of one process that has loaded the package: four that load it themselves take 14 seconds on two
    cores. `run_torchrun` has torchrun start them.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed; the message holds the end of the output.
    """
    # As torchrun does: one store, on a free port, that the ranks only join.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    with tempfile.NamedTemporaryFile() as output:
        ranks = [
            FORKS.Process(target=_be_rank, args=(rank, env, output.name, [str(script), *args])) for rank in range(world)
        ]
        try:
            for rank in ranks:
                rank.start()
            status = _wait(ranks, timeout)
        finally:
            _kill_trees(rank.pid for rank in ranks if rank.pid is not None and rank.is_alive())
            for rank in ranks:
                if rank.pid is not None:  # else it could not even be started
                    rank.join()
        text = output.read().decode(errors="replace")
    assert not status, f"{script} {' '.join(args)}: {status}\n{text[-TAIL_CHARACTERS:]}"
    return text


def _wait(ranks: list[BaseProcess], timeout: float) -> str:
    """Until all have ended or one has failed; what is wrong, or ""."""
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.exitcode is None]:
        if not connection.wait([rank.sentinel for rank in running], deadline - time.monotonic()):
            return f"no end after {timeout} s"
        failed = [f"rank {number}: exit code {rank.exitcode}" for number, rank in enumerate(ranks) if rank.exitcode]
        if failed:
            time.sleep(0.1)  # others fail for the same reason, and say so
            return failed[0]
    return ""


def _be_rank(rank: int, env: dict[str, str], output: str, command: list[str]) -> None:
    """In a fork: become what torchrun would have started."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", PYTHONPATH=_search_path())
    # Imported here, in the fork, for what has threads cannot be forked.
    import torch

    torch.set_num_threads(1)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent)]
    runpy.run_path(command[0], run_name="__main__")


def run_torchrun(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Like `run_ranks`, through torchrun."""
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node", str(world)]
    return run_command([*launcher, str(script), *args], timeout=timeout)


def _search_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([inherited] if inherited else [])])


def run_command(command: list[str], timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Run a command that starts ranks itself; like `run_torchrun`, with `env` added to the environment."""
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path(), **(env or {})}
    # A file, not a pipe: an orphaned child would hold a pipe open, and reading it would never end.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=full_env, start_new_session=True)
        try:
            status = f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            status = f"no end after {timeout} s"
        finally:
            # Also on Ctrl-C and on pytest's own time limit.
            if process.poll() is None:
                _kill_trees([process.pid])
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    assert status == "exit code 0", f"{' '.join(command)}: {status}\n{text[-TAIL_CHARACTERS:]}"
    return text


def _kill_trees(processes: Iterable[int]) -> None:
    """Kill processes, and all that they have started, whatever process group or session it is in."""
    for process in processes:
        try:
            root = psutil.Process(process)
            for one in [*root.children(recursive=True), root]:
                one.kill()
        except psutil.NoSuchProcess:
            continue  # it ended by itself meanwhile

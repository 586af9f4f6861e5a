"""Runs a script on several ranks, for the tests of the parallel code.

A failure on any rank fails the test with that rank's traceback; a hang fails it after `timeout` and leaves no process.
"""

import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from forking import end, fork, kill_trees, search_path
from torch.distributed import TCPStore

TAIL_CHARACTERS = 12000
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def run_ranks(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Run `script args` on `world` ranks, in the environment that torchrun gives, and return what all of them printed.

    The ranks are forks of one process that has loaded the package. `run_torchrun` has torchrun start them.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed; the message holds the end of the output.
    """
    # As torchrun does: one store, on a free port, that the ranks only join.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    command = [str(script), *map(str, args)]
    ranks: list[BaseProcess] = []
    with tempfile.NamedTemporaryFile() as output:
        try:
            for rank in map(str, range(world)):
                ranks.append(fork(command, (output.name, output.name), {**env, "RANK": rank, "LOCAL_RANK": rank}))
            status = _wait(ranks, timeout)
        finally:
            end(ranks)
        text = output.read().decode(errors="replace")
    assert not status, f"{' '.join(command)}: {status}\n{text[-TAIL_CHARACTERS:]}"
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


def run_torchrun(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Like `run_ranks`, through torchrun."""
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node", str(world)]
    return run_command([*launcher, str(script), *args], timeout=timeout)


def run_command(command: list[str], timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Run a command that starts ranks itself; like `run_torchrun`, with `env` added to the environment."""
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), **(env or {})}
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
                kill_trees([process.pid])
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    assert status == "exit code 0", f"{' '.join(command)}: {status}\n{text[-TAIL_CHARACTERS:]}"
    return text

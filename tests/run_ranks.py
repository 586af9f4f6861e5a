"""Runs a script on several ranks, for the tests of the parallel code.

If a rank fails, the test fails with the traceback of that rank. If the ranks hang, the test fails after `timeout`
seconds, and all processes are killed.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from forking import end, fork, kill_trees, search_path
from torch.distributed import TCPStore

TAIL_CHARACTERS = 12000
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def run_ranks(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Run `script args` on `world` ranks with the environment of torchrun, and return the output of all ranks.

    The ranks are forks of one process that has loaded the package. `run_torchrun` starts them with torchrun instead.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed; the message contains the end of the output.
    """
    command = [str(script), *map(str, args)]
    with tempfile.NamedTemporaryFile() as output:
        with started_ranks(world, command, output.name) as ranks:
            status = _wait(ranks, timeout)
        text = output.read().decode(errors="replace")
    assert not status, f"{' '.join(command)}: {status}\n{text[-TAIL_CHARACTERS:]}"
    return text


@contextmanager
def started_ranks(world: int, command: list[str], output: str) -> Iterator[list[BaseProcess]]:
    """The ranks of `run_ranks`, which run while the block does; they append what they print to the file `output`."""
    # Like torchrun, make one store on a free port, which the ranks only join.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    ranks: list[BaseProcess] = []
    try:
        for rank in map(str, range(world)):
            ranks.append(fork(command, (output, output), {**env, "RANK": rank, "LOCAL_RANK": rank}))
        yield ranks
    finally:
        end(ranks)


def _wait(ranks: list[BaseProcess], timeout: float) -> str:
    """Wait until all ranks have ended or one has failed; returns a description of the failure, or ""."""
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.exitcode is None]:
        if not connection.wait([rank.sentinel for rank in running], deadline - time.monotonic()):
            return f"no end after {timeout} s"
        failed = [f"rank {number}: exit code {rank.exitcode}" for number, rank in enumerate(ranks) if rank.exitcode]
        if failed:
            time.sleep(0.1)  # others fail for the same reason, and need time to print it
            return failed[0]
    return ""


def run_torchrun(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Run `script args` like `run_ranks`, but start the ranks with torchrun."""
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node", str(world)]
    return run_command([*launcher, str(script), *args], timeout=timeout)


def run_command(command: list[str], timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Run a command that starts ranks itself, with `env` added to the environment; otherwise like `run_torchrun`."""
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(), **(env or {})}
    # Use a file, because an orphaned child would hold a pipe open, and reading from it would never end.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=full_env, start_new_session=True)
        try:
            status = f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            status = f"no end after {timeout} s"
        finally:
            # This also runs on Ctrl-C and when pytest's time limit is reached.
            if process.poll() is None:
                kill_trees([process.pid])
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    assert status == "exit code 0", f"{' '.join(command)}: {status}\n{text[-TAIL_CHARACTERS:]}"
    return text

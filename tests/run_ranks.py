"""Runs a script on several ranks through torchrun, for the tests of the parallel code.

A failure on any rank fails the test with that rank's traceback; a hang fails it after `timeout` and leaves no process.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TAIL_CHARACTERS = 12000
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def run_ranks(world: int, script: str | Path, *args: str, timeout: float = 300) -> str:
    """Run `script args` on `world` ranks and return what all of them printed.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed; the message holds the end of the output.
    """
    launcher = [sys.executable, *TORCHRUN, "--nproc-per-node", str(world)]
    return run_command([*launcher, str(script), *args], timeout=timeout)


def run_command(command: list[str], timeout: float = 300, env: dict[str, str] | None = None) -> str:
    """Run a command that starts ranks itself; like `run_ranks`, with `env` added to the environment."""
    inherited = os.environ.get("PYTHONPATH")
    search_path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([inherited] if inherited else [])])
    full_env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path, **(env or {})}
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
                _kill_tree(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    assert status == "exit code 0", f"{' '.join(command)}: {status}\n{text[-TAIL_CHARACTERS:]}"
    return text


def _kill_tree(process: subprocess.Popen) -> None:
    """Kill the process group of the launcher and those of its descendants: torchrun gives each rank one of its own."""
    groups = {process.pid}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            groups.add(os.getpgid(child.pid))
        except ProcessLookupError:
            continue  # it ended by itself meanwhile
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()

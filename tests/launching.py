"""Starts launch files as users and clusters do, for their tests."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
BATCH_FILE = EXAMPLES / "slurm" / "train.sbatch"
LIMIT = 200
"""Seconds; nothing here takes a tenth of it on a machine with nothing else to do."""

# Stands in for the package: writes what each rank was given, and starts a child which imports the launch file again.
STUB = """
import json
import multiprocessing
import os
from pathlib import Path

def main(argv):
    child = multiprocessing.get_context("spawn").Process(target=print, args=("child",))
    child.start()
    child.join()
    names = ("WORLD_SIZE", "OMP_NUM_THREADS")
    report = {"argv": argv, "child": child.exitcode, **{n: os.environ[n] for n in names}}
    Path(__file__).with_name(f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(**env: str) -> dict[str, str]:
    """As a user's, with the interpreter of these tests first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # PET_MASTER_PORT is torchrun's own --master-port: two test runs on one machine must not meet at its default.
    return {"PATH": path, "PROCS": "2", "PET_MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **env}


@contextmanager
def started(command: list[str], output: Path, **env: str) -> Iterator[subprocess.Popen]:
    """A command beside the test, what it prints in `output`; it and all that it has started are gone afterwards."""
    with output.open("wb") as file:
        full_env = {**os.environ, **environment(**env)}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=full_env, start_new_session=True)
    watched = psutil.Process(process.pid)
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in [*watched.children(recursive=True), watched]:
                one.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-5000:]
        time.sleep(0.01)


def losses(run: Path) -> dict[int, float]:
    """The last record of each step counts, as a resumed run repeats some."""
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {record["step"]: record["loss"] for record in records}


def state(run: Path) -> dict:
    return json.loads((run / "state.json").read_text())


def stub_clone(folder: Path) -> Path:
    """Make a clone that holds the launch files, and a package which only notes how it was called."""
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "megatron_llave").mkdir()
    (folder / "megatron_llave" / "__init__.py").touch()
    (folder / "megatron_llave" / "train.py").write_text(STUB)
    return folder


def code_blocks(page: str) -> list[str]:
    """Of a page in docs/, continued lines joined."""
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

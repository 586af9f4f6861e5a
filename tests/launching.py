"""Starts the launch files in examples/ like users and clusters do, for their tests."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
BATCH_FILE = EXAMPLES / "slurm" / "train.sbatch"
LIMIT = 200
"""Time limit in seconds; on an idle machine, everything takes less than a tenth of it."""

# Replaces the package. It writes what each rank was given, and starts a child process that imports the launch file.
STUB = """
import json
import multiprocessing
import os
import random
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
    """A free port of those that the kernel gives to nobody by itself, such as to the connections of another test."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")


def environment(**env: str) -> dict[str, str]:
    """Environment variables like those of a user, with the interpreter of these tests first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # PET_MASTER_PORT sets torchrun's --master-port; two test runs on one machine must not use the same default port.
    return {"PATH": path, "PROCS": "2", "PET_MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **env}


@contextmanager
def started(command: list[str], output: Path, **env: str) -> Iterator[subprocess.Popen]:
    """Run a command while the block runs, with its output in a file; afterwards kill it and all its descendants."""
    with output.open("wb") as file:
        full_env = {**os.environ, **environment(**env)}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=full_env, start_new_session=True)
    watched = psutil.Process(process.pid)
    try:
        yield process
    finally:
        if process.poll() is None:
            for member in [*watched.children(recursive=True), watched]:
                member.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-5000:]
        time.sleep(0.01)


def losses(run: Path) -> dict[int, float]:
    """The loss of each step in log.jsonl. If a resumed run repeated a step, its last record counts."""
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {record["step"]: record["loss"] for record in records}


def state(run: Path) -> dict:
    return json.loads((run / "state.json").read_text())


def stub_clone(folder: Path) -> Path:
    """Make a clone with the launch files and with a package that only records how it was called."""
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "megatron_llave" / "launch", folder / "megatron_llave" / "launch")
    (folder / "megatron_llave" / "__init__.py").touch()
    (folder / "megatron_llave" / "train.py").write_text(STUB)
    return folder


def code_blocks(page: str) -> list[str]:
    """The code blocks of a page in docs/, with continued lines joined."""
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def data_with_few_sets(openmoji_data: Path, folder: Path, *names: str) -> Path:
    """The demo's data with only some of its evaluation sets, which a run is evaluated on in a fraction of the time."""
    shutil.copytree(openmoji_data, folder, copy_function=os.symlink)
    file = folder / "eval" / "sets.json"
    content = json.loads(file.read_text())
    content["sets"] = [one for one in content["sets"] if one["name"] in names]
    file.unlink()
    file.write_text(json.dumps(content))
    return folder


def wait_for_step(run: Path, step: int, is_running: Callable[[], bool]) -> None:
    """Wait until the run has logged this step."""
    deadline = time.monotonic() + 200
    while not (run / "log.jsonl").is_file() or step not in losses(run):
        assert is_running() and time.monotonic() < deadline, "it has not come to the step"
        time.sleep(0.002)

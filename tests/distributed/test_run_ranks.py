"""The helper that all multi-process tests stand on must itself notice failures and hangs."""

import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from run_ranks import run_command, run_ranks

ALL_REDUCE = """
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} sum {total.item()} args {sys.argv[1:]}", flush=True)
dist.destroy_process_group()
"""

RAISES_ON_RANK_1 = """
import os
import time

def inner():
    raise RuntimeError("the second rank is broken")

if os.environ["RANK"] == "1":
    inner()
time.sleep(600)
"""

# Ranks that ignore the polite signal, each with a child of its own in yet another session.
HANGS = """
import os
import signal
import subprocess
import sys
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]]
subprocess.Popen(child, start_new_session=True)
print("rank process", os.getpid(), flush=True)
time.sleep(600)
"""


def write(folder: Path, source: str) -> Path:
    script = folder / "script.py"
    script.write_text(source)
    return script


def processes_named(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and any(mark in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


def test_success_returns_the_output_of_every_rank(tmp_path: Path) -> None:
    output = run_ranks(2, write(tmp_path, ALL_REDUCE), "first", "second")
    for rank in (0, 1):
        assert f"rank {rank} of 2 sum 3.0 args ['first', 'second']" in output


def test_error_on_one_rank_fails_with_its_traceback(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, write(tmp_path, RAISES_ON_RANK_1), timeout=120)
    message = str(failure.value)
    assert re.search(r"Traceback .*line \d+, in inner\b.*RuntimeError: the second rank is broken", message, re.DOTALL)
    assert "rank 1: exit code 1" in message
    assert time.monotonic() - start < 100, "the surviving rank was waited for"


def test_hang_fails_in_time_and_leaves_no_process(tmp_path: Path) -> None:
    mark = f"hang-{uuid.uuid4().hex}"
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_ranks, 2, write(tmp_path, HANGS), mark, timeout=5)
        most = 0
        while not run.done():
            most = max(most, len(processes_named(mark)))
            time.sleep(0.2)
    with pytest.raises(AssertionError, match=r"no end after 5 s\nrank process \d+\nrank process \d+"):
        run.result()
    assert time.monotonic() - start < 30
    assert most == 2, "the children of the ranks were not seen, so their absence proves nothing"
    assert not any(map(psutil.pid_exists, map(int, re.findall(r"rank process (\d+)", str(run.exception())))))
    time.sleep(0.5)
    assert processes_named(mark) == []


def test_exit_code_of_a_plain_command_is_read() -> None:
    assert run_command(["bash", "-c", "echo $GREETING"], env={"GREETING": "hello"}) == "hello\n"
    with pytest.raises(AssertionError, match="exit code 3"):
        run_command(["bash", "-c", "echo before; exit 3"])

"""Forks are what a user would start: arguments, environment, folder, outputs, status; the package is loaded in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forking import run_script

TELLS = """
import multiprocessing, os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ["GREETING"], os.environ["OMP_NUM_THREADS"], sys.path[0])
print(multiprocessing.get_context().get_start_method(), sys.stdin.read() == "", file=sys.stderr)
print(*(name in sys.modules for name in ("preloaded", "megatron_llave.train", "torch._dynamo", "pytest")))
sys.exit(int(sys.argv[1]))
"""


def write(folder: Path, source: str) -> Path:
    (folder / "script.py").write_text(source)
    return folder / "script.py"


def test_a_fork_is_what_a_user_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREETING", "hello")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script = write(tmp_path, TELLS)
    done = run_script(script, "3", tmp_path)
    fresh = subprocess.run([sys.executable, "-c", "import multiprocessing as m; print(m.get_start_method())"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    told = f"__main__ ['3', '{tmp_path}'] {tmp_path / 'here'} hello 1 {tmp_path}"
    assert done.stdout.splitlines()[0] == told and done.returncode == 3
    assert done.stderr == f"{fresh.stdout.strip()} True\n"


def test_what_takes_long_to_load_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREETING", "hello")
    done = run_script(write(tmp_path, TELLS), "0")
    assert done.stdout.splitlines()[1] == "True True True False" and done.returncode == 0


def test_errors_are_those_of_python(tmp_path: Path) -> None:
    done = run_script(write(tmp_path, "raise ValueError('wrong')"))
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: wrong" in done.stderr
    done = run_script(write(tmp_path, "import sys; sys.exit('in words')"))
    assert (done.returncode, done.stderr) == (1, "in words\n")
    done = run_script(write(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert done.returncode == -9


def test_a_full_disk_can_be_played(tmp_path: Path) -> None:
    done = run_script(write(tmp_path, "with open('file', 'wb') as file: file.write(bytes(2000))"), largest_file=1000)
    assert done.returncode == 1 and "File too large" in done.stderr and os.path.getsize("file") == 1000


def test_a_hanging_script_is_killed(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(write(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)"), timeout=1)

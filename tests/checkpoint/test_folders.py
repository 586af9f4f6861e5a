"""What is taken for a checkpoint and what is not; saving and loading run under tests/distributed and test_train.py."""

import json
from pathlib import Path

import pytest

from megatron_llave.checkpoint.folders import find
from megatron_llave.errors import CheckpointError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder whose current checkpoint has what `find` looks for."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("model: {preset: tiny}")
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (checkpoint / "metadata.json").write_text(json.dumps(metadata))
    (checkpoint.parent / "latest").write_text("step-0000003\n")
    return tmp_path / "run"


def test_run_checkpoints_folder_and_checkpoint_mean_the_same(run: Path) -> None:
    expected = run / "checkpoints" / "step-0000003"
    assert [find(run), find(run / "checkpoints"), find(expected)] == [expected] * 3


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "latest").unlink(), "checkpoints/latest"),
        (lambda folder: (folder / "latest").write_bytes(b"\xff\xfe"), "is neither a checkpoint"),
        (lambda folder: (folder / "latest").write_text("step-0000009"), "step-0000009 is neither"),
        (lambda folder: (folder / "step-0000003" / "metadata.json").unlink(), "metadata.json"),
        (lambda folder: (folder / "step-0000003" / "metadata.json").write_text("{"), "metadata.json is damaged"),
        (lambda folder: (folder / "step-0000003" / "config.yaml").unlink(), "config.yaml"),
    ],
)
def test_damaged_checkpoint_is_named(run: Path, damage, named: str) -> None:
    damage(run / "checkpoints")
    with pytest.raises(CheckpointError, match=named) as error:
        find(run)
    assert "\n" not in str(error.value)

"""mteb with the golden model: its mock tasks have the same scores at every layout, and its errors end all ranks."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from golden_model import ONEVISION, byte_tokenizer
from run_ranks import TORCHRUN, run_command, run_ranks

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parent / "check_mteb.py"
NUM_MOCK_TASKS = 43
"""Tasks of mteb's offline check that take texts, images, or both."""
NO_SCORE = {"MockVisualSTS"}
"""Its judgements are constant, so that their correlation with anything is NaN."""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="mteb needs Python 3.11")
def test_all_mock_tasks_and_what_else_needs_mteb(tmp_path: Path) -> None:
    output = run_ranks(1, SCRIPT, "checks", str(tmp_path / "out"), "1,1", str(byte_tokenizer(tmp_path)))
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["scores"]) == NUM_MOCK_TASKS
    assert {name for name, score in found["scores"].items() if score != score} == NO_SCORE
    assert "2 of 3 tasks were finished before; 0 of " in output


@pytest.mark.slow
def test_the_scores_are_the_same_at_every_layout(tmp_path: Path) -> None:
    """Exactly over data-parallel ranks; within 1e-6 over others, which round embeddings differently."""
    found = {}
    for world, layout in ((1, "1,1"), (2, "1,1"), (2, "2,1")):
        out = tmp_path / f"{world} {layout}"
        run_ranks(world, SCRIPT, "mock", str(out), layout, str(byte_tokenizer(tmp_path)))
        found[world, layout] = json.loads(Path(f"{out}.json").read_text())
    alone = found.pop((1, "1,1"))
    for key, other in found.items():
        tolerance = 0.0 if key == (2, "1,1") else 1e-6
        assert other["scores"] == pytest.approx(alone["scores"], abs=tolerance, rel=0, nan_ok=True), key
        assert (other["inputs"], other["embedded"]) == (alone["inputs"], alone["embedded"])


@pytest.mark.slow
def test_the_ranks_wait_for_the_first_one_and_hear_of_its_errors(tmp_path: Path) -> None:
    output = run_ranks(2, SCRIPT, "waits", str(tmp_path / "out"), "1,1", str(byte_tokenizer(tmp_path)))
    assert output.count("waited") == 2


@pytest.mark.slow
def test_data_out_of_reach_end_all_ranks_with_one_line(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", "2", str(tool), "mteb", "--checkpoint", str(ONEVISION)]
    command += ["--out", str(tmp_path / "out"), "--tasks", "CIFAR10", f"data.tokenizer={byte_tokenizer(tmp_path)}"]
    with pytest.raises(AssertionError) as failed:
        run_command(command, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "HOME": os.environ["HOME"]})
    errors = re.findall("^error: .*", str(failed.value), re.MULTILINE)
    assert len(errors) == 1, failed.value
    assert errors[0].startswith("error: task CIFAR10: its data, mteb/cifar10 at revision ")
    assert "benchmarks/mteb.py" not in str(failed.value)  # no traceback of ours

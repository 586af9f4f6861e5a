"""MMEB's golden sets give the official files at every layout; a model's results do not depend on the layout."""

import json
from pathlib import Path

import pytest
from golden_mmeb import NAMES
from golden_model import ONEVISION, byte_tokenizer
from run_ranks import run_ranks

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parent / "check_mmeb.py"


@pytest.mark.parametrize(("world", "layout"), [(1, "1,1"), (2, "1,1"), (4, "1,1"), (2, "2,1"), (4, "2,2"), (4, "2,1")])
def test_golden_sets_give_the_released_files(tmp_path: Path, world: int, layout: str) -> None:
    output = run_ranks(world, SCRIPT, "golden", str(tmp_path), layout)
    assert output.count("golden at") == world


@pytest.mark.slow
def test_a_model_scores_the_same_at_every_layout(tmp_path: Path) -> None:
    tokenizer = str(byte_tokenizer(tmp_path))
    found = []
    for world, layout in ((1, "1,1"), (2, "2,1"), (4, "2,2"), (4, "1,1"), (2, "1,1,2")):
        out = tmp_path / f"{world} {layout}"
        run_ranks(world, SCRIPT, "model", str(ONEVISION), str(out), layout, tokenizer)
        found.append([json.loads((out / f"{name}_result.json").read_text())["result"] for name in NAMES])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            assert one["top"] == expected["top"]
            assert one["positive"] == pytest.approx(expected["positive"], abs=3e-6)
            assert one["hardest_negative"] == pytest.approx(expected["hardest_negative"], abs=3e-6)

"""The golden models of the Qwen-VL families on one, two and four ranks."""

from pathlib import Path

import pytest
from golden_qwen_vl import FAMILIES
from run_ranks import run_ranks

pytestmark = [pytest.mark.long, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "check_qwen_vl.py"
LAYOUTS = {
    1: ("1,1,1,0,0", "1,1,1,0,0,vision"),
    2: ("2,1,1,0,0", "2,1,1,1,0,full", "1,2,1,0,0,selective", "1,2,2,0,0", "1,1,1,0,0,context2"),
    4: ("2,2,1,1,0", "2,2,2,1,0,vision,full"),
}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_golden_embeddings_and_gradients_at_every_layout(world: int) -> None:
    """Embeddings within 3e-5; the loss within 5e-6 and the norm of every gradient within 1e-5, relative.

    The golden decoders have four layers, three of which add deepstack features, so that these pass pipeline stages.
    """
    output = run_ranks(world, SCRIPT, *(f"{family}:{layout}" for family in FAMILIES for layout in LAYOUTS[world]))
    assert output.count("gradients") >= 2 * len(FAMILIES) * len(LAYOUTS[world])

"""Steps by a token budget against counted micro batches, at several layouts; and a pair that changes between passes."""

from pathlib import Path

import pytest
from run_ranks import run_ranks

SCRIPT = Path(__file__).parents[1] / "distributed" / "check_micro_batches.py"
# tensor, pipeline, virtual pipeline, context, budget, others
LAYOUTS = {
    1: ["1,1,1,1,280,vision,ema"],
    4: ["1,2,2,1,140,overlap", "2,2,1,1,280,ema", "1,2,1,2,140,vision", "1,1,1,1,250"],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_loss_and_gradients_are_those_of_counted_micro_batches(openmoji_data: Path, world: int) -> None:
    output = run_ranks(world, SCRIPT, str(openmoji_data), *LAYOUTS[world])
    assert output.count("gradients off by") == len(LAYOUTS[world])
    # In the first step of the last layout some ranks have one micro batch and make one pass, and others two.
    assert world == 1 or "[(1, 1), (2, 1)]" in output

"""LoRA adapters at many layouts against PEFT on one process: gradients (1e-5), merged weights (1e-6), buffers."""

from pathlib import Path

import pytest
from run_ranks import run_ranks

pytestmark = [pytest.mark.long, pytest.mark.slow]

CHECK = Path(__file__).parent / "check_lora.py"
REFERENCES = [
    *("llava_onevision/default", "llava_onevision/all", "llava_onevision/some"),
    *("qwen2_vl/all", "qwen2_5_vl/all", "qwen3_vl/all", "qwen3_vl/default"),
]
"""Family and a key of golden_lora.TARGETS."""
LAYOUTS = {
    1: ["llava_onevision/all:1,1,1,0,0", "qwen2_5_vl/all:1,1,1,0,0", "qwen3_vl/default:1,1,1,0,0,full"],
    2: [
        *("llava_onevision/all:2,1,1,0,0", "qwen3_vl/all:2,1,1,1,0", "qwen2_vl/all:2,1,1,1,0,full"),
        *("qwen2_5_vl/all:2,1,1,0,0,selective", "llava_onevision/default:1,2,1,0,0,full"),
        *("llava_onevision/some:1,2,2,0,0", "qwen3_vl/all:1,2,2,0,0", "qwen2_5_vl/all:1,1,1,0,0,overlap"),
        *("qwen3_vl/all:1,1,1,0,0,context2", "llava_onevision/all:1,1,1,0,0,context2,overlap"),
    ],
    4: ["llava_onevision/all:2,2,1,1,0", "qwen2_vl/all:2,2,2,1,0,full", "qwen3_vl/default:2,1,1,1,0,overlap"],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    run_ranks(1, CHECK, "reference", str(folder), *REFERENCES)
    return folder


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_those_of_peft_at_every_layout(reference: Path, world: int) -> None:
    """Of all adapters, with one, two and four pairs per micro batch, and with weights that were merged and not."""
    output = run_ranks(world, CHECK, "compare", str(reference), *LAYOUTS[world])
    assert output.count("merged") >= len(LAYOUTS[world])


def test_comparison_fails_when_a_collective_is_left_out(reference: Path) -> None:
    output = run_ranks(2, CHECK, "broken", str(reference), "qwen3_vl/default:2,1,1,0,0")
    assert output.count("bites without") == 2 * 3

"""Every parallel layout against one plain process: embeddings, gradients (1e-5), losses over steps, checkpoints."""

from pathlib import Path

import pytest
from run_ranks import run_ranks

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
CHECK = HERE / "check_layouts.py"
# tensor, pipeline, virtual pipeline, sequence parallel, layers on the first stage (0: even); frozen parts, others
LAYOUTS = {
    1: ["1,1,1,0,0", "1,1,1,0,0,vision", "1,1,1,0,0,projector", "1,1,1,0,0,vision,language"],
    2: [
        *("1,1,1,0,0", "2,1,1,0,0", "2,1,1,1,0", "1,2,1,0,0", "1,2,1,0,1", "1,2,2,0,0"),
        *("2,1,1,0,0,vision", "1,2,1,0,0,vision", "1,2,2,0,0,vision", "1,2,1,0,0,vision,language"),
        *("1,1,1,0,0,overlap", "1,2,2,0,0,overlap", "1,1,1,0,0,vision,overlap", "1,1,1,0,0,vision,language,overlap"),
        *("1,1,1,0,0,context2", "1,1,1,0,0,projector,context2", "1,1,1,0,0,vision,language,context2"),
    ],
    4: [
        *("2,2,1,0,0", "1,4,1,0,0", "2,2,2,1,0,vision", "2,2,1,1,1,projector"),
        *("1,1,1,0,0,overlap", "2,1,1,1,0,overlap", "1,2,1,0,0,vision,overlap"),
        *("2,1,1,1,0,context2", "1,2,2,0,0,context2", "1,1,1,0,0,vision,context2,overlap"),
    ],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(1, CHECK, "reference", str(folder), "1,1,1,0,0")
    run_ranks(1, CHECK, "compare", str(folder), *LAYOUTS[1])  # first, since it sets the losses others must follow
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_equal_one_process(reference: Path, world: int) -> None:
    output = run_ranks(world, CHECK, "compare", str(reference), *LAYOUTS[world])
    assert output.count("gradients off by") == len(LAYOUTS[world])


@pytest.mark.slow
def test_layouts_of_another_family_equal_one_process(tmp_path: Path) -> None:
    """What golden inputs do not have: ranks whose micro batch has no image, overlap, and steps of the optimizer."""
    layouts = ["1,1,1,0,0,qwen3_vl", "1,1,1,0,0,vision,qwen3_vl"]
    run_ranks(1, CHECK, "reference", str(tmp_path), layouts[0])
    run_ranks(1, CHECK, "compare", str(tmp_path), *layouts)
    both = [*("1,1,1,0,0,overlap,qwen3_vl", "1,2,2,0,0,overlap,qwen3_vl"), "1,1,1,0,0,vision,overlap,qwen3_vl"]
    output = run_ranks(2, CHECK, "compare", str(tmp_path), *both, "2,1,1,1,0,qwen3_vl")
    assert output.count("gradients off by") == 4


# The last but one: a stage on which nothing is trained. The last: saved as megatron-core saves it, as it was before.
@pytest.mark.parametrize(
    ("world", "precision", "form", "saved_at", "loaded_at"),
    [
        (4, "fp32", "own", "2,1,1,1,0", ["1,1,1,0,0", "1,4,1,0,0", "1,2,2,0,0", "2,2,1,0,1"]),
        pytest.param(2, "bf16", "own", "1,2,2,0,0", ["1,1,1,0,0", "2,1,1,1,0"], marks=pytest.mark.slow),
        (2, "fp32", "own", "1,1,1,0,0,context2", ["1,2,1,0,0"]),
        pytest.param(2, "fp32", "own", "2,1,1,1,0,qwen3_vl", ["1,1,1,0,0", "1,2,2,0,0"], marks=pytest.mark.slow),
        pytest.param(2, "fp32", "own", "1,2,1,0,0,vision,language", ["1,1,1,0,0", "2,1,1,1,0"], marks=pytest.mark.slow),
        pytest.param(2, "bf16", "gathered", "1,1,1,0,0", ["2,1,1,1,0"], marks=pytest.mark.slow),
        (2, "fp32", "own", "2,1,1,1,0,lora", ["1,2,2,0,0"]),
        (2, "bf16", "own", "1,2,2,0,0,qwen3_vl,lora_base", ["2,1,1,1,0"]),
    ],
)
def test_checkpoint_loads_bit_equal_at_other_layouts(
    tmp_path: Path, world: int, precision: str, form: str, saved_at: str, loaded_at: list[str]
) -> None:
    output = run_ranks(world, HERE / "check_checkpoint.py", str(tmp_path), precision, form, saved_at, *loaded_at)
    assert "loads bit-equal" in output


def test_comparison_fails_when_a_constant_is_off(reference: Path) -> None:
    output = run_ranks(2, CHECK, "broken", str(reference), "1,1,1,0,0")
    for constant in ("number of micro batches", "number of ranks", "other ranks' gradients"):
        assert f"bites without {constant}" in output


@pytest.mark.parametrize(
    ("world", "layouts"),
    [(1, ["1,1,1,0,0", "1,1,1,0,0,lora"]), (2, ["2,1,1,1,0", "1,2,2,0,0", "2,1,1,0,0,lora", "2,1,1,1,0,lora"])],
)
def test_dropout_is_the_same_in_both_passes(world: int, layouts: list[str]) -> None:
    output = run_ranks(world, HERE / "check_dropout.py", *layouts)
    assert output.count("both passes drop the same") == world * len(layouts)

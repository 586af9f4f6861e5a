"""No operation mixes host and device on a GPU that is only logical, and how often the host waits for it."""

import json
from pathlib import Path

import pytest
from logical_gpu import check_waits
from run_ranks import run_ranks

pytestmark = pytest.mark.long

CHECK = Path(__file__).parent / "check_logical_gpu.py"
WAITS = {
    1: {"1,1,1,0,0": (2, 1, 16), "1,1,1,0,0,bf16": (2, 1, 16), "1,1,1,0,0,bf16,qwen3_vl": (2, 1, 16)},
    2: {
        **{"1,1,1,0,0": (4, 1, 20), "2,1,1,0,0": (5, 1, 20), "1,2,1,0,0": (5, 1, 21), "1,2,2,0,0": (5, 1, 21)},
        **{"2,1,1,1,0,bf16": (5, 1, 20), "1,1,1,0,0,context2": (5, 1, 20)},
    },
    4: {"2,2,1,1,0": (5, 1, 27), "2,1,1,1,0,context2,bf16": (5, 1, 26)},
}
"""Processes -> layout -> how often the host waits in a step of training, in an embed of four inputs, and in an
evaluation, on the rank that waits most. Lower a number that has fallen; it must never rise.
tests/engine/logical.py has the same with Transformer Engine."""


def waits(world: int, *args: str) -> dict[str, list[dict[str, dict[str, int]]]]:
    """Layout -> what each rank says."""
    lines = run_ranks(world, CHECK, *args).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {layout: [rank for rank in found if rank["layout"] == layout] for layout in args[1:]}


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))])
def test_the_host_waits_no_more_often_than_it_did(tmp_path: Path, world: int) -> None:
    for layout, ranks in waits(world, str(tmp_path), *WAITS[world]).items():
        assert len(ranks) == world
        check_waits(ranks, WAITS[world][layout])


def test_a_value_that_is_read_in_a_step_is_counted(tmp_path: Path) -> None:
    for layout, [rank] in waits(1, str(tmp_path), *(f"{layout},item" for layout in WAITS[1])).items():
        where = rank["step"]
        assert sum(where.values()) == WAITS[1][layout.removesuffix(",item")][0] + 1
        assert any("check_logical_gpu.py" in line for line in where)


def test_the_logical_gpu_refuses_mixes_and_counts_waits() -> None:
    run_ranks(1, CHECK, "rules")

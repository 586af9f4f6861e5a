"""Transformer Engine on a GPU that is only logical: what mixes host and device, and how often the host waits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from check_logical_gpu import count
from engine import double, extension
from engine.gradients import ENGINE, ONE, config, reset_engine
from logical_gpu import LogicalGpu

WAITS = {
    1: {("delayed", ONE): (2, 1, 16)},
    2: {("tensorwise", "2,1,1,1,0"): (5, 1, 20)},
}
"""Processes -> precision and layout -> waits as in test_logical_gpu.py. It has the same numbers for local kernels."""
GPU = LogicalGpu()
"""One for the process, since Transformer Engine keeps tensors of its device in caches."""


def waits(folder: Path, precision: str, layout: str) -> dict[str, object]:
    """What waits in a step, an embed and an evaluation, and how many products were FP8."""
    extension.CALLS.clear()
    with GPU as gpu, patch.object(double, "gpu", gpu):
        found = count(gpu, config(ENGINE, precision, layout), str(folder / f"{precision} {layout}"))
    reset_engine()
    return {**found, "fp8 products": extension.CALLS["fp8 gemm"], "attention": extension.CALLS["attention"]}


def cases(world: int, folder: Path) -> dict[str, Callable[[], dict[str, object]]]:
    """Cases by name: precision, layout."""
    return {f"waits {' '.join(case)}": partial(waits, folder, *case) for case in WAITS[world]}

"""The figures of the documentation are what their script draws."""

import importlib.util
from pathlib import Path

import pytest

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
spec = importlib.util.spec_from_file_location("draw", FIGURES / "draw.py")
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)


@pytest.mark.parametrize("name", draw.FIGURES)
def test_file_is_as_drawn(name: str) -> None:
    assert (FIGURES / f"{name}.svg").read_text(encoding="utf-8") == draw.FIGURES[name]().svg(), (
        "run docs/figures/draw.py"
    )


def test_every_file_is_drawn() -> None:
    assert {file.stem for file in FIGURES.glob("*.svg")} == set(draw.FIGURES)

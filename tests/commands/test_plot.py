"""tools/plot.py on logs as runs write them, half-written, and damaged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from forking import run_script
from matplotlib.figure import Figure
from PIL import Image

from megatron_llave.commands import plot
from megatron_llave.errors import DataError
from megatron_llave.report import plots

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot.py"


def write_run(folder: Path, steps: int = 30, **other: float) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "subset": ("a", "b")[step % 2],
            "loss": 4 / step,
            "learning_rate": 1e-5,
            "gradient_norm": 2.0,
            "pairs": 8,
        }
        record |= {"positive_similarity": 0.5, "hardest_negative_similarity": 0.3, "similarity_overlap": 0.2}
        record["gradient_norm"] = 2.0
        lines.append(json.dumps(record | {"seconds": 2.0, "data_seconds": 0.5, "save_seconds": 0.0} | other))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 31, "lo')
    return folder


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return {colour for count, colour in image.convert("RGB").getcolors(1 << 24) if count > 50}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_each_run_has_its_colour_and_name(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "tiny"), write_run(tmp_path / "b" / "tiny", 20, gradient_norm=None)
    evaluations = [{"step": step, "precision_at_1": {"x": 10.0 + step, "y": 30.0}} for step in (10, 20, 10)]
    (one / "evaluations.jsonl").write_text("".join(json.dumps(value) + "\n" for value in evaluations))
    out = tmp_path / "new" / "both.png"
    command = [sys.executable, str(TOOL), str(one), str(two), "--out", str(out), "--along", "hours"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "a/tiny (30 steps), b/tiny (20 steps)" in result.stdout
    assert {rgb(colour) for colour in plots.SUBSET_COLOURS[:2]} <= colours(out)
    assert rgb(plots.SUBSET_COLOURS[2]) not in colours(out)
    assert plot.read_evaluations(one / "evaluations.jsonl") == [(10, 25.0), (20, 30.0)]


def test_each_subset_has_a_panel_with_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def keep(figure: Figure, path: Path) -> None:
        for axes in figure.axes:
            if axes.get_visible():
                drawn[axes.get_title(loc="left")] = [line.get_xdata().tolist() for line in axes.lines]

    monkeypatch.setattr(plots, "save_png", keep)
    subsets = [{"step": step, "loss": 1.0, "subset": ("a", "b")[step % 2]} for step in range(1, 7)]
    plots.plot_runs({"new": subsets, "old": [{"step": 1, "loss": 2.0}]}, {}, tmp_path / "x.png", "step")
    assert drawn["loss of subset a"] == [[2, 4, 6], []] and drawn["loss of subset b"] == [[1, 3, 5], []]
    assert drawn["loss"] == [[1, 2, 3, 4, 5, 6], [1]] and "loss of subset None" not in drawn
    assert "evaluation while training" not in drawn


def test_horizontal_axis_counts_what_is_asked_for() -> None:
    records = [{"step": step, "pairs": 8, "seconds": 1.0, "save_seconds": 0.5} for step in (1, 2, 3)]
    found = {along: plots.place_of(records, along).tolist() for along in ("step", "pairs", "hours")}
    assert found["step"] == [1, 2, 3] and found["pairs"] == [8, 16, 24]
    assert found["hours"] == pytest.approx([1.5 / 3600, 3 / 3600, 4.5 / 3600])


def test_records_without_times_are_drawn(tmp_path: Path) -> None:
    """Those of another program, or of a clock that did not move."""
    folder = write_run(tmp_path / "run")
    (folder / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "pairs": 8, "seconds": 0.0}\n'
    )
    for out in ("x.png", "x.html"):
        plot.main([str(folder), "--along", "hours", "--out", str(tmp_path / out)])
        assert (tmp_path / out).stat().st_size > 10_000


def test_one_run_is_drawn_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_run(tmp_path / "run")
    assert run_script(TOOL, folder).returncode == 0
    assert (folder / "curves.png").stat().st_size > 10_000
    plot.main([str(folder), "--html"])
    assert capsys.readouterr().out == f"{folder}/curves.html: run (30 steps)\n"
    assert "<h1>Curves of run</h1>" in (folder / "curves.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "log nowhere/log.jsonl does not exist"),
        (["run", "run"], "run is given twice"),
        (["run", "--out", "run.pdf"], "--out run.pdf must end in .png or .html"),
        (["run", "--html", "--out", "run.png"], "--out run.png must end in .html with --html"),
        (["run", "--out", "run/log.jsonl/x.html"], "cannot be written"),
        (["run", "--out", "run/log.jsonl/x.png"], "cannot be written"),
        (["empty"], "empty/log.jsonl has no step yet"),
        (["damaged"], "damaged/log.jsonl line 2 is not a step's record"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "empty", "damaged"):
        write_run(tmp_path / name, 3)
    Path("empty/log.jsonl").write_text("")
    Path("damaged/log.jsonl").write_text('{"step": 1}\nrubbish\n')
    monkeypatch.setattr(sys, "argv", ["plot.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        plot.main()
    assert stopped.value.code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_evaluation_without_scores_is_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    evaluations = [{"step": 10, "precision_at_1": {"x": None}}, {"step": 20, "precision_at_1": {"x": 30.0}}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(value) + "\n" for value in evaluations))
    [(step, score), after] = plot.read_evaluations(folder / "evaluations.jsonl")
    assert (step, after) == (10, (20, 30.0)) and math.isnan(score)
    assert run_script(TOOL, folder).returncode == 0


def test_damaged_evaluation_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"step": 1, "precision_at_1": {}}\n')
    with pytest.raises(DataError, match=r"evaluations.jsonl line 1 is not an evaluation"):
        plot.read_evaluations(tmp_path / "evaluations.jsonl")

"""tools/study.py as a whole: real runs, killed in the middle, then a report; and what a user gets wrong."""

import csv
import json
import os
import time
from pathlib import Path

import pytest
from forking import fork, run_script
from launching import data_with_few_sets

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "study.py"
CONFIG = ["--config", str(ROOT / "examples" / "studies" / "tiny.yaml")]


def evaluated(run: Path) -> int:
    return (run / "evaluation" / "report.json").stat().st_mtime_ns


@pytest.mark.slow
def test_killed_study_goes_on_without_redoing_finished_runs(openmoji_data: Path, tmp_path: Path) -> None:
    out, sets = tmp_path / "study", ("group", "tone_classification")
    data = data_with_few_sets(openmoji_data, tmp_path / "data", *sets)
    command = [str(TOOL), "hardness", *CONFIG, "--seeds", "0", "--out", str(out)]
    command += ["--variant", "alpha 9", "--processes", "1", f"data.path={data}", "train.steps=6"]
    command += [f"evaluate.sets=[{','.join(sets)}]"]
    command += ["train.global_batch_size=16", "checkpoint.interval=2", "loss.temperature_warmup_steps=2"]
    study = fork(command, (os.devnull, os.devnull), {})
    deadline = time.monotonic() + 200
    while not (out / "alpha-0-seed0" / "checkpoints" / "latest").is_file():  # the second of three is under way
        assert time.monotonic() < deadline and study.is_alive()
        time.sleep(0.02)
    study.kill()
    study.join()
    before = evaluated(out / "before-training-seed0")
    text = again(command)
    assert "1 runs were finished before, 2 were done now" in text
    assert evaluated(out / "before-training-seed0") == before
    for variant in ("alpha-0", "alpha-9"):
        steps = [json.loads(line)["step"] for line in (out / f"{variant}-seed0" / "log.jsonl").read_text().splitlines()]
        assert steps[-1] == 6 and set(steps) == set(range(1, 7))
    rows = {row["arm"]: row for row in csv.DictReader((out / "runs.csv").open())}
    assert set(rows) == {"before training", "alpha 0", "alpha 9"} and not any(row["problem"] for row in rows.values())
    assert float(rows["alpha 9"]["loss, last 50 steps"]) > float(rows["alpha 0"]["loss, last 50 steps"])
    assert "## Every run" in (out / "report.md").read_text()
    # Once more: nothing to do, the same numbers.
    text = again(command)
    assert "3 runs were finished before, 0 were done now" in text
    assert {row["arm"]: row for row in csv.DictReader((out / "runs.csv").open())} == rows


def again(command: list[str]) -> str:
    done = run_script(*command, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["hardness", "--variant", "alpha 3"], "--variant 'alpha 3' is none of study hardness's"),
        (["hardness", "--processes", "9" * 20], "must be at most 10000"),
        (["hardness", "--per-run", "4"], "--per-run 4 is no number from 1 to --processes 2"),
        (["hardness", "--task", "99"], "--task 99: the study has the runs 0 to 24"),
        (["hardness", "train.stepz=3"], "unknown key train.stepz"),
        (["negatives"], "do not tell its variants apart"),
        (["hardness_modes"], "data.hard_negatives=0; set it to at least 1"),
        (["hardness", "parallel.tensor=2"], "--per-run 1 is no multiple of tensor x pipeline = 2"),
        (["freezing"], "needs trained weights to start from"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, given: list[str], message: str) -> None:
    done = run_script(TOOL, *given, *CONFIG, "--out", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "message"), [("", "is no name for a folder"), ("/proc/nope/x", "cannot be written")])
def test_folder_that_cannot_be(given: str, message: str) -> None:
    done = run_script(TOOL, "hardness", *CONFIG, "--out", given)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_run_that_cannot_work_is_listed_and_the_status_tells(tmp_path: Path) -> None:
    done = run_script(TOOL, "hardness", *CONFIG, "--seeds", "0", "--out", tmp_path, "--task", "1", "data.path=nowhere")
    assert done.returncode == 1
    assert "failed: alpha-0-seed0: " in done.stdout and "nowhere" in done.stdout

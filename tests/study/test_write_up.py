"""Findings and report: every run is there, failed ones with their reason, and the numbers are those of the files."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_llave.config.load import load_config
from megatron_llave.loss.similarities import HISTOGRAM_BINS
from megatron_llave.study.findings import ALL, IND, OOD, comparisons, contrasts, read_findings
from megatron_llave.study.variants import STUDIES, Contrast, plan, run_name
from megatron_llave.study.write_up import mean_curves, write_up

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "studies" / "tiny.yaml"


def write_run(out: Path, variant: str, seed: int, ind: float, ood: float, steps: int = 60) -> None:
    folder = out / run_name(variant, seed)
    (folder / "evaluation").mkdir(parents=True)
    counts = [1] * HISTOGRAM_BINS
    sets = [
        {"name": name, "split": split, "precision_at_1": score, "overlap": 0.5, "margin": -0.25, "auc": 0.4}
        | {"positive_histogram": counts, "hardest_negative_histogram": counts}
        for name, split, score in (("a", "ind", ind), ("b", "ood", ood), ("c", "ind", 99.0), ("s", "seen", 100.0))
    ]
    (folder / "evaluation" / "report.json").write_text(json.dumps({"sets": sets}))
    record = {
        "loss": 2.0,
        "gradient_norm": ind,
        "subset": "a",
        "pairs": 64,
        "data_seconds": 0.0,
        "effective_negatives": 5.0,
        "similarity_overlap": 0.3,
        "seconds": 0.1,
    }
    lines = [{**record, "step": step + 1, "loss": None if step == 3 else 2.0} for step in range(steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def study():
    return STUDIES["hardness"](load_config(CONFIG), 1)


def read(out: Path, study, seeds=(0, 1, 2), failed={}, chosen=("a", "b")):
    runs = plan(study, load_config(CONFIG), seeds, ["alpha 9"])
    return read_findings(out, study, runs, chosen, failed)


def test_report_has_every_run_and_the_right_numbers(tmp_path: Path, study) -> None:
    for seed, (plain, weighted) in enumerate([(40.0, 43.0), (50.0, 51.0), (45.0, 47.0)]):
        write_run(tmp_path, "alpha 0", seed, plain, 20.0)
        write_run(tmp_path, "alpha 9", seed, weighted, 20.0 - seed)
    write_run(tmp_path, "alpha 5", 0, 1.0, 1.0)  # of an earlier call
    failed = {"alpha-9-seed3": "the loss was not finite", "alpha-0-seed3": "error: pipe:get --key SECRET a.tar"}
    findings = read(tmp_path, study, seeds=(0, 1, 2, 3), failed=failed)
    assert [(one.variant, one.seed) for one in findings if one.problem] == [
        *(("before training", 0), ("alpha 0", 3), ("alpha 9", 3))
    ]
    found = comparisons(findings, study, IND)
    assert found["alpha 9"].differences == (3.0, 1.0, 2.0) and found["alpha 9"].mean == 2.0
    assert comparisons(findings, study, OOD)["alpha 9"].differences == (0.0, -1.0, -2.0)
    assert comparisons(findings, study, ALL)["alpha 9"].mean == 0.5
    assert found["alpha 5"] is None  # one seed

    write_up(findings, study, tmp_path, {"alpha 9": {IND: 69.4}}, "There with cats.")
    text = (tmp_path / "report.md").read_text()
    assert "| alpha 9 | 3 of 4 | 33.0 ± " in text and "69.4" in text and "There with cats." in text
    assert "| all held out | alpha 5 | alpha 0 | - | - | - | - | - | fewer than two seeds in common |" in text
    line = "| in distribution | alpha 9 | alpha 0 | 3 | +2.0 | +1.0 to +3.0 | 3 up, 0 down | 0.250 |"
    assert f"{line} higher, but 3 seeds are too few for a test |" in text
    assert "the loss was not finite |" in text and "not finished |" in text
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert "error: a command |" in text and "error: a command" in [row["problem"] for row in rows]
    assert len(rows) == 3 + 3 + 1 + 3
    nine = next(row for row in rows if (row["arm"], row["seed"]) == ("alpha 9", "1"))
    assert (float(nine["a"]), float(nine[IND]), float(nine["steps not finite"]), nine["problem"]) == (
        51.0,
        51.0,
        1.0,
        "",
    )
    compared = list(csv.DictReader((tmp_path / "comparisons.csv").open()))
    assert {row["number"] for row in compared} >= {
        ALL,
        IND,
        OOD,
        "overlap",
        "margin",
        "AUC",
        "a",
        "s",
        "loss, last 50 steps",
    }
    for name in ("precision.png", "similarities.png", "curves.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"


def test_a_contrast_is_summed_seed_by_seed(tmp_path: Path, study) -> None:
    terms = (("alpha 9", 1), ("alpha 5", -1), ("alpha 0", -1), ("alpha 2", 1))
    study = replace(study, contrasts=(Contrast("gain", terms), Contrast("not run", (("alpha 15", 1),))))
    for seed, values in enumerate([(9.0, 1.0, 2.0, 0.0), (5.0, 1.0, 1.0, 0.5), (7.0, 0.0, 0.0, 0.0)]):
        for variant, value in zip(("alpha 9", "alpha 5", "alpha 0", "alpha 2"), values):
            if (variant, seed) != ("alpha 2", 2):
                write_run(tmp_path, variant, seed, value, 1.0)
    findings = read(tmp_path, study)
    [found] = contrasts(findings, study, IND).items()
    assert found[0] == "gain" and found[1].differences == (9.0 - 1.0 - 2.0 + 0.0, 5.0 - 1.0 - 1.0 + 0.5)
    write_up(findings, study, tmp_path)
    line = "| in distribution | gain | 2 | +4.8 | +3.5 to +6.0 | 2 up, 0 down | 0.500 | higher, but 2 seeds are too few"
    assert line in (tmp_path / "report.md").read_text()
    rows = [row for row in csv.DictReader((tmp_path / "comparisons.csv").open()) if row["arm"] == "gain"]
    assert [row["differences by seed"] for row in rows if row["number"] == IND] == ["6 3.5"]


def test_without_chosen_sets_means_are_over_all_held_out_ones(tmp_path: Path, study) -> None:
    write_run(tmp_path, "alpha 0", 0, 41.0, 20.0)
    [finding] = [one for one in read(tmp_path, study, chosen=()) if not one.problem]
    assert finding.values[IND] == 70.0 and finding.values[OOD] == 20.0 and "s" in finding.sets


def test_curves_are_means_over_the_runs_of_a_variant(tmp_path: Path, study) -> None:
    write_run(tmp_path, "alpha 0", 0, 40.0, 20.0, steps=5)
    write_run(tmp_path, "alpha 0", 1, 42.0, 20.0, steps=4)  # a run that is shorter ends the mean
    write_run(tmp_path, "before training", 0, 1.0, 1.0, steps=1)
    curves = mean_curves(read(tmp_path, study), ["before training", "alpha 0", "alpha 9"])
    assert list(curves) == ["alpha 0"] and [record["step"] for record in curves["alpha 0"]] == [1, 2, 3, 4]
    assert all(record["gradient_norm"] == 41.0 and "subset" not in record for record in curves["alpha 0"])
    assert ["loss" in record for record in curves["alpha 0"]] == [True, True, True, False]  # not finite in both


def test_nothing_finished_is_a_report_too(tmp_path: Path, study) -> None:
    findings = read(tmp_path, study)
    write_up(findings, study, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("not finished") == len(findings) == 7 and "| alpha 9 | 0 of 3 | - |" in text


def test_merged_run_has_no_log(tmp_path: Path, study) -> None:
    write_run(tmp_path, "alpha 0", 0, 41.0, 20.0)
    (tmp_path / "alpha-0-seed0" / "log.jsonl").unlink()
    [finding] = [one for one in read(tmp_path, study) if not one.problem]
    assert math.isnan(finding.values["gradient norm, largest"]) and finding.values[IND] == 41.0
    write_up([finding], study, tmp_path)


@pytest.mark.parametrize("damage", ["{", '{"sets": [{}]}', "[]"])
def test_damaged_report_is_listed_and_the_others_are_not_lost(tmp_path: Path, study, damage: str) -> None:
    for seed in (0, 1):
        write_run(tmp_path, "alpha 0", seed, 41.0, 20.0)
    (tmp_path / "alpha-0-seed0" / "evaluation" / "report.json").write_text(damage)
    found = {one.seed: one for one in read(tmp_path, study) if one.variant == "alpha 0"}
    assert "alpha-0-seed0/evaluation/report.json is damaged" in found[0].problem and found[1].values[IND] == 41.0


def test_damaged_log_is_listed(tmp_path: Path, study) -> None:
    write_run(tmp_path, "alpha 0", 0, 41.0, 20.0)
    (tmp_path / "alpha-0-seed0" / "log.jsonl").write_text("nonsense\n{}\n")
    [found] = [one for one in read(tmp_path, study, seeds=(0,)) if one.variant == "alpha 0"]
    assert "log.jsonl line 1 is not a step's record" in found.problem


def test_set_that_is_not_there_is_named(tmp_path: Path, study) -> None:
    write_run(tmp_path, "alpha 0", 0, 41.0, 20.0)
    [found] = [one for one in read(tmp_path, study, seeds=(0,), chosen=("zebra",)) if one.variant == "alpha 0"]
    assert "has no set 'zebra' (evaluate.sets), only a, b, c, s" in found.problem

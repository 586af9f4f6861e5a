"""The registry of benchmarks, one tie rule for all of them, and what a training rank imports."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_model import ONEVISION, byte_tokenizer

from megatron_llave.batch import Side
from megatron_llave.commands import evaluate
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.evaluation import benchmark
from megatron_llave.evaluation.benchmark import Benchmark, register_benchmark
from megatron_llave.evaluation.benchmarks.prepared import EvaluationSet, build_tasks
from megatron_llave.evaluation.scoring import score_task
from megatron_llave.evaluation.task import Task, build_task
from megatron_llave.options.evaluate import COMMANDS, TIES

TRAINING_IMPORTS = """
import sys
import megatron_llave.train
optional = {"datasets", "huggingface_hub", "matplotlib", "mlflow", "mteb", "tensorboard", "transformers", "wandb"}
print(*sorted(optional & set(sys.modules)))
"""


def read_animals(args) -> list[Task]:
    """A benchmark from outside of the package: queries that share their candidates, of which two are the same text."""
    texts = [args.first, "a dog", "a cat", "a dog"]
    inputs = Inputs("animals", [Input(text) for text in texts], ".")
    return [Task("animals", "retrieval", "ood", inputs, np.arange(2), np.array([2, 3]), np.array([2, 3]))]


ANIMALS = Benchmark(
    name="animals",
    about="two animals",
    add_options=lambda parser: parser.add_argument("--first", required=True),
    read_tasks=read_animals,
)


@pytest.fixture
def animals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BENCHMARKS", registered := dict(benchmark.BENCHMARKS))
    monkeypatch.setattr(evaluate, "BENCHMARKS", registered)
    register_benchmark(ANIMALS)


def test_the_command_line_has_every_benchmark() -> None:
    assert [one.command for one in benchmark.BENCHMARKS.values()] == list(COMMANDS)


def test_a_benchmark_from_outside_is_evaluated_by_the_tool(animals, groups, tmp_path, monkeypatch, capsys):
    arguments = ["animals", "--checkpoint", str(ONEVISION), "--first", "a cat", "--out", str(tmp_path / "out")]
    arguments += ["--ties", "first", f"data.tokenizer={byte_tokenizer(tmp_path)}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    monkeypatch.setattr(evaluate.process_groups, "destroy_distributed", lambda: None)  # the tests' own groups
    evaluate.main()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ties"] == "first" and report["work"]["inputs_embedded"] == 4
    assert [(scored["name"], scored["precision_at_1"], scored["num_candidates"]) for scored in report["sets"]] == [
        ("animals", 100.0, 2)
    ]
    assert (tmp_path / "out" / "embeddings" / "animals" / "manifest.json").is_file()
    assert "ties: first" in capsys.readouterr().out


def test_a_name_that_is_taken_and_half_a_benchmark_are_refused(animals):
    with pytest.raises(ValueError, match="'animals' is registered already"):
        register_benchmark(ANIMALS)
    with pytest.raises(ValueError, match="'other' must have either read_tasks or read_evaluation"):
        register_benchmark(replace(ANIMALS, name="other", read_tasks=None))


@pytest.mark.parametrize(
    "arguments", [["--checkpoint", "runs/tiny", "--data", "runs/openmoji"], ["parallel.tensor=2"], []]
)
def test_a_call_without_a_command_is_one_line(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    expected = "error: the first argument must be a command: prepared, mmeb, retrieval, video, mteb\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, expected)


@pytest.mark.parametrize(("ties", "expected"), [("first", 100.0), ("strict", 0.0)])
def test_a_tied_query_scores_the_same_with_own_and_with_shared_candidates(groups, ties, expected):
    vectors = {"q": [1, 0], "wrong": [0, 1], "also right": [0, 1]}
    with_own = build_task("own", "retrieval", "ind", [(Input("q"), [Input("also right"), Input("wrong")])], ".")
    sides = {text: Side(text, []) for text in vectors}
    [shared] = build_tasks(sides, [EvaluationSet("shared", "retrieval", "ind", ["q"], ["wrong", "also right"], [1])])
    for task in (with_own, shared):
        rows = np.array([vectors[entry.text] for entry in task.inputs.entries], np.float32)
        result = score_task(task, rows.__getitem__, ties, groups.dp)
        assert (result.precision_at_1, result.num_ties, result.chance) == (expected, 1, 50.0)
    assert set(TIES) == {"first", "strict"}


def test_own_and_shared_candidates_give_the_same_figures(groups):
    """Random vectors: every figure and every ranked candidate agrees, also where a candidate is given twice."""
    rng = np.random.default_rng(0)
    names = [f"c{number:02}" for number in range(30)]
    candidates, right = [*names, "c03"], ["c03", "c07", "c29", "c11"]
    rows = [
        (Input(f"q{i}"), [Input(text) for text in sorted(candidates, key=lambda c: c != right[i])]) for i in range(4)
    ]
    with_own = build_task("set", "retrieval", "ind", rows, ".")
    number_of = {entry.text: number for number, entry in enumerate(with_own.inputs.entries)}
    numbers = np.array([number_of[text] for text in candidates])
    shared = replace(with_own, candidates=numbers, bounds=None)
    vectors = rng.normal(size=(len(with_own.inputs), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = (score_task(task, vectors.__getitem__, "strict", groups.dp) for task in (with_own, shared))
    for name in (
        "precision_at_1",
        "positive",
        "hardest_negative",
        "num_ties",
        "overlap",
        "alignment",
        "queries",
        "chance",
    ):
        assert getattr(first, name) == getattr(second, name), name
    best = [[[result.candidates[index] for index in row] for row in result.top] for result in (first, second)]
    assert best[0] == best[1]


def test_training_ranks_import_nothing_that_draws_or_that_only_some_runs_need():
    command = [sys.executable, "-c", TRAINING_IMPORTS]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=root)
    assert done.stdout.split() == []

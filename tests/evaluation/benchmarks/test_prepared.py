"""Evaluation sets: round trip, each input once, and one line that names file, set or key for everything malformed."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.embedding.inputs import Input
from megatron_llave.errors import DataError
from megatron_llave.evaluation.benchmarks.prepared import (
    EvaluationSet,
    build_tasks,
    input_key,
    read_evaluation,
    read_tasks,
    write_evaluation,
)
from megatron_llave.evaluation.scoring import score_task
from megatron_llave.evaluation.task import build_task


def image_file(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def example():
    sides = [Side("red?", [image_file(200)]), Side("", [image_file(10)]), Side("yes", []), Side("no", [])]
    inputs = {input_key(side): side for side in sides}
    keys = list(inputs)
    return inputs, [
        EvaluationSet("colour", "vqa", "ind", keys[:2], keys[2:], [0, 1]),
        EvaluationSet("again", "retrieval", "ood", keys[2:3], keys[:3], [2]),
    ]


def edit(folder, change):
    path = folder / "eval/sets.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_round_trip(tmp_path):
    inputs, sets = example()
    write_evaluation(tmp_path, inputs, sets)
    assert read_evaluation(tmp_path) == (inputs, sets)
    tasks = read_tasks(tmp_path)
    assert [task.chance for task in tasks] == [50.0, pytest.approx(33.333, abs=1e-3)]
    assert tasks[0].inputs is tasks[1].inputs and list(tasks[0].inputs.values()) == list(inputs.values())
    assert [task.name for task in read_tasks(tmp_path, ["again"])] == ["again"]
    assert len(read_tasks(tmp_path, ["again"])[0].inputs) == 3
    assert [task.num_meeting_themselves for task in tasks] == [0, 0], "a query that is its own right candidate"
    assert "further" not in json.loads((tmp_path / "eval/sets.json").read_text())["sets"][0]
    edit(tmp_path, lambda value: value["sets"][1].update(positives=[1]))
    assert [task.num_meeting_themselves for task in read_tasks(tmp_path)] == [0, 1]
    a, b, c = map(Input, "abc")
    rows = [(a, [b, c]), (a, [b, a]), (a, [a, b]), (c, [c])]
    assert build_task("lists", "retrieval", "ind", rows, ".").num_meeting_themselves == 1


def test_queries_may_have_several_right_candidates(tmp_path, groups):
    sides = {text: Side(text, []) for text in ("p", "q", "r", "a", "b", "c", "d")}
    inputs = {input_key(side): side for side in sides.values()}
    keys = list(inputs)
    described = EvaluationSet("labels", "classification", "ind", keys[:3], keys[3:], [0, 0, 1], [[1, 2], [], [3]])
    write_evaluation(tmp_path, inputs, [described])
    assert read_evaluation(tmp_path) == (inputs, [described])
    [task] = read_tasks(tmp_path)
    assert task.chance == described.chance == 50.0 and task.num_meeting_themselves == 0
    single = build_tasks(inputs, [dataclasses.replace(described, further=[])])[0]
    assert single.digest != task.digest and single.chance == 25.0
    # Similarities to a, b, c, d: the most similar candidates are c, which is right; b, which is wrong; and d.
    candidates = np.eye(4, dtype=np.float32)
    queries = np.array([[0.1, 0.5, 0.8, 0.3], [0.5, 0.8, 0.1, 0.3], [0.5, 0.1, 0.3, 0.8]], np.float32)
    rows = np.concatenate([queries, candidates])
    result = score_task(task, rows.__getitem__, "strict", groups.dp)
    assert result.precision_at_1 == pytest.approx(200 / 3)
    assert result.positive == pytest.approx([0.8, 0.5, 0.8]) and result.hardest_negative == pytest.approx(
        [0.3, 0.8, 0.5]
    )
    named = [[result.candidates[place].split()[-1] for place in places] for places in result.further]
    assert [sorted({*more, result.candidates[first].split()[-1]}) for more, first in zip(named, result.positives)] == [
        ["a", "b", "c"],
        ["a"],
        ["b", "d"],
    ]
    assert score_task(single, rows.__getitem__, "strict", groups.dp).precision_at_1 == 0


def test_same_inputs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, *example())
    for file in ("sets.json", "inputs-000000.tar"):
        assert (tmp_path / "a/eval" / file).read_bytes() == (tmp_path / "b/eval" / file).read_bytes()


def test_key_tells_inputs_apart():
    red, darker = image_file(2), image_file(1)
    sides = [Side(text, images) for text in ("", "a") for images in ([], [red], [darker], [red, darker])]
    sides += [Side("", [red], is_video=True, seconds=seconds) for seconds in ((), (0,), (1,))]
    assert len({input_key(side) for side in sides}) == len(sides)
    assert input_key(Side("cat", [])) == "77af778b51abd4a3c51c5ddd97204a9c"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": ["f00", "f00"]}, "set 'colour' names input 'f00'"),
        ({"positives": [0, 2]}, "set 'colour': positive 2 of query 1 is out of range.*0 to 1"),
        ({"positives": [0, -1]}, "positive -1"),
        ({"positives": [0]}, "2 queries but 1 positives"),
        ({"further": [[1]]}, "2 queries but 1 lists of further right candidates"),
        ({"further": [[], [2]]}, "set 'colour': positive 2 of query 1 is out of range"),
        ({"queries": [], "positives": []}, "set 'colour' has 0 queries and 2 candidates"),
        ({"candidates": []}, "2 queries and 0 candidates"),
        ({"split": "test"}, "split 'test'"),
        ({"meta_task": "VQA"}, "meta_task 'VQA'"),
        ({"name": "again"}, "set 'again' comes twice"),
    ],
)
def test_inconsistent_set_is_refused_by_writer_and_reader(tmp_path, changes, message):
    inputs, sets = example()
    bad = dataclasses.replace(sets[0], **changes)
    with pytest.raises(DataError, match=message):
        write_evaluation(tmp_path / "never", inputs, [bad, sets[1]])
    write_evaluation(tmp_path, inputs, sets)
    edit(tmp_path, lambda value: value["sets"][0].update(changes))
    with pytest.raises(DataError, match=message) as caught:
        read_evaluation(tmp_path)
    assert "sets.json" in str(caught.value)


def test_missing_or_damaged_files(tmp_path):
    with pytest.raises(DataError, match="evaluation folder .*eval does not exist"):
        read_evaluation(tmp_path)
    write_evaluation(tmp_path, *example())
    tar = tmp_path / "eval/inputs-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:2048])
    with pytest.raises(DataError, match="inputs-000000.tar is truncated or changed: 2048 bytes"):
        read_evaluation(tmp_path)
    edit(tmp_path, lambda value: value["inputs"][0].update(bytes=2048, pairs=2))
    with pytest.raises(DataError, match="inputs-000000.tar is truncated"):
        read_evaluation(tmp_path)
    tar.unlink()
    with pytest.raises(DataError, match="inputs-000000.tar is missing"):
        read_evaluation(tmp_path)
    (tmp_path / "eval/sets.json").unlink()
    with pytest.raises(DataError, match="sets.json does not exist"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["sets"].clear(), "holds no evaluation set"),
        (lambda value: value["sets"][0].pop("split"), "malformed.*split"),
        (lambda value: value["sets"][0].update(further=[["0"], []]), "malformed.*further .* of 'colour'"),
        (lambda value: value["sets"][0].update(further=[1, 0]), "malformed"),
        (lambda value: value["sets"][0].update(positives=["0", 1]), "malformed.*positives of 'colour'"),
        (
            lambda value: value["sets"][0].update(queries=[{"a": 1}, []]),
            "malformed.*queries and candidates of 'colour'",
        ),
        (lambda value: value.pop("inputs"), "malformed.*inputs"),
        (lambda value: value.update(format="x"), "is not a 'megatron_llave evaluation' file"),
    ],
)
def test_malformed_sets_file(tmp_path, change, message):
    write_evaluation(tmp_path, *example())
    edit(tmp_path, change)
    with pytest.raises(DataError, match=message):
        read_evaluation(tmp_path)

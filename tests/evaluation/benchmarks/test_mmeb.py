"""MMEB-eval: the table of its 36 sets, its rows as tasks, and wrong sources in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_llave.embedding.inputs import Input
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.mmeb import SETS, choose_sets, read_task
from megatron_llave.evaluation.task import build_task
from megatron_llave.prepare.mmeb import SUBSETS

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "mmeb"
ROW = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}


def write(folder: Path, name: str, rows: list[dict], part: str = "test-00000-of-00001") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{part}.parquet")


def file_input(text: str, image: str) -> Input:
    return Input(text, (image,) if image else ())


def test_the_table_is_that_of_the_benchmark():
    golden = json.loads((GOLDEN / "mmeb_datasets.json").read_text())["datasets"]
    assert SETS == {row["dataset"]: (row["meta_task"].lower(), row["split"].lower()) for row in golden}
    assert len(SETS) == 36 and sum(split == "ind" for _, split in SETS.values()) == 20
    trained = {name.replace("ImageNet_1K", "ImageNet-1K"): task for name, task in SUBSETS.items()}
    assert {name: task for name, (task, split) in SETS.items() if split == "ind"} == trained


@pytest.mark.parametrize("name", ["CIRR", "ImageNet-1K", "MSCOCO_t2i", "RefCOCO-Matching"])
def test_golden_rows_come_back(name):
    task = read_task(GOLDEN / "eval", GOLDEN / "eval", name)
    rows = pq.read_table(GOLDEN / "eval" / name / "test-00000-of-00001.parquet").to_pylist()
    inputs = task.inputs.entries
    assert len(task.queries) == len(rows) == 8 and len(set(task.inputs.entries)) == len(task.inputs)
    counts = json.loads((GOLDEN / "expected.json").read_text())[name]
    assert len(np.unique(task.queries)) == counts["n_unique_queries"]
    assert len(np.unique(task.candidates)) == counts["n_unique_targets"]
    for number, row in enumerate(rows):
        assert inputs[task.queries[number]] == file_input(row["qry_text"], row["qry_img_path"])
        candidates = [inputs[index] for index in task.candidates_of(number)]
        assert candidates == [file_input(*pair) for pair in zip(row["tgt_text"], row["tgt_img_path"])]
    for key, entry in zip(task.inputs, inputs, strict=True):
        assert task.inputs[key].text == entry.text
        assert task.inputs[key].images == [(GOLDEN / "eval" / image).read_bytes() for image in entry.images]


def test_sets_are_chosen_in_the_papers_order():
    assert choose_sets(GOLDEN / "eval", None) == ["ImageNet-1K", "CIRR", "MSCOCO_t2i", "RefCOCO-Matching"]
    assert choose_sets(GOLDEN / "eval", ["MSCOCO_t2i", "ImageNet-1K"]) == ["ImageNet-1K", "MSCOCO_t2i"]


def test_parts_in_several_files_and_one_text_for_many_pictures(tmp_path):
    write(tmp_path, "NIGHTS", [ROW | {"qry_text": "first"}], "test-00000-of-00002")
    write(tmp_path, "NIGHTS", [ROW | {"qry_text": "second"}], "test-00001-of-00002")
    task = read_task(tmp_path, tmp_path, "NIGHTS")
    assert [task.inputs.entries[index].text for index in task.queries] == ["first", "second"]
    write(tmp_path, "CIRR", [ROW | {"tgt_text": "same", "tgt_img_path": ["1.png", "2.png"]}])
    task = read_task(tmp_path, tmp_path, "CIRR")
    assert [task.inputs.entries[index] for index in task.candidates_of(0)] == [
        Input("same", ("1.png",)),
        Input("same", ("2.png",)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"tgt_text": [], "tgt_img_path": []}, "row 1 has no candidate; the first entry of tgt_text must be"),
        (ROW | {"tgt_text": ["", "b"]}, r"row 1: tgt\[0\] has neither text nor image; it should be the right candid"),
        (ROW | {"tgt_img_path": [""]}, "row 1: 2 entries in tgt_text, but 1 in tgt_img_path"),
        (ROW | {"qry_text": ""}, "row 1: qry has neither text nor image"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    write(tmp_path, "CIRR", [ROW, row])
    with pytest.raises(DataError, match=f"data set CIRR of .*{message}"):
        read_task(tmp_path, tmp_path, "CIRR")


def test_wrong_sources_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="'ImageNet_1K' is no data set of MMEB-eval, which are ImageNet-1K, "):
        choose_sets(tmp_path, ["ImageNet_1K"])
    with pytest.raises(DataError, match="is not a folder"):
        choose_sets(tmp_path / "none", None)
    with pytest.raises(DataError, match="holds no folder of an MMEB-eval data set"):
        choose_sets(tmp_path, None)
    with pytest.raises(DataError, match=r"CIRR must hold test-00000-of-00001\.parquet, or all parts .found: none"):
        read_task(tmp_path, tmp_path, "CIRR")
    write(tmp_path, "CIRR", [ROW], "test-00001-of-00002")
    with pytest.raises(DataError, match=r"or all parts .found: test-00001-of-00002\.parquet"):
        read_task(tmp_path, tmp_path, "CIRR")
    write(tmp_path, "GQA", [{"qry_text": "q"}])
    with pytest.raises(DataError, match="has no column 'qry_img_path'; its columns are qry_text"):
        read_task(tmp_path, tmp_path, "GQA")
    shutil.copy(GOLDEN / "eval" / "CIRR" / "q0.png", tmp_path / "GQA" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet cannot be read .*download it again"):
        read_task(tmp_path, tmp_path, "GQA")


def test_a_damaged_picture_is_named(tmp_path):
    write(tmp_path, "CIRR", [ROW | {"qry_img_path": "gone.png"}])
    task = read_task(tmp_path, tmp_path, "CIRR")
    [key] = [key for key in task.inputs if "gone.png" in key]
    with pytest.raises(DataError, match=r"data set CIRR: image .*gone\.png does not exist"):
        task.inputs[key]
    with pytest.raises(DataError, match=r"gone\.png does not exist, 1 of 1 files looked for are missing"):
        task.inputs.require_files()


def test_parts_cover_all_inputs_and_cost_alike():
    texts = [Input("x" * length) for length in range(0, 4000, 10)]
    rows = [(texts[0], texts), (Input("q", ("i.png",)), [Input("", ("j.png",))])]
    task = build_task("a", "vqa", "ind", rows, ".")
    bounds = task.inputs.cut(40)
    assert bounds[0] == 0 and bounds[-1] == len(task.inputs) and bounds == sorted(set(bounds))
    costs = [sum(entry.cost for entry in task.inputs.entries[a:b]) for a, b in zip(bounds, bounds[1:])]
    assert all(cost <= 40 for cost in costs) and min(costs[:-1]) > 40 - max(entry.cost for entry in task.inputs.entries)
    inputs = task.inputs.entries
    assert [entry.cost for entry in inputs] == sorted(entry.cost for entry in inputs)

"""MMEB-train: golden rows come back equal in every subset, from Parquet and JSON, and wrong sources are one line."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_pairs import read_shard

from megatron_llave.batch import Side
from megatron_llave.data.index import read_index
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.prepare import mmeb, shard_jobs, source_sides

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "mmeb" / "train"
SUBSETS = ["CIRR", "ImageNet_1K", "MSCOCO_t2i", "OK-VQA", "WebQA"]


def pairs_of(out):
    subsets = read_index(out).subsets
    return {name: [p for s in subset.shards for p in read_shard(out / s.file)] for name, subset in subsets.items()}


def golden_side(text, image):
    return Side(text, [(GOLDEN / image).read_bytes()] if image else [])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path):
    """A folder with nothing but the golden images."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "images", folder / "images")
    return folder


def records(subset):
    return json.loads((GOLDEN / f"{subset}.json").read_text())


def write_parquet(source, subset, rows, part="original-00000-of-00001", **options):
    (source / subset).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), source / subset / f"{part}.parquet", **options)


def test_golden_rows_come_back_equal(tmp_path):
    made = mmeb.prepare(GOLDEN, tmp_path / "out", workers=1)
    pairs = pairs_of(tmp_path / "out")
    assert list(pairs) == SUBSETS and not any(made.skipped.values())
    for subset in SUBSETS:
        rows = records(subset)
        assert len(pairs[subset]) == len(rows) == 8
        for number, (row, pair) in enumerate(zip(rows, pairs[subset])):
            assert pair.key == f"{subset}-{number:08d}" and pair.subset == subset
            assert pair.query == golden_side(row["qry"], row["qry_image_path"])
            assert pair.target == golden_side(row["pos_text"], row["pos_image_path"])
            has_negative = row.get("neg_text") or row.get("neg_image_path")
            expected = [golden_side(row["neg_text"], row["neg_image_path"])] if has_negative else []
            assert pair.hard_negatives == expected
    assert sum(bool(pair.hard_negatives) for pair in pairs["CIRR"]) == 8
    assert not any(pair.hard_negatives for pair in pairs["MSCOCO_t2i"])
    assert all("<|image_1|>" in pair.query.text and not pair.query.images for pair in pairs["WebQA"])


def test_meta_tasks_are_those_of_the_benchmark(tmp_path):
    mmeb.prepare(GOLDEN, tmp_path, workers=1, limit=1)
    assert {name: subset.meta_task for name, subset in read_index(tmp_path).subsets.items()} == {
        "CIRR": "retrieval",
        "ImageNet_1K": "classification",
        "MSCOCO_t2i": "retrieval",
        "OK-VQA": "vqa",
        "WebQA": "retrieval",
    }
    counts = {task: list(mmeb.SUBSETS.values()).count(task) for task in set(mmeb.SUBSETS.values())}
    assert counts == {"classification": 5, "vqa": 6, "retrieval": 8, "grounding": 1}


def test_lists_of_negatives_without_copies_of_the_target(source, tmp_path):
    row = records("CIRR")[0]
    image, target = row["neg_image_path"], row["pos_text"]
    lists = {"neg_text": ["a", "b", "", "a"], "neg_image_path": [image, "", "", image]}
    same = {"neg_text": ["x", target], "neg_image_path": ["", row["pos_image_path"]]}
    rows = [
        row | lists,
        row | same,
        row | {"neg_text": ["a", "b"], "neg_image_path": None},
        row | {"neg_text": [], "neg_image_path": []},
    ]
    (source / "CIRR.json").write_text(json.dumps(rows))
    made = mmeb.prepare(source, tmp_path / "out", workers=1)
    first, second, third, last = pairs_of(tmp_path / "out")["CIRR"]
    assert first.hard_negatives == [golden_side("a", image), golden_side("b", "")]
    assert [side.text for side in second.hard_negatives] == ["x"]
    assert [side.text for side in third.hard_negatives] == ["a", "b"] and last.hard_negatives == []
    assert made.skipped["CIRR"] == {shard_jobs.HARD_NEGATIVE + source_sides.EQUAL: 2}
    rows[1]["neg_text"].append("y")
    (source / "CIRR.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="CIRR of .*, row 1: neg_text has 3 values and neg_image_path 2"):
        mmeb.prepare(source, tmp_path / "no", workers=1)
    write_parquet(source, "CIRR", rows[:1])
    mmeb.prepare(source, tmp_path / "parquet", workers=1)
    assert pairs_of(tmp_path / "parquet")["CIRR"] == [first]


def test_ids_are_equal_exactly_where_text_and_image_path_are(tmp_path):
    mmeb.prepare(GOLDEN, tmp_path, workers=1)
    for subset, pairs in pairs_of(tmp_path).items():
        rows = records(subset)
        for names, ids in (
            (("qry", "qry_image_path"), [pair.query_id for pair in pairs]),
            (("pos_text", "pos_image_path"), [pair.target_id for pair in pairs]),
        ):
            contents = [tuple(row[name] for name in names) for row in rows]
            for i in range(8):
                for j in range(8):
                    assert (ids[i] == ids[j]) == (contents[i] == contents[j])
    # A hard negative that is another row's target has that target's id.
    cirr = pairs_of(tmp_path)["CIRR"]
    assert [pair.hard_negative_ids[0] for pair in cirr[:-1]] == [pair.target_id for pair in cirr[1:]]


def test_json_parquet_parts_and_row_groups_all_give_the_same_bytes(source, tmp_path):
    rows = records("CIRR")
    (source / "CIRR.json").write_text(json.dumps(rows))
    mmeb.prepare(source, tmp_path / "json", workers=1)
    write_parquet(source, "CIRR", rows[5:], "original-00001-of-00002", row_group_size=2)
    write_parquet(source, "CIRR", rows[:5], "original-00000-of-00002", row_group_size=2)
    mmeb.prepare(source, tmp_path / "parts", workers=1)
    mmeb.prepare(GOLDEN, tmp_path / "whole", subsets=["CIRR"], workers=1)
    assert contents(tmp_path / "json") == contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_limit_takes_the_first_rows_before_any_is_skipped(source, tmp_path):
    rows = records("OK-VQA")
    rows[1]["qry_image_path"] = "images/none.png"
    write_parquet(source, "OK-VQA", rows)
    made = mmeb.prepare(source, tmp_path / "out", limit=3, workers=1)
    pairs = pairs_of(tmp_path / "out")["OK-VQA"]
    assert [pair.query.text for pair in pairs] == [rows[0]["qry"], rows[2]["qry"]]
    assert made.skipped == {"OK-VQA": {"missing image": 1}}
    assert json.loads((tmp_path / "out/report.jsonl").read_text())["row"] == 1


def test_paths_cannot_leave_the_source(source, tmp_path):
    rows = records("OK-VQA")
    (tmp_path / "secret.png").write_bytes((GOLDEN / rows[0]["qry_image_path"]).read_bytes())
    rows[0]["qry_image_path"] = "../secret.png"
    rows[1]["qry_image_path"] = str(tmp_path / "secret.png")
    write_parquet(source, "OK-VQA", rows)
    made = mmeb.prepare(source, tmp_path / "out", workers=1)
    assert made.skipped == {"OK-VQA": {"image path outside the source": 2}}
    assert read_index(tmp_path / "out").subsets["OK-VQA"].pairs == 6


def test_workers_and_order_of_reading_do_not_change_the_bytes(source, tmp_path):
    rows = [{**records("OK-VQA")[n % 8], "pos_text": f"answer {n}"} for n in range(2500)]
    write_parquet(source, "OK-VQA", rows, row_group_size=700)
    mmeb.prepare(source, tmp_path / "one", workers=1)
    mmeb.prepare(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [shard.pairs for shard in read_index(tmp_path / "one").subsets["OK-VQA"].shards] == [1000, 1000, 500]
    assert [pair.target.text for pair in pairs_of(tmp_path / "two")["OK-VQA"]] == [row["pos_text"] for row in rows]


def test_rows_are_read_as_they_are_needed(source, monkeypatch):
    write_parquet(source, "OK-VQA", records("OK-VQA") * 500, row_group_size=1000)
    sizes = []
    real = pq.ParquetFile.iter_batches

    def spy(file, **options):
        for batch in real(file, **options):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    rows = mmeb.read_rows(mmeb.find_table(source, "OK-VQA", "original", None), source)
    next(rows)
    assert sizes == [shard_jobs.PAIRS_PER_SHARD]
    assert len(list(rows)) == 3999 and max(sizes) == 1000


def test_null_is_an_empty_text_or_no_image(source, tmp_path):
    rows = records("ImageNet_1K")
    rows[0] = {**rows[0], "pos_image_path": None, "neg_text": None, "neg_image_path": None}
    write_parquet(source, "ImageNet_1K", rows)
    mmeb.prepare(source, tmp_path / "out", workers=1)
    pair = pairs_of(tmp_path / "out")["ImageNet_1K"][0]
    assert pair.target.images == [] and pair.hard_negatives == []


def test_splits(source, tmp_path):
    write_parquet(source, "CIRR", records("CIRR"))
    diverse = [{**row, "qry": f"diverse {row['qry']}"} for row in records("CIRR")]
    write_parquet(source, "CIRR", diverse, "diverse_instruction-00000-of-00001")
    mmeb.prepare(source, tmp_path / "out", split="diverse_instruction", workers=1)
    assert [pair.query.text for pair in pairs_of(tmp_path / "out")["CIRR"]] == [row["qry"] for row in diverse]
    write_parquet(source, "WebQA", records("WebQA"))
    with pytest.raises(DataError, match="WebQA has no diverse_instruction.*splits there: original"):
        mmeb.prepare(source, tmp_path / "other", split="diverse_instruction", workers=1)


def misspelt(source):
    write_parquet(source, "ImageNet-1K", records("ImageNet_1K"))


def unknown_file(source):
    (source / "mine.json").write_text("[]")


def lost_part(source):
    write_parquet(source, "CIRR", records("CIRR"), "original-00001-of-00002")


def mixed_parts(source):
    write_parquet(source, "CIRR", records("CIRR"), "original-00000-of-00001")
    write_parquet(source, "CIRR", records("CIRR"), "original-00000-of-00002")


def no_column(source):
    write_parquet(source, "CIRR", [{"qry": "x", "qry_image_path": ""}])


def no_parquet(source):
    (source / "CIRR").mkdir()
    (source / "CIRR/original-00000-of-00001.parquet").write_bytes(b"PAR1 no")


def cut_parquet(source):
    write_parquet(source, "CIRR", records("CIRR"))
    path = source / "CIRR/original-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def no_string(source):
    write_parquet(source, "CIRR", [{"qry": "x", "qry_image_path": "", "pos_text": 3, "pos_image_path": ""}])


def no_list(source):
    (source / "CIRR.json").write_text('{"qry": "x"}')


def no_key(source):
    (source / "CIRR.json").write_text('[{"qry": "x"}]')


def no_rows(source):
    (source / "CIRR.json").write_text("[]")


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (misspelt, ConfigError, "'ImageNet-1K' is no training subset of MMEB, which are ImageNet_1K, .*command jsonl"),
        (unknown_file, ConfigError, "'mine' is no training subset"),
        (lost_part, DataError, "has parts 00001 of 00002 of split original; complete the download"),
        (mixed_parts, DataError, "of 00001 and 00002"),
        (no_column, DataError, "00001.parquet has no column 'pos_text'; its columns are qry, qry_image_path"),
        (no_parquet, DataError, "00001.parquet cannot be read"),
        (cut_parquet, DataError, "00001.parquet cannot be read"),
        (no_string, DataError, "subset CIRR of .*, row 0: pos_text must be a string, not '3'"),
        (no_list, DataError, "CIRR.json must be a list"),
        (no_key, DataError, "CIRR.json: record 0 must be an object with qry"),
        (no_rows, DataError, "CIRR.json must be a list"),
        (lambda source: None, DataError, "holds no <subset>/<split>"),
    ],
)
def test_wrong_source_is_one_line(source, tmp_path, edit, kind, message):
    edit(source)
    with pytest.raises(kind, match=message) as caught:
        mmeb.prepare(source, tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/index.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"limit": 0}, "--limit 0"),
        ({"workers": 0}, "--workers 0"),
        ({"workers": 10**20}, "must be at most 1024"),
        ({"max_pixels": 0}, "--max-pixels 0"),
        ({"split": "test"}, "'test' is not one of original, diverse_instruction"),
        ({"subsets": ["Mine"]}, "'Mine' is no training subset"),
    ],
)
def test_wrong_argument(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mmeb.prepare(GOLDEN, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_no_such_source(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        mmeb.prepare(tmp_path / "nowhere", tmp_path / "out")

"""Tables become pairs by their columns: the same ones from every kind of file, with images where they lie."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair, Side
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import read_evaluation
from megatron_llave.prepare import columns, stored_images, tables
from megatron_llave.prepare.own_pairs import Options
from megatron_llave.prepare.stored_images import TableCell

ALONE = Options(workers=1)
FIELDS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The type of an image in files of the package datasets."""


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def stored(number: int | None) -> dict[str, Any] | None:
    return None if number is None else {"bytes": png(number), "path": f"{number}.png"}


def made(*sources: str | Path, **options: Any) -> list[Pair]:
    """The pairs that are made of sources."""
    shutil.rmtree("out", ignore_errors=True)
    columns.prepare(sources, "out", **{"options": ALONE} | options)
    return [pair for shard in sorted(Path("out").glob("*.tar")) for pair in read_shard(shard)]


def shown(pairs: list[Pair]) -> list[tuple]:
    """What pairs are, without their keys."""
    sides = [(pair.query, *pair.targets, *pair.hard_negatives) for pair in pairs]
    return [([(side.text, side.images) for side in some], pair.scores) for some, pair in zip(sides, pairs)]


def report() -> list[tuple[str, str, str]]:
    lines = map(json.loads, Path("out/report.jsonl").read_text().splitlines())
    return [(line["row"], line["reason"], line["detail"]) for line in lines]


# ---- kinds of files ----

TRIPLETS = [{"anchor": f"question {n}", "positive": f"answer, {n}", "negative": f"wrong {n}"} for n in range(5)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        kind = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with kind(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.name == "list.json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FILES = ["t.parquet", "file.arrow", "stream.arrow", "t.csv", "t.tsv", "t.jsonl", "lines.json", "list.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_table_gives_the_same_pairs(name: str) -> None:
    write_rows(Path(name), TRIPLETS)
    pairs = made(name)
    sides = [(row["anchor"], row["positive"], row["negative"]) for row in TRIPLETS]
    assert shown(pairs) == [([(text, []) for text in texts], []) for texts in sides]
    assert pairs[1].subset == Path(name).stem and len({pair.key for pair in pairs}) == 5
    assert shown(made(name, columns=["query=positive", "target=anchor"])) == [
        ([(answer, []), (question, [])], []) for question, answer, _ in sides
    ]
    assert shown(made(name, limit=2)) == shown(pairs)[:2]


@pytest.mark.parametrize("kind", ["parquet", "saved", "dictionary"])
def test_data_sets_of_hugging_face(kind: str) -> None:
    """Written by the package itself, with images inside, and read without it."""
    datasets = pytest.importorskip("datasets")
    features = {"text": datasets.Value("string"), "image": datasets.Image(), "more": [datasets.Image()]}
    features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    rows = {
        "text": [f"caption {n}" for n in range(9)],
        "image": [stored(n) for n in range(9)],
        "more": [[stored(n + 20 * m) for m in range(n % 3)] for n in range(9)],
        "label": [n % 2 for n in range(9)],
    }
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    if kind == "parquet":
        data.to_parquet("photos.parquet", batch_size=4)
        source = "photos.parquet"
    else:
        source = "photos"
        shorter = datasets.DatasetDict(train=data, test=data.select(range(2)))
        (data if kind == "saved" else shorter).save_to_disk(source)
    sides = [[(f"caption {n}", []), ("", [png(n)])] for n in range(9)]
    assert shown(made(source)) == [(some, []) for some in sides]  # by the names of the columns
    with_more = made(source, columns=["query=more", "query_image=image", "target=label"], meta_task="classification")
    images = [[*(png(n + 20 * m) for m in range(n % 3)), png(n)] for n in range(9)]
    assert shown(with_more) == [([("", images[n]), (["cat", "dog"][n % 2], [])], []) for n in range(9)]
    with pytest.raises(
        DataError, match=r"column 'label' has classes \(cat, dog\), which are no scores; name the columns"
    ):
        made(source, columns=["query=text", "target=image", "score=label"])
    if kind == "dictionary":
        assert len(made(source, split="test")) == 2
        with pytest.raises(ConfigError, match="split dev is not there: the splits of photos are train, test"):
            made(source, split="dev")


def test_a_folder_of_parts_is_read_in_order_and_must_be_complete() -> None:
    Path("data").mkdir()
    for number in range(3):
        write_rows(Path(f"data/train-{number:05d}-of-00003.parquet"), TRIPLETS[number : number + 1])
    write_rows(Path("data/test-00000-of-00001.parquet"), TRIPLETS)
    assert [side[0][0][0] for side in shown(made("."))] == ["question 0", "question 1", "question 2"]
    assert len(made("data/test-*.parquet")) == len(made("data", split="test")) == 5
    Path("cache").mkdir()
    for name in ("json-train.parquet", "json-test.parquet", "00000_stats.json", "dataset_info.json"):
        write_rows(Path("cache", name), TRIPLETS[:2] if "train" in name else TRIPLETS)
    assert {pair.subset for pair in made("cache")} == {"json-train"} and len(made("cache")) == 2
    Path("data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet is missing; complete the download"):
        made("data")


# ---- columns ----


def test_equal_names_in_different_folders_are_different_subsets() -> None:
    for name in ("en/x", "de/x", "de/data/train-00000-of-00002", "de/data/train-00001-of-00002", "fr/de/train"):
        Path(f"{name}.csv").parent.mkdir(parents=True, exist_ok=True)
        write_rows(Path(f"{name}.csv"), [{"query": name, "target": name}])
    made_of = columns.prepare(["en/x.csv", "de/x.csv", *map(str, Path("de").rglob("train*.csv"))], "o", options=ALONE)
    sizes = {name: subset.pairs for name, subset in made_of.index.subsets.items()}
    assert sizes == {"en-x": 1, "de-x": 1, "de": 2}, "parts of one table are one subset"
    made_of = columns.prepare(["de/data/train-00000-of-00002.csv", "fr/de/train.csv"], "p", options=ALONE)
    assert list(made_of.index.subsets) == ["fr-de", columns.clean_name(f"{Path.cwd().name}-de")], "sorted"
    made_of = columns.prepare(["en/x.csv", "de/x.csv"], "q", subset="one", options=ALONE)
    assert list(made_of.index.subsets) == ["one"]


def test_images_lie_in_the_table_or_beside_it_and_equal_ones_are_equal_targets() -> None:
    Path("images").mkdir()
    Path("images/7.png").write_bytes(png(7))
    rows = [
        {"query": "<image> in blue", "picture": stored(1), "target": None, "found": stored(2)},
        {"query": "a text", "picture": None, "target": "with words", "found": {"bytes": None, "path": "7.png"}},
        {"query": "", "picture": stored(3), "target": "", "found": stored(2)},
        {"query": "another", "picture": None, "target": "", "found": stored(4)},
    ]
    schema = pa.schema([("query", pa.string()), ("picture", FIELDS), ("target", pa.string()), ("found", FIELDS)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), "t.parquet")
    roles = ["query=query", "query_image=picture", "target=target", "target_image=found"]
    prompts = Options(workers=1, query_prompt="Find it: ", target_prompt="Represent <image>.")
    pairs = made("t.parquet", columns=roles, images="images", options=prompts)
    assert shown(pairs) == [
        ([("<image> Find it: in blue", [png(1)]), ("Represent \\<image>.", [png(2)])], []),
        ([("Find it: a text", []), ("Represent \\<image>.with words", [png(7)])], []),
        ([("Find it: ", [png(3)]), ("Represent \\<image>.", [png(2)])], []),
        ([("Find it: another", []), ("Represent \\<image>.", [png(4)])], []),
    ]
    assert pairs[0].target_id == pairs[2].target_id
    assert len({pair.target_id for pair in pairs}) == 3 and len({pair.query_id for pair in pairs}) == 4


def test_lists_are_several_targets_and_negatives_and_scores_are_one_for_each() -> None:
    rows = [
        {"query": "a", "positive": ["b", "c"], "negative_10": "z", "negative_2": "y", "score": [3, 2, 1, 0]},
        {"query": "d", "positive": ["e"], "negative_10": None, "negative_2": "y", "score": [0.5, 0, -1]},
        {"query": "f", "positive": ["g"], "negative_10": "z", "negative_2": "", "score": None},
    ]
    write_rows(Path("t.jsonl"), [{"query": "0", "positive": "1"}, *rows])  # a line need not have all keys
    assert shown(made("t.jsonl")) == [
        ([("0", []), ("1", [])], []),
        ([("a", []), ("b", []), ("c", []), ("y", []), ("z", [])], [3, 2, 1, 0]),
        ([("d", []), ("e", []), ("y", [])], [0.5, 0]),
        ([("f", []), ("g", []), ("z", [])], []),
    ]


def test_both_a_text_and_an_image_in_one_column() -> None:
    """As sentence-transformers takes them; a binary column is one of images too."""
    both = pa.struct([("text", pa.string()), ("image", FIELDS)])
    rows = [{"anchor": {"text": "t", "image": stored(1)}, "positive": png(2)}, {"anchor": None, "positive": png(3)}]
    schema = pa.schema([("anchor", both), ("positive", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), "t.parquet")
    assert shown(made("t.parquet")) == [([("t", [png(1)]), ("", [png(2)])], [])]
    assert report() == [("t.parquet, row 1", "empty side", "query: neither text nor image")]
    both = {"anchor": {"text": "t", "image": "1.png"}, "positive": {"path": "2.png"}}
    for number in (1, 2):
        Path(f"{number}.png").write_bytes(png(number))
    write_rows(Path("t.jsonl"), [both])
    assert shown(made("t.jsonl")) == [([("t", [png(1)]), ("", [png(2)])], [])]


def test_graded_pairs_of_sentences() -> None:
    write_rows(Path("stsb.csv"), [{"id": 3, "sentence1": "a", "sentence2": "b", "score": 0.25}])
    made_of = columns.prepare(["stsb.csv"], "new", options=ALONE)
    used, scores = made_of.remarks
    assert used == "columns of stsb: query=sentence1 target=sentence2 score=score; not used: id"
    assert scores.startswith("scores of stsb: only data.subsets.NAME.objective: cosent and loss.soft_labels: scores")
    assert shown(made("stsb.csv")) == [([("a", []), ("b", [])], [0.25])]


def test_rows_that_are_no_pairs_are_counted_and_named() -> None:
    good = {"query": "q", "positive": "p", "negative": ["n"], "score": None}
    bad = [
        ({"positive": 7}, "column 'positive' has 7, but target must be a text, an image, or a list of them"),
        ({"query": ["a", "b"]}, "the query is a list of 2 texts; it must be one"),
        ({"score": [1]}, "there are 1 scores for 1 targets and 1 hard negatives; give one for each"),
        ({"score": "high"}, "the score 'high' must be a number from -1e"),
        ({"query": {"text": "<image>", "image": []}}, None),  # a literal <image>
        ({"query": {"text": "<image> <image>", "image": "x.png"}}, "2 image placeholders for 1 images"),
    ]
    write_rows(Path("t.jsonl"), [good, *(good | {"query": f"q{n}"} | row for n, (row, _) in enumerate(bad)), good])
    pairs = made("t.jsonl")
    assert [pair.query.text for pair in pairs] == ["q", "\\<image>", "q"]
    expected = [(f"t.jsonl:{line}", detail) for line, (_, detail) in enumerate(bad, start=2) if detail]
    assert [(row, reason) for row, reason, _ in report()] == [(row, "row is no pair") for row, _ in expected]
    assert all(detail in found for (_, detail), (*_, found) in zip(expected, report()))


def test_images_that_cannot_be_used_are_counted() -> None:
    rows = [
        {"query": "a", "positive": stored(1)},
        {"query": "b", "positive": {"bytes": b"no image", "path": None}},
        {"query": "c", "positive": {"bytes": None, "path": "gone.png"}},
        {"query": "d", "positive": {"bytes": None, "path": "https://host/x.png"}},
        {"query": "e", "positive": {"bytes": None, "path": None}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    assert len(made("t.parquet")) == 1
    reasons = ["corrupt image", "missing image", "image is a URL", "missing image"]
    assert [(row, reason) for row, reason, _ in report()] == [
        (f"t.parquet, row {row}", reason) for row, reason in enumerate(reasons, start=1)
    ]
    assert "t.parquet: row 1 of group 0, column positive" in report()[0][2]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"id": 1, "text_a": "x"}],
            {},
            "t.parquet: which column is the query and .* id, text_a; say it with --columns",
        ),
        ([{"anchor": "a", "query": "b", "positive": "c"}], {}, "anchor and query could both be the query"),
        ([{"a": "x", "b": 1}], {"columns": ["query=a", "target=b"]}, "column 'b' is of type number, but target must"),
        ([{"a": "x"}], {"columns": ["query=a", "target=c"]}, "has no column 'c'; its columns are a"),
        ([{"a": "x"}], {"columns": ["query=a"]}, "--columns names no target"),
        ([{"a": "x"}], {"columns": ["anchor=a"]}, "--columns anchor=a: give ROLE=COLUMN, with one of the roles query"),
        ([{"a": "x"}], {"columns": ["query=a", "query=b"]}, "query can be one column, not a and b"),
        ([{"anchor": "x", "positive": "y"}], {"limit": 0}, "--limit 0 must be at least 1"),
        ([{"anchor": "x", "positive": "y"}], {"subset": "a b"}, "--set subset='a b' must be"),
        ([{"anchor": "x", "positive": "y"}], {"meta_task": "x"}, "--set meta_task='x' is not one of"),
    ],
)
def test_what_cannot_be_is_refused(rows: list[dict], options: dict[str, Any], message: str) -> None:
    write_rows(Path("t.parquet"), rows)
    with pytest.raises((ConfigError, DataError), match=message):
        made("t.parquet", **options)
    assert not Path("out").exists()


def test_no_row_is_a_pair() -> None:
    write_rows(Path("t.jsonl"), [{"query": 1, "positive": "p"}] * 3)
    with pytest.raises(DataError, match="t.jsonl:1: column 'query' has 1, but .*; no row of the source is a pair"):
        made("t.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone", "--source gone is no file, no folder, and no pattern"),
        ("a.txt", "a.txt is no table: the name must end in .parquet"),
        ("empty", "empty holds no .parquet, .arrow"),
        ("mixed", "mixed holds tables that end in .csv and in .jsonl; name the files"),
        ("escapes", "names '../x.arrow' as a data file, not a file of its folder"),
        ("selection", "rows are listed apart"),
        ("outside", "outside/dataset_dict.json must list its own folders as splits"),
        ("splits", "no split is chosen .--set split=NAME, .* the splits of splits are a, b"),
        ("blank.csv", "blank.csv is empty: it has no columns"),
        ("broken.parquet", "broken.parquet cannot be read"),
        ("broken.arrow", "broken.arrow cannot be read"),
    ],
)
def test_sources_that_cannot_be_read(source: str, message: str) -> None:
    for name in ("empty", "mixed", "escapes", "selection", "splits", "outside"):
        Path(name).mkdir()
    Path("outside/dataset_dict.json").write_text('{"splits": ["../mixed"]}')
    Path("splits/dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    Path("blank.csv").write_text("\n")
    for name in ("a.txt", "mixed/a.csv", "mixed/b.jsonl", "broken.parquet", "broken.arrow"):
        Path(name).write_text("anchor,positive\n")
    Path("escapes/state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    state = {"_data_files": [{"filename": "x.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}
    Path("selection/state.json").write_text(json.dumps(state))
    with pytest.raises((ConfigError, DataError), match=message):
        made(source)


# ---- memory, held-out sets, resuming ----


def test_images_are_read_where_they_lie_and_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the bytes of an image nor a whole row group are in memory, and a row group is not read again."""
    rows = [{"anchor": f"q{n}", "positive": stored(n % 50)} for n in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet", row_group_size=100)
    table = tables.open_table(Path("t.parquet"))
    cells = [row["positive"] for _, row in tables.read_rows(table, ["positive"])]
    assert cells[150] == TableCell("t.parquet", ("positive",), 1, 50)
    starts = []
    monkeypatch.setattr(
        stored_images, "read_batches", lambda *a, read=stored_images.read_batches: starts.append(a[2]) or read(*a)
    )
    assert [cell.read() for cell in cells] == [png(n % 50) for n in range(200)] and starts == [0, 1]
    assert cells[3].read() == png(3) and starts == [0, 1, 0], "behind what has been read"


def test_held_out_pairs_share_no_image_with_training_and_an_interrupted_run_resumes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"anchor": f"caption {n}", "positive": stored(n % 20)} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet", row_group_size=7)
    monkeypatch.setattr("megatron_llave.prepare.own_pairs.PAIRS_PER_SHARD", 10)
    options = Options(held_out=0.2, workers=1)
    pairs = made("t.parquet", options=options)
    inputs, _ = read_evaluation("out")
    trained = {bytes(image) for pair in pairs for image in pair.target.images}
    held_out = {bytes(image) for side in inputs.values() for image in side.images}
    assert len(pairs) == 32 and len(held_out) == 4 and not trained & held_out
    files = {path: path.read_bytes() for path in sorted(Path("out").glob("*.tar"))}

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("shards", 2):
            raise KeyboardInterrupt

    shutil.rmtree("out")
    with pytest.raises(KeyboardInterrupt):
        columns.prepare(["t.parquet"], "out", options=options, progress=stop)
    first = sorted(Path("out").glob("*.tar"))[0]
    before = first.stat().st_mtime_ns
    columns.prepare(["t.parquet"], "out", options=options)
    assert first.stat().st_mtime_ns == before, "a finished shard is kept"
    assert {path: path.read_bytes() for path in sorted(Path("out").glob("*.tar"))} == files


@pytest.mark.slow
def test_workers_do_not_change_the_bytes() -> None:
    """The images are read in other processes."""
    rows = [{"anchor": f"caption {n}", "positive": stored(n)} for n in range(1500)]
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet", row_group_size=400)
    made("t.parquet")
    files = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    made("t.parquet", options=Options(workers=2))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()} == files
    assert len([name for name in files if name.endswith(".tar")]) == 2


def test_side_of_a_pair_is_what_the_row_says() -> None:
    """A prompt alone is no input: a missing side stays missing."""
    write_rows(Path("t.jsonl"), [{"query": "", "positive": "p"}, {"query": "q", "positive": "p"}])
    pairs = made("t.jsonl", options=Options(workers=1, query_prompt="find: "))
    assert [pair.query for pair in pairs] == [Side("find: q", [])]
    assert report() == [("t.jsonl:1", "empty side", "query: neither text nor image")]

"""Evaluation of tasks: the official scores, ties, what is repeated after a stop, and what is refused."""

import json
import math
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forking import ROOT, fork, run_script
from golden_mmeb import GOLDEN, IDENTITY, GoldenEmbedder, assert_released_files, golden_rows, golden_tasks
from golden_model import ONEVISION, byte_tokenizer
from PIL import Image

from megatron_llave.config.load import config_from_dict
from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding import cache
from megatron_llave.embedding.cache import CachedEmbedder, EmbeddingCache
from megatron_llave.embedding.embedder import LoadedModel, embed_parts
from megatron_llave.embedding.inputs import Input
from megatron_llave.errors import ConfigError, DataError, NotFiniteError
from megatron_llave.evaluation.benchmarks.mmeb import read_task
from megatron_llave.evaluation.evaluate import build_evaluation, evaluate_tasks
from megatron_llave.evaluation.ranking import hub_share, uniformity
from megatron_llave.evaluation.scoring import score_task
from megatron_llave.evaluation.task import SetResult, build_task
from megatron_llave.models import build_model, build_processor
from megatron_llave.report import montage
from megatron_llave.train import montages
from megatron_llave.training.logger import RunLog

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts hold a few inputs each."""
    monkeypatch.setattr(cache, "PART_COST", 20)


def task_of(lists: list[list[str]], name: str = "made up"):
    """A query "q0", "q1", ... for each list of candidates' texts."""
    rows = [(Input(f"q{i}"), [Input(text) for text in texts]) for i, texts in enumerate(lists)]
    return build_task(name, "retrieval", "ind", rows, ".")


def scored(lists, vectors: dict[str, list[float]], groups, ties: str = "first") -> SetResult:
    task = task_of(lists)
    rows = np.array([vectors[entry.text] for entry in task.inputs.entries], np.float32)
    return score_task(task, rows.__getitem__, ties, groups.dp)


def test_golden_sets_give_the_released_files(groups, tmp_path):
    tasks = golden_tasks()
    assert [task.name for task in tasks] == ["ImageNet-1K", "CIRR", "MSCOCO_t2i", "RefCOCO-Matching"]
    done = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    assert_released_files(tmp_path)
    assert [result.precision_at_1 for result in done.results] == [75.0, 100.0, 75.0, 75.0]
    assert {result.name: result.num_ties for result in done.results}["RefCOCO-Matching"] == 3


def test_strict_ties_count_as_wrong(groups, tmp_path):
    done = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), golden_tasks(), "strict")
    assert {result.name: result.precision_at_1 for result in done.results}["RefCOCO-Matching"] == 37.5
    score = json.loads((tmp_path / "RefCOCO-Matching_score.json").read_text())
    assert score == {"acc": 0.375, "num_correct": 3, "num_pred": 8}
    # The same folder scored the other way: no embedding is done again.
    again = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), golden_tasks(), "first")
    assert (again.num_finished, again.num_embedded) == (0, 0)
    assert_released_files(tmp_path)


def test_ties_duplicates_and_single_candidates(groups):
    vectors = {"q0": [1, 0], "q1": [1, 0], "q2": [0, 1], "q3": [0, 1], "a": [1, 0], "b": [1, 0], "c": [0, 1]}
    lists = [["a", "b", "c"], ["a", "c", "a"], ["a", "c"], ["c"]]  # a tie; the right one twice; wrong; alone
    first, strict = scored(lists, vectors, groups), scored(lists, vectors, groups, "strict")
    assert (first.precision_at_1, strict.precision_at_1) == (75.0, 50.0)
    assert first.positive == [1, 1, 0, 1] and first.hardest_negative == [1, 0, 1, -math.inf]
    assert first.num_ties == strict.num_ties == 1
    assert first.chance == pytest.approx(np.mean([100 / 3, 100 / 3, 50, 100]))
    named = [[first.candidates[index].split()[-1] if index >= 0 else None for index in row] for row in first.top]
    assert named == [
        ["a", "b", "c", None, None],
        ["a", "a", "c", None, None],
        ["c", "a", None, None, None],
        ["c", None, None, None, None],
    ]
    assert [first.candidates[index].split()[-1] for index in first.positives] == ["a", "a", "a", "c"]
    assert first.hub_share == 50.0 and first.alignment == pytest.approx(0.5)


def test_random_lists_are_ranked_as_numpy_ranks_them(groups):
    rng = np.random.default_rng(0)
    names = [f"c{number}" for number in range(50)]
    vectors = {name: rng.normal(size=8) for name in names + [f"q{i}" for i in range(30)]}
    vectors = {name: (v / np.linalg.norm(v)).astype(np.float32) for name, v in vectors.items()}
    lists = [rng.choice(names, rng.integers(1, 20), replace=False).tolist() for _ in range(30)]
    result = scored(lists, vectors, groups)
    products = [[float(vectors[f"q{i}"] @ vectors[c]) for c in chosen] for i, chosen in enumerate(lists)]
    assert result.precision_at_1 == pytest.approx(100 * np.mean([np.argmax(p) == 0 for p in products]))
    assert result.positive == pytest.approx([p[0] for p in products], abs=1e-6)
    assert result.hardest_negative == pytest.approx([max(p[1:], default=-np.inf) for p in products], abs=1e-6)


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_after_a_stop_nothing_is_embedded_twice(groups, tmp_path, stop_after):
    tasks = golden_tasks()
    first, second = GoldenEmbedder(stop_after=stop_after), GoldenEmbedder()
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(CachedEmbedder(first, tmp_path, IDENTITY, groups.dp), tasks, "first")
    done = evaluate_tasks(CachedEmbedder(second, tmp_path, IDENTITY, groups.dp), tasks, "first")
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == sum(len(task.inputs) for task in tasks)
    assert done.num_embedded == len(second.asked)
    assert_released_files(tmp_path)


def test_a_finished_set_is_only_read(groups, tmp_path):
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), golden_tasks()[:2], "first")
    shutil.rmtree(tmp_path / "embeddings")
    second = GoldenEmbedder()
    done = evaluate_tasks(CachedEmbedder(second, tmp_path, IDENTITY, groups.dp), golden_tasks(), "first")
    assert done.num_finished == 2 and {name.split()[0] for name in second.asked} == {"MSCOCO_t2i", "RefCOCO-Matching"}
    assert_released_files(tmp_path)


def test_a_damaged_part_is_embedded_again(groups, tmp_path):
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), golden_tasks(), "first")
    part = tmp_path / "embeddings" / "CIRR" / "part-00000.npy"
    part.write_bytes(part.read_bytes()[:-1])
    (tmp_path / "CIRR_score.json").unlink()
    second = GoldenEmbedder()
    done = evaluate_tasks(CachedEmbedder(second, tmp_path, IDENTITY, groups.dp), golden_tasks(), "first")
    assert 0 < done.num_embedded == len(second.asked) < 15
    assert_released_files(tmp_path)


def test_another_models_embeddings_are_refused(groups, tmp_path):
    tasks = golden_tasks()[:1]
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    other = {"weights": "others"}
    message = f"another model .weights 'golden' there, 'others' here.; choose another --out, or delete {tmp_path} to"
    with pytest.raises(DataError, match=message):
        evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, other, groups.dp), tasks, "first")
    (tmp_path / "ImageNet-1K_score.json").unlink()
    with pytest.raises(
        DataError, match=rf"manifest\.json is of another model .*delete {tmp_path}/embeddings/ImageNet-1K"
    ):
        evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, other, groups.dp), tasks, "first")


def test_embeddings_of_other_inputs_are_refused(groups, tmp_path):
    EmbeddingCache(tmp_path / "embeddings" / "CIRR", task_of([["a"]]).inputs).claim(IDENTITY)
    tasks = [task for task in golden_tasks() if task.name == "CIRR"]
    with pytest.raises(DataError, match="embeddings of other inputs than those of data set CIRR"):
        evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")


def test_a_damaged_result_is_made_again_and_a_damaged_manifest_named(groups, tmp_path):
    tasks = golden_tasks()[:1]
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    before = (tmp_path / "ImageNet-1K_result.json").read_bytes()
    (tmp_path / "ImageNet-1K_result.json").write_text("{")
    done = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    assert (done.num_finished, done.num_embedded) == (0, 0)
    assert (tmp_path / "ImageNet-1K_result.json").read_bytes() == before
    (tmp_path / "embeddings" / "ImageNet-1K" / "manifest.json").write_text("{")
    (tmp_path / "ImageNet-1K_score.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json is not valid JSON .*or delete .*ImageNet-1K to embed again"):
        evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")


def test_an_incomplete_result_is_made_again(groups, tmp_path):
    tasks = golden_tasks()[:1]
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    path = tmp_path / "ImageNet-1K_result.json"
    whole = json.loads(path.read_text())
    cut = {key: value for key, value in whole["result"].items() if key != "top"}
    short = {**whole["result"], "top": whole["result"]["top"][1:]}
    without_model = {key: value for key, value in whole.items() if key != "model"}
    better = {**whole["result"], "precision_at_1": 100.0}
    for broken in (
        without_model,
        {**whole, "result": better},
        {**whole, "result": cut},
        {**whole, "result": short},
        {**whole, "result": None},
    ):
        path.write_text(json.dumps(broken))
        done = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
        assert (done.num_finished, done.num_embedded) == (0, 0)
        assert json.loads(path.read_text()) == whole


def test_other_right_candidates_are_scored_again_without_embedding(groups, tmp_path):
    """The inputs are the same ones: only which is whose candidate, and right, has changed."""
    task = [task for task in golden_tasks() if task.name == "ImageNet-1K"]
    first = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path / "out", IDENTITY, groups.dp), task, "first")
    # The last query first, with the candidates of the last in reverse, and so on.
    bounds = len(task[0].candidates) - task[0].bounds[::-1]
    candidates = task[0].candidates[::-1]
    right = candidates[bounds[:-1]]
    turned = [replace(task[0], queries=task[0].queries[::-1], candidates=candidates, right=right, bounds=bounds)]
    assert turned[0].inputs.digest == task[0].inputs.digest and turned[0].digest != task[0].digest
    again = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path / "out", IDENTITY, groups.dp), turned, "first")
    assert (again.num_finished, again.num_embedded) == (0, 0)
    fresh = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path / "fresh", IDENTITY, groups.dp), turned, "first")
    assert again.results == fresh.results and again.results != first.results


def test_parts_with_changed_pictures_are_embedded_again(groups, tmp_path, caplog):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(GOLDEN, source)
    tasks = [read_task(source, source, name) for name in ("CIRR", "ImageNet-1K")]
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), out, IDENTITY, groups.dp), tasks, "first")
    assert evaluate_tasks(CachedEmbedder(GoldenEmbedder(), out, IDENTITY, groups.dp), tasks, "first").num_finished == 2
    image = source / "CIRR" / "t3.png"
    os.utime(image, ns=(0, 12345))
    second = GoldenEmbedder()
    done = evaluate_tasks(CachedEmbedder(second, out, IDENTITY, groups.dp), tasks, "first")
    store = EmbeddingCache(out / "embeddings" / "CIRR", tasks[0].inputs)
    changed = [part for part in map(store.inputs_of, range(store.num_parts)) if any("t3.png" in key for key in part)]
    assert done.num_finished == 1 and second.asked == [key for part in changed for key in part] != []
    assert len(changed) < store.num_parts
    assert f"{len(changed)} of {store.num_parts} parts of {store.folder} are embedded again" in caplog.text
    third = GoldenEmbedder()
    assert (
        evaluate_tasks(CachedEmbedder(third, out, IDENTITY, groups.dp), tasks, "first").num_finished == 2
        and third.asked == []
    )
    image.unlink()
    with pytest.raises(DataError, match=r"CIRR: .*t3\.png does not exist, 1 of \d+ files .* that --images names"):
        evaluate_tasks(CachedEmbedder(third, out, IDENTITY, groups.dp), tasks, "first")


def test_parts_without_a_manifest_are_refused(groups, tmp_path):
    tasks = golden_tasks()[:1]
    evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    folder = tmp_path / "embeddings" / "ImageNet-1K"
    (folder / "manifest.json").unlink()
    (tmp_path / "ImageNet-1K_score.json").unlink()
    with pytest.raises(DataError, match=rf"{folder} holds embeddings but no manifest.json.*or delete {folder} to"):
        evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, {"weights": "others"}, groups.dp), tasks, "first")


def test_a_folder_that_cannot_be_made_is_named(groups, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/embeddings/ImageNet-1K cannot be made: Not a directory; choose another"):
        evaluate_tasks(
            CachedEmbedder(GoldenEmbedder(), tmp_path / "file", IDENTITY, groups.dp), golden_tasks(), "first"
        )


def test_a_missing_picture_is_found_before_any_work(groups, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    (source / "CIRR" / "t3.png").unlink()
    embedder = GoldenEmbedder()
    with pytest.raises(DataError, match=r"CIRR: .*t3\.png does not exist"):
        evaluate_tasks(
            CachedEmbedder(embedder, tmp_path / "out", IDENTITY, groups.dp),
            [read_task(source, source, "CIRR")],
            "first",
        )
    assert embedder.asked == []


def test_a_full_disk_is_one_line_and_leaves_no_part(groups, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(DataError, match=r"part-00000\.npy cannot be written: No space left on device"):
        evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), golden_tasks(), "first")
    assert [path.name for path in tmp_path.rglob("part-*")] == []


def test_an_embedding_that_is_not_finite_is_named_and_not_stored(groups, tmp_path):
    def broken(parts):
        for part in parts:
            rows = golden_rows(part)
            if part.name == "CIRR":
                rows[1, 3] = math.nan
            yield rows

    tasks = golden_tasks()
    with pytest.raises(NotFiniteError, match=r"input CIRR 1 .* has no finite embedding .1 of \d+ inputs"):
        evaluate_tasks(CachedEmbedder(broken, tmp_path, IDENTITY, groups.dp), tasks, "first")
    assert list((tmp_path / "embeddings" / "CIRR").glob("part-*")) == []
    done = evaluate_tasks(CachedEmbedder(GoldenEmbedder(), tmp_path, IDENTITY, groups.dp), tasks, "first")
    assert 0 < done.num_embedded < done.num_inputs


def test_stored_rows_come_back_in_any_order(tmp_path):
    task = task_of([[f"text {number}" for number in range(100)]])
    store = EmbeddingCache(tmp_path, task.inputs)
    rows = np.random.default_rng(0).normal(size=(len(task.inputs), 8)).astype(np.float32)
    assert store.num_parts > 3 and store.missing() == list(range(store.num_parts))
    for part in range(store.num_parts):
        store.write(part, rows[store.bounds[part] : store.bounds[part + 1]])
    chosen = np.random.default_rng(1).integers(0, len(rows), 300)
    np.testing.assert_array_equal(EmbeddingCache(tmp_path, task.inputs).rows(chosen), rows[chosen])


@pytest.mark.parametrize("harm", ["bit", "nan", "npz", "header", "width", "cut", "checksum"])
def test_a_changed_part_is_embedded_again(tmp_path, harm):
    task = task_of([[f"text {number}" for number in range(100)]])
    store = EmbeddingCache(tmp_path, task.inputs)
    rows = np.random.default_rng(0).normal(size=(len(task.inputs), 8)).astype(np.float32)
    for part in range(store.num_parts):
        store.write(part, rows[store.bounds[part] : store.bounds[part + 1]])
    path = tmp_path / "part-00001.npy"
    content = bytearray(path.read_bytes())
    if harm == "bit":
        content[200] ^= 1
    elif harm == "nan":
        content[128:132] = np.float32(np.nan).tobytes()
    elif harm == "header":
        content[20:40] = b"(" * 20
    elif harm == "cut":
        content = content[:-40]
    elif harm == "checksum":
        content[-1] ^= 1
    elif harm == "width":
        store.write(1, rows[store.bounds[1] : store.bounds[2], :4])
        content = bytearray(path.read_bytes())
    elif harm == "npz":
        np.savez(tmp_path / "other.npz", rows)
        content = bytearray((tmp_path / "other.npz").read_bytes())
    path.write_bytes(content)
    assert EmbeddingCache(tmp_path, task.inputs).missing() == [1]


def test_parts_of_earlier_versions_have_no_checksum_and_are_read_if_finite(tmp_path):
    task = task_of([["a", "b"]])
    store = EmbeddingCache(tmp_path, task.inputs)
    rows = np.ones((len(task.inputs), 4), np.float32)
    np.save(tmp_path / "part-00000.npy", rows)
    assert store.missing() == [] and (store.rows(np.array([0])) == 1).all()
    rows[1, 2] = np.inf
    np.save(tmp_path / "part-00000.npy", rows)
    assert EmbeddingCache(tmp_path, task.inputs).missing() == [0]


def test_folders_with_checksums_take_no_part_without_one(tmp_path, monkeypatch, caplog):
    """The manifest says that all parts have checksums; that of an earlier version does not."""
    task = task_of([[f"text {number}" for number in range(100)]])
    rows = np.random.default_rng(0).normal(size=(len(task.inputs), 8)).astype(np.float32)

    def fill(folder: Path) -> EmbeddingCache:
        store = EmbeddingCache(folder, task.inputs)
        store.claim({"weights": "w"})
        for part in store.missing():
            store.write(part, rows[store.bounds[part] : store.bounds[part + 1]])
        return store

    store = fill(tmp_path / "new")
    np.save(tmp_path / "new/part-00001.npy", store.rows(np.arange(store.bounds[1], store.bounds[2])) * 2)
    assert EmbeddingCache(tmp_path / "new", task.inputs).missing() == [1]
    assert (
        "1 of 6 parts of" in caplog.text and "damaged or changed and are embedded again; 1 is the first" in caplog.text
    )
    store = fill(tmp_path / "new")  # the folder is claimed again and stays one with checksums
    assert EmbeddingCache(tmp_path / "new", task.inputs).missing() == []
    manifest = json.loads((tmp_path / "new/manifest.json").read_text())
    assert manifest.pop("checksums") == "sha256"
    (tmp_path / "new/manifest.json").write_text(json.dumps(manifest))
    np.save(tmp_path / "new/part-00001.npy", rows[store.bounds[1] : store.bounds[2]])
    assert fill(tmp_path / "new").missing() == [], "a folder of an earlier version"
    assert "checksums" not in json.loads((tmp_path / "new/manifest.json").read_text())
    # Few parts are open at a time, and one of another width is named.
    monkeypatch.setattr(cache, "OPEN_PARTS", 2)
    store = EmbeddingCache(tmp_path / "new", task.inputs)
    chosen = np.random.default_rng(0).permutation(len(task.inputs))
    np.testing.assert_array_equal(store.rows(chosen), rows[chosen])
    assert len(store._opened) == 2
    store.write(0, rows[: store.bounds[1], :4])
    store._opened.clear()
    with pytest.raises(DataError, match="part-00001.npy have 8 numbers and not 4 as others do; delete"):
        store.rows(chosen)


def test_a_part_that_does_not_come_is_an_error_and_a_late_one_is_not(tmp_path, monkeypatch):
    task = task_of([["a"]])
    store = EmbeddingCache(tmp_path, task.inputs)
    monkeypatch.setattr(cache, "WAITS", (0, 0))
    with pytest.raises(DataError, match=r"part-00000\.npy is missing; all nodes must share the folder of --out"):
        store.rows(np.array([0]))
    rows = np.ones((2, 4), np.float32)
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: seconds and store.write(0, rows))
    monkeypatch.setattr(cache, "WAITS", (0, 1))
    np.testing.assert_array_equal(store.rows(np.array([1, 0])), rows)


@pytest.mark.slow
def test_kill_and_restart_of_the_tool(tmp_path):
    """kill -9 in the middle of embedding: the second start embeds the rest, with an uninterrupted one's result."""
    source = tmp_path / "data"
    make_data_set(source, num_texts=2500)
    common = [str(ROOT / "tools" / "evaluate.py"), "mmeb", "--checkpoint", str(ONEVISION)]
    common += ["--data", str(source), f"data.tokenizer={byte_tokenizer(tmp_path)}"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = fork([*common, "--out", str(killed)], (os.devnull, os.devnull), {})
    deadline = time.monotonic() + 200
    while len(list(killed.rglob("part-*.npy"))) < 3:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    before = sum(len(np.load(path)) for path in killed.rglob("part-*.npy"))
    for out in (killed, whole):
        done = run_script(*common, "--out", out)
        assert done.returncode == 0, done.stderr[-3000:]
    work = json.loads((killed / "report.json").read_text())["work"]
    assert 0 < before < work["inputs"] and work["inputs_embedded"] == work["inputs"] - before
    for name in ("VOC2007_result.json", "VOC2007_pred.txt", "VOC2007_score.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert (killed / "report.html").stat().st_size > 10000


def make_data_set(folder: Path, num_texts: int) -> None:
    """VOC2007 with eight pictures, and so many different labels in all that there are many parts."""
    (folder / "VOC2007").mkdir(parents=True)
    rows = []
    for number in range(8):
        (folder / f"{number}.png").write_bytes((GOLDEN / "ImageNet-1K" / f"{number}.png").read_bytes())
        labels = [f"label {index}" for index in range(number, num_texts, 8)]
        query = {"qry_text": "<|image_1|>\nIdentify the object shown in the image.", "qry_img_path": f"{number}.png"}
        rows.append({**query, "tgt_text": labels, "tgt_img_path": [""] * len(labels)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "VOC2007" / "test-00000-of-00001.parquet")


def test_uniformity_and_hubs():
    points = torch.eye(3)
    assert uniformity(points) == pytest.approx(-4.0)  # every squared distance is 2
    assert uniformity(torch.ones(5, 2) / 2**0.5) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(uniformity(points[:1]))
    assert hub_share(torch.tensor([4, 4, 1, 4])) == 75.0


def training_evaluation(groups, tokenizer: Path, show=lambda cfg: None, **evaluate):
    cfg = config_from_dict(
        {
            "model": {"preset": "tiny"},
            "train": {"steps": 1},
            "data": {"tokenizer": str(tokenizer)},
            "evaluate": {"path": str(GOLDEN), "interval": 1, **evaluate},
            "log": {"montage_queries": 2},
        }
    )
    chunks = build_model(cfg.model, cfg.parallel, groups, device(), seed=0)
    return cfg, chunks, build_evaluation(cfg, chunks, groups, lambda doing: None, show(cfg))


def test_training_evaluates_on_some_of_mmebs_sets(groups, tmp_path):
    cfg, chunks, (run, candidates) = training_evaluation(groups, byte_tokenizer(tmp_path), sets=["CIRR", "ImageNet-1K"])
    scores = run()
    assert candidates == {task.name: task.num_candidates for task in golden_tasks()[:2]}
    assert list(scores) == ["ImageNet-1K", "CIRR"] and chunks[0].training
    model = LoadedModel(cfg, chunks, build_processor(cfg.data, cfg.model), groups)
    tasks = golden_tasks()[:2]
    done = evaluate_tasks(
        CachedEmbedder(partial(embed_parts, model), tmp_path / "out", IDENTITY, groups.dp), tasks, "first"
    )
    assert scores == {result.name: result.precision_at_1 for result in done.results}


def test_training_goes_on_without_scores_where_embeddings_are_not_finite(groups, tmp_path, caplog):
    _, chunks, (run, _) = training_evaluation(groups, byte_tokenizer(tmp_path), sets=["CIRR", "ImageNet-1K"])
    with torch.no_grad():
        next(chunks[0].parameters()).fill_(math.nan)
    scores = run()
    assert list(scores) == ["ImageNet-1K", "CIRR"] and all(map(math.isnan, scores.values())) and chunks[0].training
    assert "no evaluation: input ImageNet-1K " in caplog.text and "has no finite embedding" in caplog.text


def test_training_refuses_unknown_sets_before_it_begins(groups, tmp_path, openmoji_data):
    with pytest.raises(ConfigError, match=r"evaluate\.sets: 'other' is no data set of MMEB-eval"):
        training_evaluation(groups, byte_tokenizer(tmp_path), sets=["other"])
    with pytest.raises(ConfigError, match=r"evaluate\.sets: 'other' is none of the sets in .*openmoji: "):
        training_evaluation(groups, byte_tokenizer(tmp_path), path=str(openmoji_data), sets=["other"])


def test_training_draws_queries_beside_their_best_candidates(groups, tmp_path):
    told = []
    tracker = SimpleNamespace(
        step=lambda *_: None, image=lambda *image: told.append(image[:2] + (image[2].size,)), close=lambda: None
    )
    log = RunLog(tmp_path / "run", 0, 9, True, [tracker])
    log.step({"step": 7, "loss": 1.0, "pairs": 2, "seconds": 1.0, "skipped": 0})
    sets = {"sets": ["CIRR", "ImageNet-1K"]}
    _, _, (run, _) = training_evaluation(groups, byte_tokenizer(tmp_path), lambda cfg: montages(cfg, log), **sets)
    run()
    with Image.open(tmp_path / "run" / "montages" / "step-0000007.png") as image:
        drawn = image.convert("RGB")
    assert told == [(7, "evaluation/montage", drawn.size)]
    # Two sets side by side, of two queries each, whose right candidates have a green frame.
    colours = [montage.GREEN, montage.RED]
    count, other = ((np.array(drawn) == np.array(tuple(bytes.fromhex(c[1:])))).all(-1).sum() for c in colours)
    assert drawn.height == montage.LEGEND_HEIGHT + montage.MARGIN + montage.TITLE_HEIGHT + 2 * 128 + montage.GAP
    assert count > 4 * 4 * montage.FRAME * (montage.CELL - 2 * montage.FRAME) and other >= 0
    off = RunLog(tmp_path / "off", 0, 9, enabled=False)
    assert montages(config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 1}}), log) is None
    cfg = config_from_dict(
        {"model": {"preset": "tiny"}, "train": {"steps": 1}, "evaluate": {"interval": 1}, "log": {"montage_queries": 2}}
    )
    assert montages(cfg, off) is None
    log.close()

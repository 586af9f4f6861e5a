"""Building an index with the golden model: what is embedded when, kills, locks, refusals, and what readers see."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forking import ROOT, fork
from run_ranks import run_ranks
from searching import png

from megatron_llave.embedding import cache as embedding_cache
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import DataError, UserError
from megatron_llave.locks import lock_folder
from megatron_llave.search import build as building
from megatron_llave.search import index as indexing
from megatron_llave.search.build import BUILDING, UNREADABLE, BuildOptions, Built, build_index
from megatron_llave.search.index import MANIFEST, ImageIndex, open_index
from megatron_llave.search.prompts import MMEB
from megatron_llave.search.query import load_query_model

TOOL = ROOT / "tools" / "search.py"
OLD = 1_600_000_000
LAYOUT = ("model.precision=fp32", "parallel.tensor=1")
Build = Callable[..., Built]


@pytest.fixture
def build(model_folder: Path, pictures: Path, tmp_path: Path) -> Build:
    """Builds the index of `pictures` with the golden model; files are as if they had been written long ago."""
    options = BuildOptions(pictures, tmp_path / "index", str(model_folder))

    def run(**changes: object) -> Built:
        for path in pictures.rglob("*"):
            if path.is_file() and path.stat().st_mtime > OLD + 10**6:
                os.utime(path, ns=(OLD * 10**9, OLD * 10**9 + path.stat().st_mtime_ns % 10**9))
        built = build_index(replace(options, **changes))
        assert built is not None
        return built

    return run


def not_needed(*args: object) -> None:
    raise AssertionError("the model is loaded where nothing is to be embedded")


def counts(built: Built) -> tuple[int, int, int, int]:
    return built.new, built.changed, built.removed, built.embedded


def vectors_by_name(index: ImageIndex) -> dict[str, np.ndarray]:
    return {file.name: index.vectors[row] for file, row in zip(index.files, index.rows_of_files.tolist()) if row >= 0}


def test_vectors_are_those_of_the_model_and_only_what_changed_is_embedded(
    build: Build, pictures: Path, tmp_path: Path, model_folder: Path, monkeypatch
) -> None:
    (pictures / "deep").mkdir()
    shutil.copy(pictures / "00.png", pictures / "deep" / "copy of 0.png")
    (pictures / "broken.png").write_bytes(png(1)[:50])
    built = build()
    assert counts(built) == (14, 0, 0, 12)
    [(name, problem)] = built.problems
    assert name == "broken.png" and problem.startswith("not a readable image")
    assert [json.loads(line)["file"] for line in (tmp_path / "index" / UNREADABLE).read_text().splitlines()] == [name]
    index = open_index(tmp_path / "index")
    assert (len(index), index.manifest.files, index.manifest.unreadable) == (12, 13, 1)
    assert not (tmp_path / "index" / BUILDING).exists() and not list((tmp_path / "index").glob("*.partial"))
    assert [file.name for file in index.files_of(0)] == ["00.png", "deep/copy of 0.png"]
    model = load_model(model_folder)
    found = vectors_by_name(index)
    rows = model.embed([(MMEB.image, pictures / name) for name in found])
    np.testing.assert_allclose(np.stack(list(found.values())), rows, atol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(building, "load_model", not_needed)
        again = build()
        assert counts(again) == (0, 0, 0, 0) and not again.is_written and again.problems == built.problems
        (pictures / "03.png").rename(pictures / "deep" / "moved.png")
        (pictures / "00.png").unlink()
        assert counts(build()) == (1, 0, 2, 0)
    (pictures / "05.png").write_bytes(png(500))
    (pictures / "new.png").write_bytes(png(501))
    (pictures / "broken.png").write_bytes(png(502))
    (pictures / "11.png").unlink()
    built = build()
    assert counts(built) == (1, 2, 1, 3) and not built.problems and not (tmp_path / "index" / UNREADABLE).exists()
    index = open_index(tmp_path / "index")
    assert len(index) == 13 and [file.name for file in index.files][-3:] == [
        "deep/copy of 0.png",
        "deep/moved.png",
        "new.png",
    ]
    found = vectors_by_name(index)
    rows = model.embed([(MMEB.image, pictures / name) for name in found])
    np.testing.assert_allclose(np.stack(list(found.values())), rows, atol=1e-6)


def test_queries_have_their_prompts(build: Build, pictures: Path, tmp_path: Path, model_folder: Path) -> None:
    build(prompts={"text": "Look for {} now"})
    index = open_index(tmp_path / "index")
    query = load_query_model(index, prompts={"both": "<image> with {}"})
    model, image = load_model(model_folder), (pictures / "02.png").read_bytes()
    expected = {
        ("a <image> tag", None): "Look for a <image> tag now",
        ("", image): (MMEB.like, image),
        ("a <image> tag", image): ("<image> with a \\<image> tag", image),
    }
    for (text, given), written in expected.items():
        np.testing.assert_allclose(query(text, given), model.embed(written), atol=1e-6)
    hits = index.search(query("", image), 3)
    exact = index.vectors @ query("", image)
    assert [hit.row for hit in hits] == np.argsort(-exact, kind="stable")[:3].tolist()
    with pytest.raises(UserError, match="a query needs a text, an image, or both"):
        query("  ", None)
    with pytest.raises(UserError, match="input of the query cannot be embedded: not a readable image"):
        query("", b"nothing")


@contextmanager
def stopped_at_fourth_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of one image each, and an end of the build at the fourth one."""
    write, written = embedding_cache.EmbeddingCache.write, []

    def stop(self: embedding_cache.EmbeddingCache, part: int, rows: np.ndarray) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, rows)

    monkeypatch.setattr(embedding_cache, "PART_COST", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding_cache.EmbeddingCache, "write", stop)
        yield


def test_a_stopped_build_goes_on_whatever_has_changed(
    build: Build, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    """Stopped at its fourth part of one image each, like a kill: nothing runs after it; two changes meanwhile."""
    for _ in range(2):
        with stopped_at_fourth_part(monkeypatch):
            build()
    assert not (tmp_path / "index" / MANIFEST).exists()
    (pictures / "01.png").unlink()
    (pictures / "0 first.png").write_bytes(png(77))
    built = build()
    assert (built.kept, built.embedded, built.new) == (5, 7, 12)
    fresh = build(index=tmp_path / "fresh")
    assert fresh.embedded == 12
    first, second = (vectors_by_name(open_index(tmp_path / name)) for name in ("index", "fresh"))
    assert list(first) == list(second)
    np.testing.assert_allclose(np.stack(list(first.values())), np.stack(list(second.values())), atol=1e-6)


def test_a_stopped_rebuild_goes_on_with_the_same_text_alone(build: Build, monkeypatch) -> None:
    build()
    for changes, kept in (({"image": "An image"}, 3), ({"image": "Another image"}, 0)):
        with stopped_at_fourth_part(monkeypatch):
            build(rebuild=True, prompts={"image": "An image"})
        built = build(rebuild=True, prompts=changes)
        assert (built.kept, built.embedded) == (kept, 12 - kept)


def test_another_model_or_text_is_refused_or_rebuilt(build: Build, tmp_path: Path) -> None:
    build()
    hint = "--rebuild embeds all images again; or choose another --out"
    with pytest.raises(DataError, match=f"is of another model .precision 'fp32' there, 'bf16' here.; {hint}"):
        build(overrides=("model.precision=bf16",))
    with pytest.raises(DataError, match=f"text of the images '.*' there, 'An image' here.; {hint}"):
        build(prompts={"image": "An image"})
    assert build(prompts={"text": "{}!"}).embedded == 0  # texts of queries may change
    assert open_index(tmp_path / "index").manifest.prompts.text == "{}!"
    assert build(prompts={"image": "An image"}, rebuild=True, overrides=LAYOUT).embedded == 12
    assert open_index(tmp_path / "index").manifest.overrides == list(LAYOUT[:1])
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    manifest["model"]["weights"] = "others"
    (tmp_path / "index" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is of another model .weights 'others' there, .*--rebuild embeds the images"):
        load_query_model(open_index(tmp_path / "index"))


def test_the_weights_that_were_looked_at_are_loaded(
    build: Build, tmp_path: Path, model_folder: Path, monkeypatch
) -> None:
    """A training may save a newer checkpoint between the two; `newer` stands for it here."""
    (tmp_path / "newer").mkdir()
    read_identity, loaded = building.read_identity, []
    monkeypatch.setattr(building, "read_identity", lambda path, *more: read_identity(model_folder, *more))
    monkeypatch.setattr(building, "load_model", lambda path, *more: loaded.append(path) or load_model(path, *more))
    build(checkpoint=str(tmp_path / "newer"))
    assert loaded == [str(model_folder)] == [open_index(tmp_path / "index").manifest.checkpoint]


def test_small_vectors_are_made_without_the_model(build: Build, tmp_path: Path, monkeypatch) -> None:
    build()
    monkeypatch.setattr(building, "load_model", not_needed)
    built = build(vectors="int8", dims=16)
    assert built.manifest.kind.startswith("approximate (int8, 16 of 64 numbers; finds ")
    assert built.notes == ["the model was trained without loss.matryoshka_dims, so that the first 16 may say little"]
    assert set(built.manifest.recall) == {"recall@1", "recall@10"} and not built.manifest.is_exact
    index = open_index(tmp_path / "index")
    assert index.small.rows.shape == (12, 16) and index.small.rows.dtype == np.int8
    assert [hit.row for hit in index.search(index.vectors[3], 12)][0] == 3
    assert not build().is_written and build(dims=0, vectors="float32").manifest.kind == "exact"
    with pytest.raises(UserError, match="--dims 65 must be between 1 and the 64 numbers"):
        build(dims=65)


def test_files_that_change_meanwhile_are_named_and_read_the_next_time(
    build: Build, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    images_of = building.images_of

    def change(*args: object) -> building.ImagesOf:
        (pictures / "04.png").write_bytes(png(44))
        (pictures / "05.png").unlink(missing_ok=True)
        return images_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(building, "images_of", change)
        problems = dict(build().problems)
    assert problems["04.png"] == "it changed while the index was built; the next build reads it"
    assert "05.png does not exist" in problems["05.png"] and len(problems) == 2
    (pictures / "05.png").write_bytes(png(5))
    built = build()
    assert not built.problems and built.embedded == 2 and len(open_index(tmp_path / "index")) == 12


def test_one_builds_and_others_read(build: Build, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    build()
    before = open_index(tmp_path / "index")
    with lock_folder(tmp_path / "index"):
        with pytest.raises(DataError, match="another process is writing into .*index: process .*; wait for its end"):
            build()
    read_manifest, stale = indexing.read_manifest, [before.manifest]
    (pictures / "00.png").unlink()
    build()
    assert not (tmp_path / "index" / before.manifest.folder).exists()
    assert len(before) == 12 and before.search(before.vectors[0], 1)[0].similarity == pytest.approx(1, abs=1e-6)
    monkeypatch.setattr(indexing, "read_manifest", lambda path: stale.pop() if stale else read_manifest(path))
    assert len(open_index(tmp_path / "index")) == 11 and not stale, "a manifest that a build has replaced is read again"


def test_a_full_disk_leaves_the_old_index(build: Build, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    build()
    before = sorted((tmp_path / "index").rglob("*"))
    (pictures / "00.png").unlink()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_write_vectors", full)
        with pytest.raises(DataError, match="the index cannot be written: .*No space left on device"):
            build()
    assert sorted((tmp_path / "index").rglob("*")) == before and len(open_index(tmp_path / "index")) == 12


def test_wrong_folders_and_damage_are_one_line(build: Build, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pictures is no index and holds other files .*; choose another --out"):
        build(index=pictures)
    with pytest.raises(DataError, match="nowhere cannot be read: No such file or directory"):
        build(pictures=tmp_path / "nowhere")
    assert not (tmp_path / "index").exists()
    with pytest.raises(DataError, match="manifest.json does not exist; llave search build makes an index"):
        open_index(tmp_path)
    build()
    (vectors,) = (tmp_path / "index").rglob("vectors.npy")
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="vectors.npy is damaged; llave search build --rebuild makes it again"):
        build()
    vectors.unlink()
    with pytest.raises(DataError, match="vectors.npy is missing, so that .* is damaged; llave search build --rebuild"):
        build()
    assert build(rebuild=True).embedded == 12
    for path in pictures.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds no image now, and its index has 12 files; is it mounted"):
        build()
    assert build(rebuild=True).manifest.images == 0 and len(open_index(tmp_path / "index")) == 0
    assert open_index(tmp_path / "index").search(np.ones(64, np.float32), 5) == []
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    for key, wrong in (
        ("folder", "images-/../x"),
        ("folder", 3),
        ("images", True),
        ("sha256", ["x"]),
        ("sha256", {"vectors.npy": 1}),
        ("prompts", {"text": "{}"}),
        ("prompts", {**manifest["prompts"], "both": None}),
        ("recall", {"recall@10": "all"}),
        ("other", 3),
    ):
        (tmp_path / "index" / MANIFEST).write_text(json.dumps({**manifest, key: wrong}))
        with pytest.raises(DataError, match="manifest.json is damaged .*; llave search build --rebuild makes it again"):
            open_index(tmp_path / "index")


@pytest.mark.slow
def test_ranks_share_the_work(build: Build, pictures: Path, tmp_path: Path, model_folder: Path) -> None:
    """On two ranks, and with the model split over two; float32 sums in another order differ by 1e-6 at most here."""
    (pictures / "broken.png").write_bytes(b"x")
    build()
    expected = vectors_by_name(open_index(tmp_path / "index"))
    for layout in ("parallel.tensor=1", "parallel.tensor=2"):
        out = tmp_path / layout
        arguments = ["build", "--checkpoint", str(model_folder), "--pictures", str(pictures), "--out", str(out)]
        printed = run_ranks(2, TOOL, *arguments, layout)
        assert printed.count("12 images") == 1 and printed.count("  broken.png: not a readable image") == 1
        found = vectors_by_name(open_index(out))
        assert list(found) == list(expected)
        np.testing.assert_allclose(np.stack(list(found.values())), np.stack(list(expected.values())), atol=1e-6)
    printed = run_ranks(
        2, TOOL, "query", str(tmp_path / "parallel.tensor=2"), "a", "--set", "parallel.tensor=2", "--json"
    )
    assert printed.count('"found"') == 1
    split = load_query_model(open_index(tmp_path / "parallel.tensor=2"))  # also by one process
    np.testing.assert_allclose(split("a", None), load_query_model(open_index(tmp_path / "index"))("a", None), atol=1e-6)


@pytest.mark.slow
def test_a_killed_build_loses_the_part_it_was_in(
    build: Build, pictures: Path, tmp_path: Path, model_folder: Path
) -> None:
    for number in range(400):
        (pictures / f"further {number}.png").write_bytes(png(1000 + number))
    arguments = [
        "build",
        "--checkpoint",
        str(model_folder),
        "--pictures",
        str(pictures),
        "--out",
        str(tmp_path / "index"),
    ]
    process = fork([str(TOOL), *arguments], ("/dev/null", "/dev/null"), {})
    while len(parts := list((tmp_path / "index").rglob("part-*.npy"))) < 3:
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    built = build()
    assert built.kept >= 3 * 56 and built.kept + built.embedded == 412 == len(open_index(tmp_path / "index")), parts

"""Sources of image files: what is left out and why, going on after a kill, bytes that depend on no worker."""

import io
import json
import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from forking import fork, run_script
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Side
from megatron_llave.data.index import read_index
from megatron_llave.errors import DataError
from megatron_llave.prepare import shard_jobs
from megatron_llave.prepare.audit import read_noticed
from megatron_llave.prepare.shard_jobs import SourceRow, cut_into_jobs, make_id, write_shards
from megatron_llave.prepare.source_sides import SourceSide

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"workers": 1, "overwrite": False, "progress": lambda what, done, total: None}
MAX_PIXELS = 10_000


def picture(colour=0, size=(8, 6), kind="PNG"):
    buffer = io.BytesIO()
    Image.effect_noise(size, 50 + colour).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def side(text="a text", *images):
    return SourceSide(text, images, make_id(text, images))


def make_row(number, folder, query=None, target=None, *negatives):
    return SourceRow(f"cats-{number:08d}", number, str(folder), query or side(), target or side("cat"), negatives)


def make(rows, out, confined=True, **changes):
    jobs = list(cut_into_jobs(out, "cats", rows, confined, MAX_PIXELS))
    return write_shards(jobs, len(jobs), out, {"cats": "retrieval"}, **{**QUIET, **changes})


def pairs_of(out):
    return [pair for shard in read_index(out).subsets["cats"].shards for pair in read_shard(out / shard.file)]


def report_of(out):
    return [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch):
    """Ten rows a shard; seen by this process alone."""
    monkeypatch.setattr(shard_jobs, "PAIRS_PER_SHARD", 10)


@pytest.fixture
def images(tmp_path):
    """One good picture and one of each kind of bad one."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "good.png").write_bytes(picture())
    (folder / "good.jpg").write_bytes(picture(1, (64, 48), "JPEG"))
    (folder / "cut.jpg").write_bytes(picture(1, (64, 48), "JPEG")[:-20])
    (folder / "cut.png").write_bytes(picture(1, (64, 48))[:-60])
    (folder / "text.png").write_bytes(b"not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "large.png").write_bytes(picture(0, (101, 100)))
    (folder / "folder.png").mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    return folder


def test_images_and_texts_come_back_as_they_are_in_the_files(images, tmp_path):
    rows = [
        make_row(
            0, images, side("<|image_1|>\nq \u732b", "good.jpg"), side("", "good.png"), side("no"), side("", "good.jpg")
        )
    ]
    made = make(rows, tmp_path / "out")
    (pair,) = pairs_of(tmp_path / "out")
    assert pair.query == Side("<|image_1|>\nq \u732b", [(images / "good.jpg").read_bytes()])
    assert pair.target == Side("", [(images / "good.png").read_bytes()])
    assert pair.hard_negatives == [Side("no", []), Side("", [(images / "good.jpg").read_bytes()])]
    assert (pair.query_id, pair.target_id) == (rows[0].query.id, rows[0].target.id)
    assert pair.hard_negative_ids == [negative.id for negative in rows[0].hard_negatives]
    assert made.index == read_index(tmp_path / "out") and not made.skipped["cats"]
    assert sorted(contents(tmp_path / "out")) == ["cats-000000.tar", "index.json", "report.jsonl"]


LEFT_OUT = [
    (side("q", "none.png"), "missing image", "none.png.*No such file"),
    (side("q", "good.png/x.png"), "missing image", "Not a directory"),
    (side("q", "folder.png"), "missing image", "is not a file"),
    (side("q", "n" * 300), "missing image", "File name too long"),
    (side("q", "a\0b.png"), "missing image", "cannot be the name of a file"),
    (side("q", "\ud800.png"), "missing image", "cannot be the name of a file"),
    (side("q", "cut.jpg"), "corrupt image", "cut.jpg.*truncated"),
    (side("q", "cut.png"), "corrupt image", "cut.png"),
    (side("q", "text.png"), "corrupt image", "not a readable image in a known format"),
    (side("q", "empty.png"), "corrupt image", "not a readable image in a known format"),
    (side("q", "large.png"), "image too large", "101x100 pixels exceeds the limit of 10000 pixels"),
    (side("q", "../secret.png"), "image path outside the source", "'../secret.png'"),
    (side("q", "x/../../secret.png"), "image path outside the source", "secret.png"),
    (side("q", "/etc/hostname"), "image path outside the source", "'/etc/hostname'"),
    (side("q", "https://host/x.png"), "image is a URL", "https://host/x.png"),
    (side("q", "s3://bucket/x.png"), "image is a URL", "download it first"),
    (side("q", "good.png", "none.png"), "missing image", "none.png"),
    (side(" \n"), "empty side", "neither text nor image"),
    (side("\ud800"), "text is not Unicode", "half a surrogate pair.* at character 1"),
    (side("a\0b"), "text is not Unicode", "a NUL .* at character 2"),
]


def test_what_cannot_be_used_is_reported_with_its_reason_and_the_others_stay(images, tmp_path):
    rows = [make_row(0, images)]
    rows += [make_row(1 + i, images, bad) for i, (bad, _, _) in enumerate(LEFT_OUT)]
    rows += [make_row(100 + i, images, None, bad) for i, (bad, _, _) in enumerate(LEFT_OUT)]
    made = make(rows, tmp_path / "out")
    assert [pair.key for pair in pairs_of(tmp_path / "out")] == ["cats-00000000"]
    report = report_of(tmp_path / "out")
    assert [line["row"] for line in report] == [row.row for row in rows[1:]]
    for line, (_, reason, detail) in zip(report, LEFT_OUT + LEFT_OUT):
        assert line.keys() == {"subset", "row", "reason", "detail"}
        assert (line["subset"], line["reason"]) == ("cats", reason)
        assert line["detail"].startswith("target: " if line["row"] >= 100 else "query: ")
        assert re.search(detail, line["detail"]), line
    assert sum(made.skipped["cats"].values()) == 2 * len(LEFT_OUT)
    assert made.skipped["cats"]["image is a URL"] == 4


def test_images_that_lose_something_are_kept_counted_and_named(images, tmp_path):
    for name, image in (
        ("alpha.png", Image.merge("RGBA", [Image.linear_gradient("L").resize((8, 8))] * 4)),
        ("deep.png", Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
        ("black.png", Image.new("L", (8, 8))),
    ):
        image.save(images / name)
    rows = [make_row(0, images, side("q", "alpha.png"), side("t", "deep.png", "good.png"), side("n", "black.png"))]
    rows += [make_row(1, images, side("q", "alpha.png"), side("t", "none.png"))]  # dropped, not noticed
    made = make(rows, tmp_path / "out")
    kinds = ["image with transparency", "image of more than 8 bits per channel", "image of one colour"]
    assert made.noticed["cats"] == dict.fromkeys(kinds, 1) and made.skipped["cats"] == {"missing image": 1}
    *noticed, dropped = report_of(tmp_path / "out")
    assert [line["reason"] for line in noticed] == [f"noticed: {kind}" for kind in kinds]
    wanted = ["query: .*alpha.png", "target: .*deep.png", "hard negative 0: .*black.png"]
    assert all(re.match(name, line["detail"]) for name, line in zip(wanted, noticed))
    assert dropped["reason"] == "missing image"
    assert read_noticed(tmp_path / "out") == made.noticed


def test_a_bad_hard_negative_goes_alone(images, tmp_path):
    rows = [make_row(0, images, None, None, side("first"), side("x", "none.png"), side("last"))]
    made = make(rows, tmp_path / "out")
    (pair,) = pairs_of(tmp_path / "out")
    assert pair.hard_negatives == [Side("first", []), Side("last", [])]
    assert pair.hard_negative_ids == [side("first").id, side("last").id]
    assert made.skipped["cats"] == {"hard negative left out: missing image": 1}
    assert report_of(tmp_path / "out")[0]["detail"].startswith("hard negative 1: ")


def test_every_truncation_of_a_jpeg_is_found(images, tmp_path):
    whole = picture(3, (64, 48), "JPEG")
    cuts = [*range(0, len(whole) - 2, 37), len(whole) - 3]
    for number in cuts:
        (images / f"{number}.jpg").write_bytes(whole[:number])
    make([make_row(0, images)] + [make_row(n, images, side("q", f"{n}.jpg")) for n in cuts[1:]], tmp_path / "out")
    assert [line["row"] for line in report_of(tmp_path / "out")] == cuts[1:]


def test_unconfined_paths_may_lie_anywhere(images, tmp_path):
    rows = [
        make_row(0, images, side("q", "../secret.png")),
        make_row(1, images, side("q", str(tmp_path / "secret.png"))),
    ]
    make(rows, tmp_path / "out", confined=False)
    assert {pair.query.images[0] for pair in pairs_of(tmp_path / "out")} == {(tmp_path / "secret.png").read_bytes()}


def test_subset_of_which_nothing_is_left(images, tmp_path):
    bad = [make_row(n, images, side("q", "none.png")) for n in range(3)]
    with pytest.raises(DataError, match="nothing is left of subset cats: 3 x missing image; see .*report.jsonl"):
        make(bad, tmp_path / "out")
    assert len(report_of(tmp_path / "out")) == 3
    assert not (tmp_path / "out/index.json").exists()


def test_shard_of_which_nothing_is_left_is_not_made(images, tmp_path, small_shards):
    rows = [make_row(n, images, side("q", "none.png") if n < 10 else None) for n in range(15)]
    made = make(rows, tmp_path / "out")
    assert [(shard.file, shard.pairs) for shard in made.index.subsets["cats"].shards] == [("cats-000001.tar", 5)]


def test_ids_are_equal_exactly_for_equal_text_and_images():
    assert make_id("a cat", []) == make_id("a cat", ()) == "a-cat-" + make_id("a cat", [])[-16:]
    assert make_id("x", ["images/CIRR/dev 1.png"]).startswith("dev-1-")
    different = [
        ("a", []),
        ("b", []),
        ("a", ["b"]),
        ("", ["b"]),
        ("a", ["b", "c"]),
        ("a", ["bc"]),
        ("ab", []),
        ("", []),
    ]
    assert len({make_id(*one) for one in different}) == len(different)
    assert re.fullmatch(r"[0-9a-f]{16}", make_id("\u732b", []))
    # Pinned: shards made by different versions must agree.
    assert make_id("a cat", []) == "a-cat-117ee956a8d16356"


def interrupt_after(count):
    def progress(what, done, total):
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_finished_shards_are_kept_until_something_they_depend_on_changes(images, tmp_path, small_shards):
    out = tmp_path / "out"
    rows = [make_row(n, images, side(f"q{n}", f"{n // 10}.png")) for n in range(40)]
    for n in range(4):
        (images / f"{n}.png").write_bytes(picture(n))
    with pytest.raises(KeyboardInterrupt):
        make(rows, out, progress=interrupt_after(3))
    assert sorted(path.name for path in out.glob("*.done")) == [f"cats-00000{n}.tar.done" for n in range(3)]
    before = {n: (out / f"cats-00000{n}.tar").stat().st_mtime_ns for n in range(3)}
    (images / "1.png").write_bytes(picture(9, (9, 9)))
    (out / "cats-000002.tar.done").write_bytes(b"{")
    (out / "cats-000007.tar").write_bytes(b"of other arguments")
    (out / "cats-000007.tar.done").write_bytes(b"{}")
    (out / ".cats-000008.tar.partial").write_bytes(b"cut short")
    make(rows, out)
    after = {n: (out / f"cats-00000{n}.tar").stat().st_mtime_ns for n in range(3)}
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]
    make(rows, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_finished_shard_that_is_gone_is_made_again(images, tmp_path, small_shards, damage):
    rows = [make_row(n, images) for n in range(20)]
    with pytest.raises(KeyboardInterrupt):
        make(rows, tmp_path / "out", progress=interrupt_after(1))
    shard = tmp_path / "out/cats-000000.tar"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    make(rows, tmp_path / "out")
    make(rows, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_finished_folder_is_replaced_on_demand_only(images, tmp_path):
    out = tmp_path / "out"
    make([make_row(0, images)], out)
    with pytest.raises(DataError, match="already holds finished shards.*--overwrite"):
        make([make_row(0, images, side("other"))], out)
    assert pairs_of(out)[0].query.text == "a text"
    make([make_row(0, images, side("other"))], out, overwrite=True)
    assert pairs_of(out)[0].query.text == "other"


def test_full_disk_is_one_line_and_a_later_run_goes_on(images, tmp_path, small_shards):
    out = tmp_path / "out"
    out.mkdir()
    rows = [make_row(n, images) for n in range(20)]
    (out / ".cats-000001.tar.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match="cats-000001.tar cannot be written: No space left on device; the same command"):
        make(rows, out)
    assert not (out / "cats-000001.tar").exists() and not (out / "index.json").exists()
    first = (out / "cats-000000.tar").stat().st_mtime_ns
    make(rows, out)
    assert (out / "cats-000000.tar").stat().st_mtime_ns == first
    assert len(pairs_of(out)) == 20


def test_failing_storage_stops_the_run_instead_of_losing_pairs(images, tmp_path, monkeypatch):
    real = Path.read_bytes

    def fail(path):
        if path.name == "good.png":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match="good.png cannot be read: Input/output error"):
        make([make_row(0, images, side("q", "good.png"))], tmp_path / "out")


def test_killed_worker_is_one_line(images, tmp_path):
    rows = (make_row(n, images, side("q", "good.jpg")) for n in range(20_000))
    before = multiprocessing.active_children()  # of earlier tests

    def kill(what, done, total):
        if done == 1:
            next(child for child in multiprocessing.active_children() if child not in before).kill()

    jobs = cut_into_jobs(tmp_path / "out", "cats", rows, True, MAX_PIXELS)
    with pytest.raises(DataError, match="a worker making .* was killed; the same command.*fewer --workers"):
        write_shards(jobs, 20, tmp_path / "out", {"cats": "vqa"}, 2, False, kill)


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_in_the_same_bytes(images, tmp_path):
    lines = [{"query": {"text": f"q{n}"}, "target": {"text": "t", "images": ["good.png"]}} for n in range(8_000)]
    for n in range(0, len(lines), 700):
        lines[n]["query"]["images"] = ["none.png"]
    (images / "cats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tool = [str(ROOT / "tools/prepare_data.py"), "jsonl", "--source", str(images / "cats.jsonl")]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = fork([*tool, "--out", str(killed), "--workers", "2"], (os.devnull, os.devnull), {})
    deadline = time.monotonic() + 300
    while len(list(killed.glob("*.done"))) < 2:
        assert run.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    run.kill()
    run.join()
    done = [path.with_suffix("") for path in killed.glob("*.done")]
    times = {path: path.stat().st_mtime_ns for path in done}
    assert len(times) >= 2 and not (killed / "index.json").exists()
    for out, workers in ((killed, 2), (whole, 1)):
        run_script(*tool, "--out", out, "--workers", str(workers)).check_returncode()
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert contents(killed) == contents(whole)
    assert len(report_of(whole)) == 12
    assert read_index(whole).subsets["cats"].pairs == 8_000 - 12

"""Which files of a folder are found, and which of them are read again."""

import os
from pathlib import Path

import pytest

from megatron_llave.errors import DataError
from megatron_llave.search import scan as scanning
from megatron_llave.search.scan import UNKNOWN_TIME, hash_file, scan_folder, with_digests

ODD = ["a b.jpg", "ünïcode 图.PNG", "line\nend.png", "<img onerror=alert(1)>.png", "-rf.webp"]
OLD = 1_600_000_000


def names(folder: Path, *left_out: Path) -> list[str]:
    return [file.name for file in scan_folder(folder, left_out).files]


def test_odd_names_hidden_files_and_other_endings(tmp_path: Path) -> None:
    for name in [*ODD, ".hidden.png", "text.txt", "photo.heic", "film.heic", "none"]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "b.png").write_bytes(b"x")
    raw = os.fsencode(tmp_path) + b"/not utf-8 \xff.png"
    open(raw, "wb").close()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.tif").write_bytes(b"x")
    found = scan_folder(tmp_path)
    expected = [*(name.encode() for name in ODD), b"not utf-8 \xff.png", b"deep/er/c.tif"]
    assert sorted(file.path for file in found.files) == sorted(expected)
    assert [file.path for file in found.files] == sorted(expected)
    assert found.others == {".txt": 1, ".heic": 2, "no ending": 1}


def test_links_in_circles_and_to_nowhere_and_what_is_no_file(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "x.png").write_bytes(b"x")
    (inner / "circle").symlink_to(tmp_path)
    (tmp_path / "0 again").symlink_to(inner)
    (tmp_path / "link.png").symlink_to(inner / "x.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    found = {file.name: file.problem for file in scan_folder(tmp_path).files}
    assert found == {
        "a/b/x.png": "",  # not by way of "0 again", which is a link
        "link.png": "",
        "nowhere.png": "No such file or directory",
        "pipe.png": "it is not a regular file",
    }
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "far").symlink_to(inner)
    around = [f"far/circle/{name}.png" for name in ("link", "nowhere", "pipe")]
    assert names(tmp_path / "outside") == [*around, "far/x.png"]
    assert names(tmp_path, inner) == ["link.png", "nowhere.png", "pipe.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "private").mkdir()
    scandir = os.scandir

    def refuse(path: bytes):
        if path.endswith(b"private"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert scan_folder(tmp_path).folder_problems == [("private", "Permission denied")]
    with pytest.raises(DataError, match="nowhere cannot be read: No such file or directory; name a folder of images"):
        scan_folder(tmp_path / "nowhere")


def test_what_has_not_changed_is_not_read(tmp_path: Path, monkeypatch) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (OLD, OLD))
    before = list(with_digests(tmp_path, scan_folder(tmp_path).files, {}))
    assert len({file.digest for file in before}) == 3 and all(file.mtime_ns == OLD * 10**9 for file in before)
    (tmp_path / "b.png").write_bytes(b"other")  # another time and size
    (tmp_path / "c.png").write_bytes(b"C.png")  # another time
    read = []
    monkeypatch.setattr(scanning, "hash_file", lambda folder, file: read.append(file.name) or hash_file(folder, file))
    known = {file.path: file for file in before}
    after = list(with_digests(tmp_path, scan_folder(tmp_path).files, known))
    assert sorted(read) == ["b.png", "c.png"] and after[0] == before[0]
    assert all(new.digest != old.digest for new, old in zip(after[1:], before[1:]))
    assert after[1].mtime_ns == UNKNOWN_TIME, "written so lately that a further change may have the same time"
    read.clear()
    list(with_digests(tmp_path, scan_folder(tmp_path).files, {file.path: file for file in after}))
    assert sorted(read) == ["b.png", "c.png"]

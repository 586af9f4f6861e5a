"""Files and folders are complete or absent, whatever interrupts their writers; wrong JSON is one line."""

import json
import os
from pathlib import Path

import pytest

from megatron_llave.errors import CheckpointError, DataError
from megatron_llave.files import VERSION, atomic_write, parse_json, read_json, whole_folder, write_json, write_text
from megatron_llave.locks import lock_folder


def test_two_writers_of_a_file_have_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as first:
        first.write_text("half")
        raise KeyboardInterrupt
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.md", "first")]


def test_two_writers_of_json_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes while the other does: each takes the name with a complete file, and nothing else is left."""
    replace = os.replace

    def meanwhile(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_json(target, {"writer": 2})
        assert json.loads(source.read_text()) == {"writer": 1}
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_json(tmp_path / "a.json", {"writer": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"writer": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "folder", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]


def test_the_only_writer_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    for attempt in range(2):
        with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.tar", only_writer=True) as temporary:
            left = temporary
            temporary.write_text(f"attempt {attempt}")
            raise KeyboardInterrupt
        left.write_text("what a killed process has left is longer than what comes after it")
    assert [path.name for path in tmp_path.iterdir()] == [".a.tar.partial"]
    with atomic_write(tmp_path / "a.tar", only_writer=True) as temporary:
        temporary.write_text("complete")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.tar", "complete")]


def test_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"format": "a thing", "version": VERSION, "text": "\u00e9 \u4e16", "undecodable": "\udc80"}
    write_json(path, value)
    assert read_json(path) == read_json(path, "a thing") == value
    assert "\u00e9 \u4e16" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, object())
    assert read_json(path) == value
    write_text(path, "\u00e9")
    assert path.read_bytes() == "\u00e9".encode() and [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; the hint"),
        ("{", r"is not valid JSON \(.*\); make it again or copy it again"),
        ("[" * 100_000, "is not valid JSON"),
        ("[" * 101 + "]" * 101, "is not valid JSON .nested deeper than 100"),
        (f'{{"a": {"1" * 30}}}', "is not valid JSON .the integer 1{20}... has more than 64 bits"),
        ("[" + "1" * 5000 + "]", "is not valid JSON"),
        ('{"a": 1e999}', "is not valid JSON .1e999 is no finite number"),
        ('{"a": [-Infinity, NaN]}', "is not valid JSON .-Infinity is no finite number"),
        ("[]", "holds a list, not one JSON object; the hint"),
        ("{}", "is not a 'a thing' file; the hint"),
        ('{"format": "a thing", "version": 2}', "is 'a thing' version 2, this code reads version 1; make it again"),
    ],
)
def test_other_json_is_one_line_of_the_kind_asked_for(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=f"{path} {message}") as caught:
        read_json(path, "a thing", "the hint", CheckpointError)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=rf"{tmp_path} cannot be read: Is a directory; the hint"):
        read_json(tmp_path, hint="the hint")


def test_a_folder_that_cannot_be_written_into_is_named() -> None:
    with pytest.raises(DataError, match="folder /proc/self cannot be written into: .*; choose another"):
        lock_folder("/proc/self").__enter__()


def test_folder_is_whole_or_absent(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with whole_folder(final, "thing") as partial:
        (partial / "a").write_text("")
        assert not final.exists()
    assert (final / "a").is_file() and [path.name for path in final.parent.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match=f"{final} exists already; choose another name for the thing"):
        with whole_folder(final, "thing"):
            raise AssertionError("not reached")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists already"), whole_folder(tmp_path / "file", "thing"):
        raise AssertionError("not reached")


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"{final}: the thing cannot be written: No space left on device"):
        with whole_folder(final, "thing") as partial:
            (partial / "a").write_text("")
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="wrong"), whole_folder(final, "thing") as partial:
        raise CheckpointError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").write_text("")
    with whole_folder(tmp_path / "out", "thing") as partial:
        (partial / "a").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_length_limit_of_a_tokenizer_without_one_is_read() -> None:
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}', "a") == {"model_max_length": int(1e30)}


def test_folder_that_another_process_fills_is_left_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out", "thing") as partial:
        (partial / "a").touch()
        with pytest.raises(CheckpointError, match="another process is filling .*out.partial"):
            with whole_folder(tmp_path / "out", "thing"):
                pass
        assert (partial / "a").exists()
    assert (tmp_path / "out" / "a").exists() and not partial.exists()

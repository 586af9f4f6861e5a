"""tools/evaluate.py before it loads a model: what is refused at once, the folder of --out, overrides behind options."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
from golden_model import ONEVISION

from megatron_llave.commands import evaluate
from megatron_llave.errors import ConfigError
from megatron_llave.locks import lock_folder


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the retrieval command up to the loading of the model; the overrides that would be loaded with."""
    line = json.dumps({"id": "a", "text": "x"}) + "\n"
    for name, text in (("queries", line), ("corpus", line), ("judgements", "a 0 a 1\n")):
        (tmp_path / name).write_text(text)
    loaded = []

    def load_model(checkpoint, overrides, average):
        loaded.append(overrides)
        raise ConfigError("far enough")

    def run(*arguments: str, checkpoint: Path = ONEVISION, out: Path = tmp_path / "out") -> list[list[str]]:
        files = [word for name in ("queries", "corpus", "judgements") for word in (f"--{name}", str(tmp_path / name))]
        common = ["retrieval", "--checkpoint", str(checkpoint), *files, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *common, *arguments])
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        assert ended.value.code == 2
        return loaded

    monkeypatch.setattr(evaluate, "load_model", load_model)
    return run


def test_overrides_behind_k(call, capsys):
    assert call("--k", "1,5", "parallel.tensor=1", "data.max_length=64") == [
        ["parallel.tensor=1", "data.max_length=64"]
    ]
    assert "far enough" in capsys.readouterr().err


@pytest.mark.parametrize("depths", ["0", "5,0", "x", "1.5", "parallel.tensor=1", ","])
def test_depths_are_checked_before_the_model_is_loaded(call, capsys, depths):
    assert call("--k", depths) == []
    assert f"--k {depths.strip(',')} must be numbers of at least 1" in capsys.readouterr().err


def test_out_is_checked_before_the_model_is_loaded(call, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert call(out=tmp_path / "file") == []
    assert f"folder {tmp_path}/file cannot be made: File exists; choose another" in capsys.readouterr().err
    with lock_folder(tmp_path / "held"):
        assert call(out=tmp_path / "held") == []
    named = f"process {os.getpid()} on {socket.gethostname()}, started "
    assert f"another process is writing into {tmp_path}/held: {named}" in capsys.readouterr().err
    assert call(out=tmp_path / "held") != []


def test_a_mistyped_checkpoint_leaves_no_folder(call, capsys, tmp_path):
    assert call(checkpoint=tmp_path / "nothing") == []
    assert "nothing does not exist; name a checkpoint" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_bar_where_nothing_is_counted(groups, capsys):
    with evaluate.progress_bar():
        pass
    assert "0/" not in capsys.readouterr().err
    with evaluate.progress_bar() as progress:
        progress("embedding", 2, 3)
    printed = capsys.readouterr()
    assert "2/3" in printed.err and printed.out == ""

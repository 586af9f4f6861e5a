"""The state of a run: what is written when, and what a reader learns of a run that was killed."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_llave.errors import DataError
from megatron_llave.locks import lock_folder
from megatron_llave.training import run_state
from megatron_llave.training.run_state import RunState, read_state


def written(folder: Path) -> tuple[str, int, str]:
    state = json.loads((folder / "state.json").read_text())
    return state["state"], state["step"], state["reason"]


def test_step_follows_the_run_but_is_not_written_at_each(tmp_path: Path, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: now[0])
    run = RunState(tmp_path, is_first_rank=True)
    seen = []
    for step in range(10):
        run.running(step)
        seen.append(written(tmp_path)[1])
        now[0] += 2
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    run.end("stopped", 10, "SIGTERM")
    assert written(tmp_path) == ("stopped", 10, "SIGTERM")
    run.fail("too late")
    assert written(tmp_path) == ("stopped", 10, "SIGTERM")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_failure_of_any_rank_is_told_and_its_cause_is_kept(tmp_path: Path) -> None:
    first, other = RunState(tmp_path, is_first_rank=True), RunState(tmp_path, is_first_rank=False)
    other.fail("before the start")
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves no state"
    first.running(3)
    other.running(3)
    other.fail("shard 7 is missing")
    first.fail("connection closed", is_secondary=True)
    assert written(tmp_path) == ("failed", 3, "shard 7 is missing")
    again = RunState(tmp_path, is_first_rank=True)
    again.fail("data.path does not exist")
    assert written(tmp_path) == ("failed", 3, "data.path does not exist")
    first.end("finished", 9)
    RunState(tmp_path, is_first_rank=True).fail("train.output has a finished run")
    assert written(tmp_path) == ("finished", 9, ""), "a start that is refused leaves the end of the run as it was"


def test_killed_run_is_lost_and_a_live_one_is_running(tmp_path: Path) -> None:
    run = RunState(tmp_path, is_first_rank=True)
    with lock_folder(tmp_path):
        run.running(1)
        assert read_state(tmp_path)["state"] == "running"
    assert written(tmp_path)[0] == "running" and read_state(tmp_path)["state"] == "lost"
    run.end("finished", 2)
    assert read_state(tmp_path)["state"] == "finished"


def test_state_that_cannot_be_written_is_said_once(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(run_state, "STATE_SECONDS", -1)
    run = RunState(tmp_path / "run", is_first_rank=True)
    (tmp_path / "run").mkdir()
    run.running(1)
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        run.running(step)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"{tmp_path}/run/state.json cannot be written: No such file or directory; the run is running"
    with pytest.raises(DataError, match="state.json does not exist; a run writes it when it starts"):
        read_state(tmp_path / "run")

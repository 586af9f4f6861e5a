"""The run's log: what is written, what is printed, and what a killed or resumed run leaves."""

import json
import math
import resource
import signal
from types import SimpleNamespace

import pytest

from megatron_llave.errors import DataError
from megatron_llave.training.logger import LOG_FILE, RunLog, read_log


def record(step: int, **given) -> dict:
    """A step's record in which each number is told apart from the others."""
    values = {
        "step": step,
        "subset": "i2t",
        "loss": 0.25,
        "learning_rate": 1.25,
        "gradient_norm": 2.25,
        "temperature": 3.25,
        "alpha": 4.25,
        "pairs": 32,
        "tokens": 1000,
        "positive_similarity": 7.25,
        "hardest_negative_similarity": 8.25,
        "skipped": 0,
        "seconds": 0.5,
    }
    return values | given


def test_each_step_is_one_line_that_is_there_at_once(tmp_path):
    log = RunLog(tmp_path / "new" / "run", interval=0, total_steps=3, enabled=True)
    for step in (1, 2, 3):
        log.step(record(step))
        # Read while the file is still open: a killed run must lose nothing.
        assert read_log(tmp_path / "new" / "run" / LOG_FILE) == [record(s) for s in range(1, step + 1)]
    log.close()
    lines = (tmp_path / "new" / "run" / LOG_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_progress_line_holds_means_of_the_interval_and_time_left(tmp_path, capsys):
    log = RunLog(tmp_path, interval=3, total_steps=7, enabled=True)
    log.step(record(1, pairs=10, seconds=1.0))
    assert capsys.readouterr().out == "step 1/7 | ETA 0:00:06 | loss 0.25 | 10.0 pairs/s | lr 1.2\n"  # there at once
    log.step(record(2, pairs=10, seconds=1.0, skipped=3, data_seconds=0.5))
    assert capsys.readouterr().out == ""
    log.step(record(3, pairs=20, seconds=3.0, loss=1.5))
    line = capsys.readouterr().out.rstrip("\n")
    # 30 pairs in 4 s; the mean of two losses; 4 steps of 5/3 s.
    assert line == "step 3/7 | ETA 0:00:07 | loss 0.875 | 7.5 pairs/s | skipped 3 | data wait 12%" and len(line) <= 80
    for step in (4, 5, 6):
        log.step(record(step, pairs=50, seconds=0.5, skipped=1))
    line = capsys.readouterr().out
    assert "100.0 pairs/s" in line and "skipped 6" in line and "data wait" not in line  # the count goes on


@pytest.mark.parametrize("seconds", [1e-3, 0.5, 80.0, 9999.0])
@pytest.mark.parametrize("loss", [1e-12, 9.87654321, 12345.678, math.inf, math.nan])
@pytest.mark.parametrize("skipped", [0, 1, 9_999_999])
def test_progress_line_fits_a_terminal_of_80_columns(tmp_path, capsys, seconds, loss, skipped):
    log = RunLog(tmp_path, interval=1, total_steps=2_000_000, enabled=True)
    for step in (999_999, 1_000_000):
        waits = {"data_seconds": seconds} if skipped else {}
        log.step(
            record(step, seconds=seconds, loss=loss, skipped=skipped, pairs=4096, learning_rate=9.8765e-6, **waits)
        )
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80 and "/2000000 | ETA " in line and "loss " in line, line
        assert "skipped " in line if skipped else "skipped" not in line


def test_last_step_is_printed_even_off_the_interval(tmp_path, capsys):
    log = RunLog(tmp_path, interval=10, total_steps=3, enabled=True)
    for step in (1, 2, 3):
        log.step(record(step))
    first, last = capsys.readouterr().out.splitlines()
    assert "step 1/3" in first and "step 3/3" in last and "ETA 0:00:00" in last


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", interval=1, total_steps=1, enabled=False)
    log.step(record(1))
    log.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_half_written_last_line_is_skipped_and_does_not_spoil_the_next(tmp_path):
    log = RunLog(tmp_path, 0, 9, enabled=True)
    log.step(record(1))
    log.step(record(2))
    log.close()
    path = tmp_path / LOG_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert [r["step"] for r in read_log(path)] == [1]
    resumed = RunLog(tmp_path, 0, 9, enabled=True)
    resumed.step(record(2, loss=9.0))
    assert read_log(path) == [record(1), record(2, loss=9.0)]


def test_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    for steps, loss in (((1, 2, 3, 4, 5), 1.0), ((3, 4), 2.0)):
        log = RunLog(tmp_path, 0, 5, enabled=True)
        for step in steps:
            log.step(record(step, loss=loss))
        log.close()
    records = read_log(tmp_path / LOG_FILE)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    log = RunLog(tmp_path, 1, 2, enabled=True)
    log.step(record(1, loss=float("nan"), gradient_norm=float("inf")))
    written = (tmp_path / LOG_FILE).read_text()
    assert "NaN" not in written and "Infinity" not in written
    assert read_log(tmp_path / LOG_FILE)[0]["loss"] is None


def test_damaged_and_missing_logs_are_named(tmp_path):
    path = tmp_path / LOG_FILE
    with pytest.raises(DataError, match="log.jsonl does not exist"):
        read_log(path)
    for bad in ("{nonsense}", "[]", '{"loss": 1}'):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
        with pytest.raises(DataError, match="line 2 is not a step's record"):
            read_log(path)
    path.write_text("")
    assert read_log(path) == []


def test_evaluations_have_a_file_of_their_own(tmp_path, capsys):
    log = RunLog(tmp_path, 1, 2, enabled=True)
    log.step(record(1))
    capsys.readouterr()
    log.evaluation(1, {"a": 10.0, "b": 30.0}, seconds=2.5, candidates={"a": 7, "b": 1000})
    log.close()
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "precision_at_1": {"a": 10.0, "b": 30.0}, "seconds": 2.5, "candidates": {"a": 7, "b": 1000}}
    ]
    assert capsys.readouterr().out == "step 1: Precision@1 20.0 %, mean of 2 sets\n"
    assert len(read_log(tmp_path / LOG_FILE)) == 1


def test_an_evaluation_without_scores_is_written_as_null(tmp_path, capsys):
    told = []
    tracker = SimpleNamespace(step=lambda step, values: told.append(values), close=lambda: None)
    log = RunLog(tmp_path, 1, 2, enabled=True, trackers=[tracker])
    log.evaluation(1, {"a": math.nan, "b": math.nan}, seconds=2.5, candidates={})
    log.close()
    written = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert written == {"step": 1, "precision_at_1": {"a": None, "b": None}, "seconds": 2.5, "candidates": {}}
    assert capsys.readouterr().out == "" and not any(told)


def test_removed_folder_costs_the_lines_so_far(tmp_path, caplog):
    log = RunLog(tmp_path / "run", 0, 9, enabled=True)
    log.step(record(1))
    (tmp_path / "run" / LOG_FILE).unlink()
    (tmp_path / "run").rmdir()
    log.step(record(2))
    log.step(record(3))
    log.close()
    [warning] = [one.getMessage() for one in caplog.records]
    assert warning == f"{tmp_path}/run/{LOG_FILE} has been removed; the run continues and begins a new one"
    assert [one["step"] for one in read_log(tmp_path / "run" / LOG_FILE)] == [2, 3]


def test_full_disk_costs_lines_and_not_the_run(tmp_path, caplog, monkeypatch):
    log = RunLog(tmp_path, 0, 9, enabled=True)
    log.step(record(1))
    log.close()
    log._file = open("/dev/full", "wb", buffering=0)  # every write fails: no space left on device
    log.step(record(2))
    log.step(record(3))
    [warning] = [one.getMessage() for one in caplog.records]
    assert warning == f"log in {tmp_path} cannot be written: No space left on device; the run continues without it"
    log.close()
    assert [one["step"] for one in read_log(tmp_path / LOG_FILE)] == [1]


def test_line_that_fits_in_part_is_not_left_in_part(tmp_path, caplog):
    log = RunLog(tmp_path, 0, 9, enabled=True)
    log.step(record(1))
    size = (tmp_path / LOG_FILE).stat().st_size
    held = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, held[1]))
        log.step(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, held)
        signal.signal(signal.SIGXFSZ, previous)
    log.step(record(3))
    log.close()
    assert [one["step"] for one in read_log(tmp_path / LOG_FILE)] == [1, 3]
    assert len(caplog.records) == 1

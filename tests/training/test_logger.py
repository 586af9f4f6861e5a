"""The run's log: what is written, what is printed, and what a killed or resumed run leaves."""

import json
import math
import re
import resource
import signal
import sys
from itertools import product
from types import SimpleNamespace

import pytest

from megatron_llave.errors import DataError
from megatron_llave.training.logger import LOG_FILE, PROGRESS_FILE, RunLog, read_log
from megatron_llave.training.progress import duration, fixed


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
    log.step(record(1, pairs=10, seconds=1.0, memory_gb=1.5))
    # There at once.
    assert capsys.readouterr().out == "step 1/7  loss 0.2500  10.00 pairs/s  ETA  0m06s  1.50GB\n"
    log.step(record(2, pairs=10, seconds=1.0, skipped=3, data_seconds=0.5, similarity_margin=0.5))
    assert capsys.readouterr().out == ""
    log.step(record(3, pairs=20, seconds=3.0, loss=1.5, similarity_margin=math.nan))
    line = capsys.readouterr().out.rstrip("\n")
    # 30 pairs in 4 s; the mean of two losses, and of the margins that are numbers; 4 steps of 5/3 s.
    # The margin has no room beside the wait.
    assert line == "step 3/7  loss 0.8750  7.500 pairs/s  ETA  0m07s  skipped 3  wait 12%" and len(line) <= 80
    for step in (4, 5, 6):
        log.step(record(step, pairs=50, seconds=0.5, skipped=1, similarity_margin=[0.5, math.nan, 0.25][step - 4]))
    line = capsys.readouterr().out
    assert "100.0 pairs/s" in line and "margin 0.375  skipped 6\n" in line  # the count goes on, and nothing waits
    long = RunLog(tmp_path, interval=1, total_steps=99_999, enabled=True)
    long.step(record(9, seconds=1.0, data_seconds=0.6, similarity_margin=-0.5, memory_gb=12.3))
    line = capsys.readouterr().out.rstrip("\n")
    assert (
        line == "step     9/99999  loss 0.2500  32.00 pairs/s  ETA  1d03h  margin -0.50  wait 60%" and len(line) == 80
    )


def test_long_form_of_the_line_is_in_the_text_log(tmp_path, capsys):
    log = RunLog(tmp_path, interval=2, total_steps=2, enabled=True)
    log.step(record(1))
    log.step(record(2, loss=math.nan, skipped=1, data_seconds=0.005, mfu=0.314, memory_gb=12.3, similarity_margin=0.5))
    log.evaluation(2, {"a": 10.0, "b": 30.0}, seconds=65.0, candidates={})
    first, last, scores = (tmp_path / PROGRESS_FILE).read_text().splitlines()
    times = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line)[1] for line in (first, last, scores)]
    assert times[0].startswith("step 1/2 | subset i2t | loss 0.25 | learning rate 1.25 | gradient norm 2.25 | ")
    assert times[1] == (
        "step 2/2 | subset i2t | loss nan | margin 0.500 | learning rate 1.25 | gradient norm 2.25 | temperature 3.25 "
        "| alpha 4.25 | positive 7.250 | hardest negative 8.250 | MFU 31.4% | memory GB 12.30 | pairs/s 64 "
        "| tokens/s 2000 | data wait 1.0% | skipped 1 | elapsed 0m01s | ETA 0m00s"
    )
    assert times[2] == "step 2: Precision@1 20.0 %, mean of 2 sets in 1m05s: a 10.0, b 30.0"
    assert capsys.readouterr().out.splitlines()[-1] == "step 2: Precision@1 20.0 %, mean of 2 sets"


@pytest.mark.parametrize("steps", [100, 100_000, 2_000_000])
@pytest.mark.parametrize("skipped", [0, 1, 9_999_999])
def test_progress_line_fits_a_terminal_of_80_columns(tmp_path, capsys, skipped, steps):
    durations = (1e-3, 0.5, 80.0, 9999.0, 99_999.0)
    for seconds, loss in product(durations, (1e-12, 0.00123, 9.87654321, -12345.678, 1e30, math.inf, math.nan)):
        log = RunLog(tmp_path, interval=1, total_steps=steps, enabled=True)
        values = {"seconds": seconds, "loss": loss, "skipped": skipped, "pairs": 4096, "similarity_margin": -0.25}
        for step in (steps // 2 - 1, steps // 2):
            log.step(record(step, **values, memory_gb=0.5, **({"data_seconds": seconds} if skipped else {})))
        log.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 70
    for line in lines:
        assert len(line) <= 80 and f"/{steps}  loss " in line and "pairs/s  ETA " in line, line
        assert "skipped " in line if skipped else "skipped" not in line


def test_lines_of_a_run_are_aligned(tmp_path, capsys):
    log = RunLog(tmp_path, interval=1, total_steps=100_000, enabled=True)
    losses, seconds = (8.123, 0.5, 0.0123, 12.5, math.nan), (0.1, 4.0, 3e-4, 40.0, 0.5)
    for step, loss, took in zip((1, 20, 300, 4000, 100_000), losses, seconds):
        log.step(record(step, loss=loss, seconds=took, similarity_margin=0.1 - took, memory_gb=10 * took))
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines} == {80}
    for name in ("/", "loss", "pairs/s", "ETA", "margin", "GB"):
        assert len({line.index(name) for line in lines}) == 1, name


NUMBERS = {
    6: {2.40731: "2.4073", 12.40731: "12.407", 0.0012: "0.0012", 9.999996: "10.000", -3.14159: "-3.142"},
    7: {1.234e-5: " 1.2e-5", 1.234e-12: "1.2e-12", -1e-5: "-1.0e-5", 1234567.0: "1234567", 12345678.0: "  1.2e7"},
    5: {0.0: "0.000", 99999.7: "1.0e5", 1319.4: " 1319", -math.inf: " -inf", 1.2e-12: "1e-12"},
    4: {0.25: "0.25", 123.4: " 123", 12.34: "12.3", -0.25: "-0.2", math.inf: " inf"},
}
"""Width -> number -> text."""


@pytest.mark.parametrize(
    ("width", "value", "text"), [(w, *pair) for w, texts in NUMBERS.items() for pair in texts.items()]
)
def test_numbers_have_as_many_digits_as_their_column(width, value, text):
    assert fixed(value, width) == text


def test_durations_have_at_most_six_columns():
    day = 86400
    given = (0, 59.6, 3599, 3600, day - 61, day, 99.9 * day, 100 * day, 1e6 * day)
    said = ["0m00s", "1m00s", "59m59s", "1h00m", "23h58m", "1d00h", "99d21h", "100d", "2739y"]
    assert [duration(seconds) for seconds in given] == said and max(map(len, said)) == 6


def line_on_a_terminal(monkeypatch, capsys, tmp_path, columns: str, **environment: str) -> str:
    """A line as it is written where standard output is a terminal of this width."""
    for name, value in {"COLUMNS": columns, "TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = RunLog(tmp_path, interval=1, total_steps=100_000, enabled=True)
    log.step(record(4000, loss=math.nan, similarity_margin=0.1, memory_gb=12.3, data_seconds=0.4))
    log.close()
    return capsys.readouterr().out


def test_colours_are_those_of_a_terminal_that_wants_some(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = line_on_a_terminal(monkeypatch, capsys, tmp_path, "200")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert "\x1b[1;31m   nan\x1b[0m" in coloured and "\x1b[33m80%\x1b[0m" in coloured
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        without = line_on_a_terminal(monkeypatch, capsys, tmp_path, "200", **environment)
        assert "\x1b[3" not in without and "\x1b[1;3" not in without
        assert re.sub(r"\x1b\[[0-9;]*m", "", without) == plain


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ("65", "step   4000/100000  loss    nan  64.00 pairs/s  ETA 13h20m"),
        ("50", "step   4000/100000  loss    nan  ETA 13h20m"),
        ("35", "step   4000/100000  loss    nan"),
        ("20", "step   4000/100000  loss    nan"),
    ],
)
def test_a_narrow_terminal_gets_fewer_fields_in_one_line(monkeypatch, capsys, tmp_path, columns, line):
    coloured = line_on_a_terminal(monkeypatch, capsys, tmp_path, columns)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == f"{line}\n"


def test_standard_output_that_is_gone_costs_its_lines(tmp_path, caplog, monkeypatch):
    log = RunLog(tmp_path, 1, 9, enabled=True)
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    log.step(record(1))
    log.step(record(2))
    [warning] = [one.getMessage() for one in caplog.records]
    assert warning == "standard output cannot be written: No space left on device; the run continues without it"
    assert len(read_log(tmp_path / LOG_FILE)) == len((tmp_path / PROGRESS_FILE).read_text().splitlines()) == 2


def test_last_step_is_printed_even_off_the_interval(tmp_path, capsys):
    log = RunLog(tmp_path, interval=10, total_steps=3, enabled=True)
    for step in (1, 2, 3):
        log.step(record(step))
    first, last = capsys.readouterr().out.splitlines()
    assert "step 1/3" in first and "step 3/3" in last and "ETA  0m00s" in last


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
    tracker = SimpleNamespace(step=lambda step, values, drawn: told.append(values), close=lambda: None)
    log = RunLog(tmp_path, 1, 2, enabled=True, trackers=[tracker])
    log.evaluation(1, {"a": math.nan, "b": math.nan}, seconds=2.5, candidates={})
    log.close()
    written = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert written == {"step": 1, "precision_at_1": {"a": None, "b": None}, "seconds": 2.5, "candidates": {}}
    assert capsys.readouterr().out == "" and not any(told)


def test_a_montage_that_cannot_be_drawn_is_one_line(tmp_path, caplog):
    log = RunLog(tmp_path, 0, 9, enabled=True)

    def draw(path):
        raise DataError("image birds/1.png is damaged")

    for step in (1, 2):
        log.step(record(step))
        log.montage(draw)
    [warning] = [one.getMessage() for one in caplog.records]
    said = "image birds/1.png is damaged; the run continues without it"
    assert warning == f"{tmp_path}/montages cannot be written: {said}"


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

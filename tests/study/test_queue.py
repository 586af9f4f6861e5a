"""The queue, with runs that are scripts of a few lines: order, slots, failures, kills, what is not done again."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forking import end, fork

from megatron_llave.config.load import load_config
from megatron_llave.errors import ConfigError
from megatron_llave.study import queue
from megatron_llave.study.queue import run_all
from megatron_llave.study.run_folder import Plan, commands, quoted, ranks_of, reason
from megatron_llave.study.variants import STUDIES, Run, plan
from megatron_llave.training.run_state import write_state

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "studies" / "tiny.yaml"
WORK = """
import sys, time
from pathlib import Path
folder, together, log = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
with log.open("a") as file: file.write(f"begin {folder.name} {time.time()}\\n")
while log.read_text().count("begin") < together: time.sleep(0.01)
time.sleep(0.5 if together else 0)  # for one more, which must not come
if folder.name in sys.argv[4:]: sys.exit("error: this one cannot")
(folder / "evaluation").mkdir(exist_ok=True)
(folder / "evaluation" / "report.json").write_text("{}")
with log.open("a") as file: file.write(f"end {folder.name} {time.time()}\\n")
"""


@pytest.fixture
def scripted(monkeypatch, tmp_path: Path):
    """Returns what starts a study of runs that log when they begin and end, the end once `together` have begun."""
    log = tmp_path / "log"

    def start(
        runs: list[Run], processes: int, per_run=1, together=0, failing=(), overrides=(), study="hardness", told=str
    ):
        def commands(shared: Plan, run: Run, cfg) -> Iterator[list[str]]:
            yield [sys.executable, "-c", WORK, str(shared.folder(run)), str(together), str(log), *failing]

        monkeypatch.setattr(queue, "commands", commands)
        monkeypatch.setattr(queue, "POLL_SECONDS", 0.02)
        shared = Plan(CONFIG, None, tmp_path / "out", tuple(overrides), per_run)
        lines: list[str] = []
        return run_all(shared, study, runs, processes, lambda line: (lines.append(line), told(line))), lines

    start.log = log
    return start


def runs_of(name: str, seeds=(0,), variants=()) -> list[Run]:
    cfg = load_config(CONFIG)
    return plan(STUDIES[name](cfg, 1), cfg, seeds, variants, trained_start=name == "freezing")


def events(log: Path) -> list[tuple[str, str]]:
    return [tuple(line.split()[:2]) for line in log.read_text().splitlines()]


def test_finished_runs_are_not_done_again(scripted) -> None:
    runs = runs_of("hardness", variants=["alpha 1"])
    outcome, lines = scripted(runs, 2)
    assert (outcome.num_before, outcome.num_done, outcome.failed) == (0, 3, {})
    assert lines[0] == "before-training-seed0: started" and lines[-1].startswith("alpha-1-seed0: finished")
    again, lines = scripted(runs_of("hardness", seeds=(0, 1), variants=["alpha 1"]), 2)
    assert (again.num_before, again.num_done) == (3, 2)
    assert [name for what, name in events(scripted.log) if what == "begin"].count("alpha-1-seed0") == 1


@pytest.mark.parametrize(("processes", "per_run", "most"), [(1, 1, 1), (3, 1, 3), (3, 2, 1)])
def test_no_more_at_a_time_than_the_processes_allow(scripted, processes: int, per_run: int, most: int) -> None:
    scripted(runs_of("hardness")[1:4], processes, per_run, together=most)
    running = highest = 0
    for what, _ in events(scripted.log):
        running += 1 if what == "begin" else -1
        highest = max(highest, running)
    assert highest == most


def test_runs_wait_for_those_they_need_and_fail_with_them(scripted) -> None:
    runs = runs_of("freezing", seeds=(0, 1), variants=["merged, 50 % of frozen"])
    outcome, _ = scripted(runs, 4, failing=["vision-frozen-seed0"])
    order = events(scripted.log)
    assert order.index(("end", "start-seed1")) < order.index(("begin", "nothing-frozen-seed1"))
    assert order.index(("end", "vision-frozen-seed1")) < order.index(("begin", "merged-50-of-frozen-seed1"))
    assert outcome.failed == {
        "vision-frozen-seed0": "this one cannot",
        "merged-50-of-frozen-seed0": "it needs vision-frozen-seed0, which has failed",
    }
    again, _ = scripted(runs, 4)
    assert (again.num_done, again.failed) == (2, {})


def test_run_whose_needs_are_left_out_says_so(scripted) -> None:
    """As one task of a job array; when what it needs is there, it runs."""
    runs = runs_of("freezing", variants=["merged, 50 % of frozen"])
    outcome, _ = scripted(runs[-1:], 1)
    assert outcome.failed["merged-50-of-frozen-seed0"].endswith("-frozen-seed0, which is not finished")
    scripted(runs[:-1], 2)
    assert scripted(runs[-1:], 1)[0].num_done == 1


def test_folder_with_other_settings_is_refused_before_anything_starts(scripted, tmp_path: Path) -> None:
    scripted(runs_of("hardness")[:2], 1)
    with pytest.raises(ConfigError, match="train.steps was 600, is 500; choose another --out"):
        scripted(runs_of("hardness"), 1, overrides=["train.steps=500"])
    with pytest.raises(ConfigError, match="another study or other settings: config.train.steps was 600, is 500"):
        scripted(runs_of("hardness", seeds=(7,)), 1, overrides=["train.steps=500"])  # no run of this seed is there
    with pytest.raises(ConfigError, match="processes per run was 1, is 2"):
        scripted(runs_of("hardness"), 2, per_run=2)
    with pytest.raises(ConfigError, match="study was hardness, is negatives"):
        scripted(runs_of("hardness")[:2], 1, study="negatives")
    (tmp_path / "out" / "study.json").write_text("{")
    with pytest.raises(ConfigError, match="study.json is not valid JSON"):
        scripted(runs_of("hardness")[:2], 1)
    assert len(events(scripted.log)) == 4
    assert not list((tmp_path / "out").glob("*.partial"))


def test_names_that_yaml_would_cut(tmp_path: Path) -> None:
    shared = Plan(CONFIG, None, tmp_path / "a #b: c='d\"", (), 1)
    [run] = runs_of("hardness", variants=["alpha 1"])[1:2]
    assert shared.load(run).train.output == str(shared.out / run.name)


UNTIL_TOLD = "import sys; sys.stdin.read()"


def end_when_waited_for(process: subprocess.Popen, line: str) -> None:
    if "another process is at it" in line:
        process.stdin.close()


def test_ranks_that_outlive_their_torchrun_are_waited_for(scripted, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "alpha-0-seed0"
    word = f"train.output={quoted(folder)}"
    with subprocess.Popen([sys.executable, "-c", UNTIL_TOLD, word], stdin=subprocess.PIPE) as left:
        assert [one.pid for one in ranks_of(folder)] == [left.pid]
        outcome, lines = scripted(runs_of("hardness", variants=["alpha 1"]), 3, told=partial(end_when_waited_for, left))
        assert left.poll() == 0
    assert outcome.num_done == 3 and any("another process is at it" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "slot", "seen"), [(None, 0, "0,1"), (None, 3, "6,7"), ("4,5,GPU-a,7", 1, "GPU-a,7"), ("", 0, "0,1")]
)
def test_each_run_has_gpus_of_its_own(monkeypatch, tmp_path: Path, given: str | None, slot: int, seen: str) -> None:
    monkeypatch.setattr(queue.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given) if given is not None else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", raising=False
    )
    command = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    with (tmp_path / "lock").open("w") as lock:
        assert queue._launch(Plan(CONFIG, None, tmp_path, (), 2), tmp_path, command, slot, lock).wait(60) == 0
    assert (tmp_path / "output.log").read_text().strip() == seen
    with pytest.raises(ConfigError, match="--processes 9 is more than the"):
        queue.visible_gpus(9)


def test_run_that_somebody_else_is_at_is_waited_for(scripted, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "alpha-0-seed0"
    folder.mkdir(parents=True)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); "
    command = [sys.executable, "-c", holder + UNTIL_TOLD, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        outcome, lines = scripted(
            runs_of("hardness", variants=["alpha 1"]), 3, told=partial(end_when_waited_for, other)
        )
    assert outcome.num_done == 3
    [waits] = [number for number, line in enumerate(lines) if "another process is at it" in line]
    assert waits < lines.index("alpha-0-seed0: started")


STUDY = """
import signal, sys
from pathlib import Path
from megatron_llave.config.load import load_config
from megatron_llave.study import queue
from megatron_llave.study.variants import STUDIES, plan
from megatron_llave.study.run_folder import Plan

config, out, run = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
queue.commands = lambda shared, one, cfg: iter([[sys.executable, "-c", run]])
cfg = load_config(config)
[first] = plan(STUDIES["hardness"](cfg, 1), cfg, [0], ["alpha 1"])[1:2]
queue.run_all(Plan(config, None, out, (), 1), "hardness", [first], 1, print)
"""
SLEEPER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *given: sys.exit(print("asked", flush=True)))
print("runs", flush=True)
deadline = time.monotonic() + 200
while not pathlib.Path({may_end!r}).exists() and time.monotonic() < deadline: time.sleep(0.05)
"""


@pytest.fixture
def going_on(tmp_path: Path) -> Iterator[tuple[BaseProcess, Path]]:
    """A study in a process of its own, in the middle of its only run, and what that run prints."""
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    sleeper = SLEEPER.format(may_end=str(tmp_path / "may end"))
    study = fork([str(script), str(CONFIG), str(tmp_path), sleeper], (os.devnull, os.devnull), {})
    output = tmp_path / "alpha-0-seed0" / "output.log"
    deadline = time.monotonic() + 200
    while not (output.is_file() and "runs" in output.read_text()):
        assert time.monotonic() < deadline and study.is_alive()
        time.sleep(0.05)
    yield study, output
    end([study])


def test_a_killed_study_leaves_its_runs_locked_until_they_have_ended(going_on) -> None:
    """The lock is the run's own too: a second study cannot start it beside the first one's."""
    study, output = going_on
    study.kill()
    study.join()
    with (output.parent / ".lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (output.parents[1] / "may end").touch()
        fcntl.flock(lock, fcntl.LOCK_EX)  # free when the run has ended
    assert output.read_text().split() == ["runs"]


def test_a_study_that_is_asked_to_end_asks_its_runs(going_on) -> None:
    study, output = going_on
    study.terminate()
    study.join(60)
    assert study.exitcode == 143
    assert output.read_text().split() == ["runs", "asked"]


def test_a_stopped_run_is_not_evaluated(tmp_path: Path, monkeypatch) -> None:
    """Under torchrun a run that was asked to stop, by a file `stop` say, ends with status 0."""
    shared = Plan(CONFIG, None, tmp_path, (), 1)
    run = runs_of("hardness", variants=["alpha 1"])[1]

    def stopped(shared: Plan, run: Run, cfg) -> Iterator[list[str]]:
        steps = commands(shared, run, cfg)
        assert "megatron_llave.train" in next(steps)
        write_state(shared.folder(run), "stopped", 200, "a file 'stop' in train.output")
        yield [sys.executable, "-c", ""]
        yield from steps

    monkeypatch.setattr(queue, "commands", stopped)
    outcome = run_all(shared, "hardness", [run], 1, print)
    assert outcome.failed == {run.name: "stopped after step 200: a file 'stop' in train.output"}


def test_mmeb_is_evaluated_by_its_own_command(tmp_path: Path) -> None:
    data = tmp_path / "MMEB-eval"
    (data / "CIRR").mkdir(parents=True)
    (data / "CIRR" / "test-00000-of-00001.parquet").write_bytes(b"")
    overrides = (f"evaluate.path={data}", "evaluate.images=pictures", "evaluate.sets=[CIRR, WebQA]")
    shared = Plan(CONFIG, None, tmp_path, overrides, 2)
    run = runs_of("hardness", variants=["alpha 1"])[1]
    write_finished(shared.folder(run))
    train, evaluate = commands(shared, run, shared.load(run))
    assert train[-2:] == ["--resume", "auto"]
    tool = next(place for place, word in enumerate(evaluate) if word.endswith("rank.py")) + 1
    assert evaluate[tool : tool + 2] == ["evaluate", "mmeb"]
    assert evaluate[evaluate.index("--images") + 1] == "pictures"
    named = evaluate[evaluate.index("--subsets") + 1 :]
    assert named[0] == "CIRR,WebQA" and all("=" in word for word in named[1:])


def write_finished(folder: Path) -> None:
    folder.mkdir()
    write_state(folder, "finished", 600)


def test_last_error_line_is_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "output.log"
    file.write_text("error: old\nstep 1\nerror: the loss was not finite in 10 steps\nTraceback ...\n")
    assert reason(file, 1) == "the loss was not finite in 10 steps"
    file.write_text("Killed\n")
    assert reason(file, -9) == f"exit status -9, see {file}"

"""Runs that mine while they train: which command they start, what they keep, and what ends or interrupts them."""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import psutil
import pytest
from forking import run_script
from launching import losses
from megatron.core.process_groups_config import ProcessGroupCollection
from run_ranks import run_ranks, started_ranks

from megatron_llave.config.load import load_config
from megatron_llave.config.mining import Rules, Search
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.refreshed_negatives import all_mined, folder_of
from megatron_llave.distributed.launcher import of_no_launcher
from megatron_llave.errors import CheckpointError
from megatron_llave.files import write_json
from megatron_llave.mining.refresh import Refresh, mining_arguments, tidy
from megatron_llave.options import mine as options

ROOT = Path(__file__).resolve().parents[2]
START, TOOL = ROOT / "megatron_llave" / "train.py", ROOT / "tools" / "mine.py"
RULES = {"negatives": 2, "depth": 20, "ratio": "null"}
INTERVAL, LAST = 3, 12
OVERRIDES = [
    *(f"train.steps={LAST}", "train.global_batch_size=16", "optimizer.warmup_steps=0", "log.interval=1"),
    *(f"mining.interval={INTERVAL}", f"checkpoint.interval={INTERVAL}", "checkpoint.keep_last=0"),
    *("data.hard_negatives=3", "data.workers=1", *(f"mining.{key}={value}" for key, value in RULES.items())),
]
LAYOUTS = {1: [], 2: ["mining.processes=2", "train.tokens_per_micro_batch=4000"]}
"""Overrides for the runs of one and of two ranks."""


def command(data: Path, output: Path, world: int, *more: str) -> list[str]:
    config = str(ROOT / "examples" / "studies" / "tiny.yaml")
    return ["--config", config, f"data.path={data}", f"train.output={output}", *OVERRIDES, *LAYOUTS[world], *more]


def configured(*overrides: str) -> RunConfig:
    return load_config(ROOT / "examples" / "studies" / "tiny.yaml", [*OVERRIDES, *overrides])


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module", params=[1, 2])
def whole(request: pytest.FixtureRequest, openmoji_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A run that nothing interrupts: number of its ranks, output directory, what it has printed."""
    output = tmp_path_factory.mktemp(f"whole{request.param}") / "run"
    return request.param, output, run_ranks(request.param, START, *command(openmoji_data, output, request.param))


@pytest.mark.slow
def test_negatives_are_those_of_the_command(whole: tuple, openmoji_data: Path, tmp_path: Path) -> None:
    world, output, told = whole
    assert all_mined(output) == [3, 6]  # what the checkpoint after nine steps would find is for no step
    rules = [f"--{key}={'none' if value == 'null' else value}" for key, value in RULES.items()]
    subsets = ["--subsets", *configured().data.subsets]
    for mined in (3, 6):
        checkpoint, out = output / "checkpoints" / f"step-{mined:07d}", tmp_path / str(mined)
        plain = ["--checkpoint", checkpoint, *subsets, "--data", openmoji_data, "--out", out, *rules]
        done = run_script(TOOL, "negatives", *plain)
        assert done.returncode == 0, done.stderr
        assert tars(out) == tars(folder_of(output, mined)) and len(tars(out)) == 4
        assert re.search(rf"negatives of step {mined}: mined in \d+ s, 2.0 per query", told)
        assert not folder_of(output, mined).with_suffix(".embeddings").exists()
    assert tars(tmp_path / "3") != tars(tmp_path / "6")
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [one.get("negatives_age") for one in records] == [None] * 6 + [3, 4, 5] * 2
    assert [one["hard_negatives"] > 0 for one in records] == [False] * 6 + [True] * 6
    assert all(one["mining_seconds"] >= 0 for one in records[6:])
    assert "negatives age 5" in (output / "progress.log").read_text()


@pytest.mark.slow
def test_killed_while_mining_it_resumes_bit_equal(whole: tuple, openmoji_data: Path, tmp_path: Path) -> None:
    world, expected, _ = whole
    output = tmp_path / "run"
    run = command(openmoji_data, output, world)
    printed = tmp_path / "printed"
    printed.touch()
    with started_ranks(world, [str(START), *run], str(printed)) as ranks:
        wait_for(lambda: "negatives of step 6: being mined" in printed.read_text(), printed)
        time.sleep(3)  # it is mining
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
        wait_for(lambda: not miners(output), printed)
    assert not (folder_of(output, 6) / "report.html").exists()
    run_ranks(world, START, *run, "--resume", "auto")
    assert losses(output) == losses(expected)


@pytest.mark.slow
def test_a_mining_that_fails_is_one_line_and_tried_again(openmoji_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    store = folder_of(output, 3).with_suffix(".embeddings")
    store.parent.mkdir(parents=True)
    store.touch()
    failed = run_script(START, *command(openmoji_data, output, 1))
    log = folder_of(output, 3).with_suffix(".log")
    what = f"error: mining the negatives of step 3 has failed with status 2; {log} ends with: error: "
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith(what), failed.stderr
    assert "a resumed run tries again" in failed.stderr
    store.unlink()
    done = run_script(START, *command(openmoji_data, output, 1), "--resume", "auto")
    assert done.returncode == 0 and sorted(losses(output)) == list(range(1, LAST + 1)), done.stderr


@pytest.mark.slow
def test_the_command_is_given_by_hand(openmoji_data: Path, tmp_path: Path) -> None:
    """Two ranks print the command, wait for its result, are stopped while they wait, and go on.

    The checkpoint that is to be mined is kept, although only the newest one is to be.
    """
    output, printed = tmp_path / "run", tmp_path / "printed"
    printed.touch()
    run = command(openmoji_data, output, 2, "mining.processes=0", "checkpoint.keep_last=1")
    with started_ranks(2, [str(START), *run], str(printed)):
        wait_for(lambda: "step 7: waiting for the negatives of step 3" in printed.read_text(), printed)
        (output / "stop").touch()
        wait_for(lambda: "stopped after step 6 and saved" in printed.read_text(), printed)
    [line] = re.findall(
        r"^negatives of step 3: to be mined before step 7 by llave mine (.*)$", printed.read_text(), re.M
    )
    assert run_script(TOOL, *shlex.split(line)).returncode == 0
    printed.write_text("")
    with started_ranks(2, [str(START), *run, "--resume", "auto"], str(printed)) as ranks:
        wait_for(lambda: "step 10: waiting for the negatives of step 6" in printed.read_text(), printed)
        [line] = re.findall(r"^negatives of step 6: .* by llave mine (.*)$", printed.read_text(), re.M)
        assert run_script(TOOL, *shlex.split(line)).returncode == 0
        for rank in ranks:
            rank.join(100)
            assert rank.exitcode == 0, printed.read_text()
    assert "negatives of step 6: complete, 2.0 per query" in printed.read_text()
    assert sorted(losses(output)) == list(range(1, LAST + 1))


def miners(output: Path) -> list[psutil.Process]:
    """The processes that mine for a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "mine" in (words := process.info["cmdline"] or []) and any(str(output) in word for word in words):
            found.append(process)
    return found


def wait_for(condition, printed: Path) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, printed.read_text()[-5000:]
        time.sleep(0.05)


def test_the_command_has_what_the_run_has(tmp_path: Path) -> None:
    cfg = configured(f"train.output={tmp_path}", "mining.margin=-0.1", "data.path=shards", "mining.max_uses=4")
    found = " ".join(mining_arguments(cfg, 400))
    assert found == (
        f"mine negatives --checkpoint {tmp_path}/checkpoints/step-0000400 "
        f"--subsets group image_to_name name_to_image composed --data={Path.cwd()}/shards "
        f"--out={tmp_path}/negatives/step-0000400 --negatives=2 --depth=20 --ratio=none --margin=-0.1 --max-uses=4 "
        "--procs=1"
    )
    cfg = configured("parallel.tensor=2", "mining.processes=0", "data.subsets=null", "mining.search=faiss")
    found = mining_arguments(cfg, 400)
    assert found[-3:] == ["--ratio=none", "--search=faiss", "parallel.tensor=2"]
    args = options.parse(found[1:])
    assert (options.rules_of(args), options.search_of(args)) == (Rules(2, 20, ratio=None), Search("faiss", 64))


def test_the_command_is_no_rank_of_the_run() -> None:
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "4", "SLURM_JOB_ID": "7", "RANKING": "x"}
    names = "RANK WORLD_SIZE LOCAL_RANK GROUP_RANK MASTER_ADDR TORCHELASTIC_RUN_ID PET_LOG_DIR NNODES PROCS".split()
    names += ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "PMI_SIZE"]
    assert of_no_launcher(kept | dict.fromkeys(names, "2")) == kept


class Writer:
    """In place of the writer of checkpoints: it says which one is being written."""

    saving: int | None = 3

    def poll(self) -> None:
        return


def test_a_checkpoint_that_cannot_be_mined_ends_the_run(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    """At once, while the newest checkpoint is still the one before, from which a resumed run mines again."""
    cfg, writer = configured(f"train.output={tmp_path}", "mining.processes=0"), Writer()
    refresh = Refresh(cfg, 0, writer)
    for step in (2, 3, 4):
        refresh.after(step)  # that of step 3 is being written
    writer.saving = None
    with pytest.raises(CheckpointError, match="the checkpoint after step 3, which is to be mined, could not be saved"):
        refresh.after(5)
    with pytest.raises(CheckpointError, match="step-0000003 is missing or incomplete, and so is .*step-0000003,"):
        Refresh(cfg, 6, writer)
    (tmp_path / "checkpoints" / "step-0000003").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="negatives/step-0000006 is missing"):
        Refresh(cfg, 6, writer)


def test_a_run_that_ends_before_it_mines_says_so(tmp_path: Path, groups: ProcessGroupCollection, caplog) -> None:
    with caplog.at_level("WARNING"):
        Refresh(configured(f"train.output={tmp_path}", "train.steps=6"), 0, Writer()).close()
    assert "mining.interval=3: the run ends before it mines; step 7 would be the first" in caplog.text


def test_negatives_of_steps_that_can_come_are_kept(tmp_path: Path) -> None:
    """With an interval of 10: a run at step 50 and one that resumes from step 25 read these."""
    for mined in (10, 20, 30, 40, 50, 60):
        folder_of(tmp_path, mined).mkdir(parents=True)
        folder_of(tmp_path, mined).with_suffix(".embeddings").mkdir()
        head = {"format": "megatron_llave negatives", "version": 1, "complete": mined != 50}
        write_json(folder_of(tmp_path, mined) / "negatives.json", head)
    for step in (25, 50, 70):
        (tmp_path / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
    tidy(tmp_path, 10, 52)
    assert all_mined(tmp_path) == [10, 20, 40, 50]
    assert sorted(path.name for path in (tmp_path / "negatives").glob("*.*")) == ["step-0000050.embeddings"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.hard_negatives=0"], "mining.interval=3 mines negatives that are not used while data.hard_negatives=0"),
        (
            ["data.path=http://host/x"],
            "mining.interval=3 needs the shards in a local folder, not data.path=http://host/x",
        ),
        (["mining.interval=4"], "mining.interval=4 must be a multiple of checkpoint.interval=3"),
        (["checkpoint.interval=0"], "mining.interval=3 must be a multiple of checkpoint.interval=0"),
        (["parallel.tensor=2"], "mining.processes=1 cannot share the model as parallel.tensor=2 says; use a multiple"),
        (["mining.votes=2"], "mining.votes=2: a run mines with one checkpoint at a time; leave it at 1"),
        (
            ["mining.skip=19"],
            "mining.depth=20, mining.skip=19, mining.negatives=2: the candidates that are left are fewer",
        ),
        (
            ["mining.interval=0"],
            "mining.negatives has no effect without mining.interval; set that too, or leave it out",
        ),
        (["mining.probes=8"], "mining.probes=8 has no effect without mining.search=faiss; set that too"),
        (["data.subsets=null", "loss.objective=cosent"], "mining.interval=3 is of no use where every subset has objec"),
        (["loss.soft_labels=scores", "loss.contrastive_weight=0"], "is of no use where loss.contrastive_weight=0 leav"),
    ],
)
def test_what_cannot_be_mined_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        configured(*overrides)

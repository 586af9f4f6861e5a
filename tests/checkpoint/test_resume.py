"""Runs that are killed, stopped and started again, through torchrun: the same weights, the same losses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from forking import ROOT, kill_trees
from launching import losses, wait_for_step
from run_ranks import TORCHRUN, run_ranks, started_ranks

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.stream import read_weights
from megatron_llave.config.load import load_config
from megatron_llave.embedding.embedder import load_model
from megatron_llave.models import model_without_memory
from megatron_llave.training.run_state import read_state

pytestmark = pytest.mark.long

TRAIN = ROOT / "examples" / "pretrain_llave_tiny.sh"  # its Python half, as torchrun runs it
STEPS = 8  # so many that a request to stop after the fourth comes before the last
SHORT = [f"train.steps={STEPS}", "train.global_batch_size=16", "optimizer.warmup_steps=0"]
SHORT += ["checkpoint.interval=2", "data.workers=1"]
PROGRAM = "pretrain_llave_tiny.sh"


def ranks_of(torchrun: psutil.Process) -> list[psutil.Process]:
    return [child for child in torchrun.children() if any(PROGRAM in word for word in child.cmdline())]


def kill_all(process: psutil.Process) -> None:
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # the kernel ends forks with the process that has made them
            one.kill()


def start_and_disturb(arguments: list[str], run: Path, after: int, disturb: Callable[[psutil.Process], None]) -> int:
    """Run on two ranks; once step `after` is logged, `disturb` them. Returns torchrun's status."""
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", "2", str(TRAIN), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as output:
        torchrun = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        watched = psutil.Process(torchrun.pid)
        try:
            wait_for_step(run, after, lambda: torchrun.poll() is None)
            disturb(watched)
            return torchrun.wait(200)
        finally:
            if torchrun.poll() is None:
                kill_all(watched)


def weights(run: Path) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in load_model(run).chunks[0].parameters()]


@pytest.fixture(scope="module")
def uninterrupted(openmoji_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_ranks(2, TRAIN, f"data.path={openmoji_data}", f"train.output={folder}", *SHORT)
    return folder


@pytest.mark.slow
def test_killed_and_stopped_run_ends_with_the_same_weights(
    groups, uninterrupted: Path, openmoji_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [f"data.path={openmoji_data}", f"train.output={run}", *SHORT, "--resume", "auto"]
    with started_ranks(2, [str(TRAIN), *arguments], os.devnull) as ranks:
        wait_for_step(run, 3, ranks[0].is_alive)
        kill_trees(rank.pid for rank in ranks)
        for rank in ranks:
            rank.join()
    assert json.loads((run / "state.json").read_text())["state"] == "running"
    deadline = time.monotonic() + 60
    while read_state(run)["state"] != "lost":  # the kernel is still ending the last of its processes
        assert time.monotonic() < deadline
        time.sleep(0.05)

    def ask_one_rank(torchrun: psutil.Process) -> None:
        # Its whole group, as torchrun passes a signal on: what reads data and what saves must not die of it.
        os.killpg(ranks_of(torchrun)[1].pid, signal.SIGTERM)

    assert start_and_disturb(arguments, run, 4, ask_one_rank) == 0
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["reason"]) == ("stopped", "SIGTERM") and 4 <= state["step"] < STEPS
    run_ranks(2, TRAIN, *arguments)
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"], state["reason"]) == ("finished", STEPS, "")
    assert losses(run) == losses(uninterrupted)
    for mine, other in zip(weights(run), weights(uninterrupted), strict=True):
        assert torch.equal(mine, other)


def test_run_goes_on_at_another_layout(uninterrupted: Path, openmoji_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [f"data.path={openmoji_data}", f"train.output={run}", *SHORT, "--resume", "auto"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    run_ranks(4, TRAIN, *arguments, *layout, "train.time_limit_minutes=0.0001")
    assert list(losses(run)) == [1]
    output = run_ranks(1, TRAIN, *arguments)
    assert f"resuming from {run / 'checkpoints' / 'step-0000001'}" in output
    for step, loss in losses(uninterrupted).items():
        assert losses(run)[step] == pytest.approx(loss, rel=1e-5), step


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rates_and_first_steps_of_parts_are_the_same_after_a_resume(
    openmoji_data: Path, groups, tmp_path: Path, world: int
) -> None:
    """Bit-equal weights, from a checkpoint before the tower's first step and from one after it."""
    parts = [
        "optimizer.part_start_steps={vision: 3}",
        "optimizer.part_learning_rates={projector: 1e-5, language: 5e-4}",
        "optimizer.vision_layer_decay=0.5",
    ]
    given = [f"data.path={openmoji_data}", *SHORT, "train.steps=5", "optimizer.warmup_steps=2", *parts]
    given += ["checkpoint.interval=1", "checkpoint.keep_last=0", "optimizer.weight_decay=0.1"]
    whole = tmp_path / "whole"
    run_ranks(world, TRAIN, *given, f"train.output={whole}")
    last = weights_after(whole, 5, groups)
    tower = "vision.encoder.conv1.weight"
    before = [weights_after(whole, step, groups)[tower] for step in (1, 3, 4)]
    assert torch.equal(before[0], before[1]) and not torch.equal(before[1], before[2])
    for resumed_at in (1, 4):
        run = tmp_path / f"resumed{resumed_at}"
        shutil.copytree(whole, run)
        for step in range(resumed_at + 1, 6):
            shutil.rmtree(run / "checkpoints" / f"step-{step:07d}")
        (run / "checkpoints" / "latest").write_text(f"step-{resumed_at:07d}\n")
        run_ranks(world, TRAIN, *given, f"train.output={run}", "--resume", "auto")
        for name, value in weights_after(run, 5, groups).items():
            assert torch.equal(value, last[name]), f"resumed after {resumed_at} steps: {name}"


def weights_after(run: Path, step: int, groups) -> dict[str, torch.Tensor]:
    folder = folders.step_folder(run, step)
    cfg = load_config(folder / folders.CONFIG)
    return dict(read_weights(folder, model_without_memory(cfg.model, groups), groups))

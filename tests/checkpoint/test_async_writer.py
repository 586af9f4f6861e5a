"""Saving in one process: what becomes current, what is kept, and a full disk, a killed writer, a damaged file."""

import copy
import json
import logging
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from reference import pack_pair_batch, random_pairs

from megatron_llave.checkpoint import async_writer, folders
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.resume import find_checkpoint, resume
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.refreshed_negatives import folder_of
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.files import write_json
from megatron_llave.models import build_model
from megatron_llave.train import train_step
from megatron_llave.training.optimizer import build_trainable

pytestmark = pytest.mark.long

POSITION = {"step": 1, "subsets": {}}


def build(groups, tmp_path: Path, **options) -> tuple[TrainingState, CheckpointWriter]:
    """The tiny model after one step, and a writer into its folder."""
    given = {"model": {"preset": "tiny"}, "train": {"steps": 9, "output": str(tmp_path / "run")}, "checkpoint": options}
    cfg = config_from_dict(given)
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    state = TrainingState(chunks, build_trainable(cfg, chunks, groups), None, groups)
    train_step(state.trainable, [pack_pair_batch(random_pairs(cfg.model, 4), cfg.model, 1)], cfg.loss, 0, groups)
    return state, CheckpointWriter(cfg, groups)


@pytest.fixture
def run(groups, tmp_path: Path) -> tuple[TrainingState, CheckpointWriter]:
    return build(groups, tmp_path, asynchronous=False)


@pytest.fixture(scope="module")
def two_checkpoints(groups, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A run's folder after two saves."""
    folder = tmp_path_factory.mktemp("saved")
    run = build(groups, folder, asynchronous=False)
    assert save(run, 1) and save(run, 2)
    return folder / "run", run[1]._cfg


@pytest.fixture
def saved(two_checkpoints: tuple[Path, RunConfig], tmp_path: Path) -> RunConfig:
    """A copy of it that may be damaged, as the configuration of its run."""
    folder, cfg = two_checkpoints
    shutil.copytree(folder, tmp_path / "run")
    cfg = copy.deepcopy(cfg)
    cfg.train.output = str(tmp_path / "run")
    return cfg


def names(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}


def save(run: tuple[TrainingState, CheckpointWriter], step: int) -> bool:
    state, writer = run
    before = writer.last
    return writer.save(step, state.to_save(step), POSITION) and writer.last != before


def said_by_us(caplog, level: int) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("megatron_llave")]
    return [record.getMessage() for record in ours if record.levelno == level]


def test_newest_is_current_and_the_older_ones_go(groups, tmp_path: Path) -> None:
    run = build(groups, tmp_path, asynchronous=False, keep_last=2, keep_every=2)
    for step in range(1, 6):
        assert save(run, step)
    assert names(tmp_path) == {"latest", "step-0000002", "step-0000004", "step-0000005"}
    folder = folders.find(tmp_path / "run")
    assert folder.name == "step-0000005" and run[1].last == folder
    manifest = folders.require_complete(folder)
    assert manifest["step"] == 5
    assert manifest["layout"] == {"tensor": 1, "context": 1, "pipeline": 1, "data": 1, "chunks": 1}
    assert {"config.yaml", "data.json", "metadata.json", ".metadata"} <= set(manifest["files"])
    assert "reserve" not in manifest["files"]


def test_what_a_run_with_more_steps_would_mine_is_kept(groups, tmp_path: Path) -> None:
    """A run of 9 steps uses what the checkpoint after 4 finds; one of 13 also needs the one after 8."""
    run = build(groups, tmp_path, asynchronous=False, keep_last=1)
    run[1]._cfg.mining.interval = 4
    assert save(run, 4) and save(run, 8)
    head = {"format": "megatron_llave negatives", "version": 1, "complete": True}
    folder_of(tmp_path / "run", 4).mkdir(parents=True)
    write_json(folder_of(tmp_path / "run", 4) / "negatives.json", head)
    assert save(run, 9)
    assert names(tmp_path) == {"latest", "step-0000008", "step-0000009"}


def test_progress_is_told_while_a_checkpoint_is_waited_for(run, tmp_path: Path) -> None:
    said: list[str] = []
    run[1]._progress = said.append
    assert save(run, 1)
    assert said and set(said) == {"waiting for the checkpoint of step 1"}


def test_a_save_leaves_no_process(run) -> None:
    """A process that keeps the reports of the writers would delay the first save, and outlive a killed rank."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    assert save(run, 1)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [child.cmdline() for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []


def test_all_are_kept_on_demand(groups, tmp_path: Path) -> None:
    run = build(groups, tmp_path, asynchronous=False, keep_last=0)
    assert all(save(run, step) for step in (1, 2, 3))
    assert names(tmp_path) == {"latest", "step-0000001", "step-0000002", "step-0000003"}


def test_what_is_saved_is_the_moment_of_the_save(groups, tmp_path: Path) -> None:
    state, writer = build(groups, tmp_path, asynchronous=True)
    before = [parameter.detach().clone() for parameter in state.chunks[0].parameters()]
    assert writer.save(1, state.to_save(1), POSITION) and writer.last is None
    with torch.no_grad():
        for parameter in state.chunks[0].parameters():
            parameter.zero_()
    assert writer.poll(wait=True) and not writer.poll()
    assert resume(state, writer.last, writer._cfg) == 1
    assert all(torch.equal(*pair) for pair in zip(before, state.chunks[0].parameters()))


@pytest.mark.parametrize("room", [100_000, 1_000_000])  # not even for the reserve; for that, but not for the weights
def test_full_disk_leaves_the_one_before_current(
    run, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    assert save(run, 1)
    monkeypatch.setattr(async_writer, "RESERVE_BYTES", 500_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        assert not save(run, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [message] = said_by_us(caplog, logging.ERROR)
    assert "step-0000002.partial could not be saved" in message and "the one before stays current" in message
    assert "could not be saved: File too large" in message and "\n" not in message
    assert folders.find(tmp_path / "run").name == "step-0000001"
    assert names(tmp_path) == {"latest", "step-0000001"}
    assert save(run, 3)
    assert folders.find(tmp_path / "run").name == "step-0000003"


def test_removed_output_directory_costs_the_checkpoint_and_not_the_run(groups, tmp_path: Path, caplog) -> None:
    state, writer = build(groups, tmp_path, asynchronous=True)
    assert writer.save(1, state.to_save(1), POSITION)
    shutil.rmtree(tmp_path / "run")
    assert not writer.poll(wait=True)
    [message] = said_by_us(caplog, logging.ERROR)
    assert "step-0000001.partial could not be saved: somebody has removed it" in message
    assert writer.save(2, state.to_save(2), POSITION) and writer.poll(wait=True)
    assert folders.find(tmp_path / "run").name == "step-0000002"


def test_killed_writer_leaves_the_one_before_current(groups, tmp_path: Path, caplog) -> None:
    state, writer = build(groups, tmp_path, asynchronous=True)
    assert writer.save(1, state.to_save(1), POSITION) and writer.poll(wait=True)
    assert writer.save(2, state.to_save(2), POSITION)
    pid = writer._current.caller.process.pid
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        os.kill(process.pid, signal.SIGKILL)
    assert not writer.poll(wait=True)
    assert "a process that wrote it was killed" in caplog.text
    assert names(tmp_path) == {"latest", "step-0000001"}
    assert writer.save(3, state.to_save(3), POSITION) and writer.poll(wait=True)


def damage_shard(folder: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_shard, "distcp has .* bytes, written were"),
        (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "manifest.json does not exist; the folder is not a checkpoint",
        ),
    ],
)
def test_damaged_newest_gives_way_to_the_one_before(saved, tmp_path: Path, caplog, damage, said: str) -> None:
    damage(tmp_path / "run" / "checkpoints" / "step-0000002")
    (tmp_path / "run" / "checkpoints" / "step-0000003.partial").mkdir()  # of a save that was killed
    saved.checkpoint.resume = "auto"
    assert find_checkpoint(saved).name == "step-0000001"
    [message] = said_by_us(caplog, logging.WARNING)
    assert message.startswith("not resumed from: ") and re.search(said, message)
    saved.checkpoint.resume = str(tmp_path / "run" / "checkpoints" / "step-0000002")
    with pytest.raises(CheckpointError, match=said):
        find_checkpoint(saved)


def test_whole_checkpoint_that_was_not_made_current_is_the_newest(saved, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-0000001\n")
    assert folders.newest_usable(tmp_path / "run", pytest.fail).name == "step-0000002"


def test_new_run_does_not_begin_in_the_folder_of_another(saved, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="has a checkpoint after 2 steps: --resume auto"):
        find_checkpoint(saved)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun has started it again
    assert find_checkpoint(saved).name == "step-0000002"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    saved.train.output = str(tmp_path / "new")
    assert find_checkpoint(saved) is None
    saved.checkpoint.resume = "auto"
    assert find_checkpoint(saved) is None


def test_going_back_sets_the_later_checkpoints_aside(saved, tmp_path: Path, caplog, monkeypatch) -> None:
    first = tmp_path / "run" / "checkpoints" / "step-0000001"
    (tmp_path / "run" / "checkpoints" / "step-0000002.abandoned").mkdir()  # of a run that went back before
    saved.checkpoint.resume = str(first)
    assert find_checkpoint(saved) == first
    assert names(tmp_path) == {"step-0000001", "step-0000002.abandoned", "step-0000002.abandoned-2", "latest"}
    assert said_by_us(caplog, logging.WARNING) == [
        f"going back to {first}: the later step-0000002 is now {first.with_name('step-0000002.abandoned-2')}"
    ]
    folders.remove_old(tmp_path / "run", 1, 0)
    saved.checkpoint.resume = "auto"
    assert find_checkpoint(saved) == first
    # torchrun starts the run with its first command again: what it has saved meanwhile counts.
    later = shutil.copytree(first, first.with_name("step-0000005"))
    folders.write_manifest(later, 5, folders.require_complete(first)["layout"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    saved.checkpoint.resume = str(first)
    assert find_checkpoint(saved).name == "step-0000005"


def test_checkpoint_of_another_run_sets_nothing_aside(saved, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    saved.checkpoint.resume = str(tmp_path / "other" / "checkpoints" / "step-0000001")
    assert find_checkpoint(saved).parent.parent == tmp_path / "other"
    assert names(tmp_path) == {"step-0000001", "step-0000002", "latest"}


def test_nothing_usable_is_an_error_and_not_a_new_run(saved, tmp_path: Path) -> None:
    for step in (1, 2):
        damage_shard(tmp_path / "run" / "checkpoints" / f"step-000000{step}")
    saved.checkpoint.resume = "auto"
    with pytest.raises(ConfigError, match="none of its 2 checkpoints is usable"):
        find_checkpoint(saved)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("lora", "rank", 8, "lora.rank was 0, is 8"),
        ("lora", "targets", ["q_proj"], "lora.targets was .'language'., is .'q_proj'."),
        ("model", "freeze", ["vision"], r"model.freeze was \[\], is \['vision'\]"),
        ("model", "dropout", 0.1, "model.dropout was 0.0, is 0.1"),
        ("loss", "reward", "ema", "loss.reward was self, is ema"),
    ],
)
def test_checkpoint_of_another_model_is_refused_with_the_difference(saved, section, key, value, said: str) -> None:
    setattr(getattr(saved, section), key, value)
    with pytest.raises(CheckpointError, match=f"is of another model: {said}"):
        folders.require_same_run(folders.find(saved.train.output), saved)


def test_other_settings_may_change_and_are_named(run, caplog) -> None:
    assert save(run, 1)
    state, writer = run
    writer._cfg.optimizer.learning_rate = 5e-5
    assert resume(state, writer.last, writer._cfg) == 1
    assert "optimizer.learning_rate was 1e-05, is 5e-05" in caplog.text
    assert {group["max_lr"] for group in state.trainable.optimizer.param_groups} == {1e-5}  # as it was built
    assert state.trainable.schedule.num_steps == 1


def test_other_format_is_refused(saved) -> None:
    folder = folders.find(saved.train.output)
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 9}))
    with pytest.raises(CheckpointError, match="'megatron_llave checkpoint' version 9, this code reads version 1"):
        folders.require_complete(folder)

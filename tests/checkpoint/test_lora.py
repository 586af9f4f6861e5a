"""Runs that train LoRA adapters: their checkpoints, resumed, loaded, merged, trained on, and with another base."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forking import ROOT, kill_trees, run_script
from launching import losses, wait_for_step
from run_ranks import run_ranks, started_ranks
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.pretrained import read_base
from megatron_llave.convert.inspect import inspect
from megatron_llave.embedding.embedder import LoadedModel, load_model
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.evaluation.before_training import initial_model
from megatron_llave.models.lora import is_adapter

pytestmark = pytest.mark.long

TRAIN = ROOT / "examples" / "pretrain_llave_tiny.sh"  # its Python half, as torchrun runs it
SHORT = ["train.global_batch_size=16", "optimizer.warmup_steps=0", "data.workers=1", "checkpoint.asynchronous=false"]
LORA = ["lora.rank=4", "lora.alpha=64", "lora.targets=[language, projector]"]
STEPS = ["train.steps=6", "checkpoint.interval=2", "lora.dropout=0.1", "optimizer.learning_rate=0.01"]
STILL = ["train.steps=1", "optimizer.learning_rate=0"]
TEXTS = ["a grinning face", "red apple", "Which emoji is at the top left?"]


@pytest.fixture(scope="module")
def base(openmoji_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run of full training."""
    run = tmp_path_factory.mktemp("base") / "run"
    run_ranks(1, TRAIN, f"data.path={openmoji_data}", f"train.output={run}", "train.steps=1", *SHORT)
    return folders.find(run)


def arguments(data: Path, run: Path, init: Path, *others: str) -> list[str]:
    return [f"data.path={data}", f"train.output={run}", f"checkpoint.init={init}", *SHORT, *others]


@pytest.fixture(scope="module")
def run(openmoji_data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, with dropout."""
    run = tmp_path_factory.mktemp("lora") / "run"
    run_ranks(2, TRAIN, *arguments(openmoji_data, run, base, *LORA, *STEPS))
    return run


def adapters(folder: Path, *overrides: str) -> dict[str, Tensor]:
    chunk = load_model(folder, overrides).chunks[0]
    return {name: value.detach() for name, value in chunk.named_parameters() if is_adapter(name)}


def test_killed_run_ends_with_the_same_adapters(
    groups, run: Path, base: Path, openmoji_data: Path, tmp_path: Path
) -> None:
    again = tmp_path / "run"
    started = arguments(openmoji_data, again, base, *LORA, *STEPS, "--resume", "auto")
    with started_ranks(2, [str(TRAIN), *started], os.devnull) as ranks:
        wait_for_step(again, 3, ranks[0].is_alive)
        kill_trees(rank.pid for rank in ranks)
    output = run_ranks(2, TRAIN, *started)
    assert "resuming from" in output and losses(again) == losses(run)
    expected = adapters(run)
    for name, value in adapters(again).items():
        assert torch.equal(value, expected[name]), name
    assert all(value.any() for value in expected.values())


def test_checkpoint_holds_the_adapters_and_which_base_they_are_for(groups, run: Path, base: Path) -> None:
    folder = folders.find(run)
    held = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    elements = sum(value.numel() for value in adapters(run).values())
    assert 16 * elements < held < 16 * elements + 400_000  # float32 weights, those of the optimizer, two moments
    assert held < sum(file.stat().st_size for file in base.glob("*.distcp")) / 4
    assert read_base(folder).source == str(base)


def embedded(model: LoadedModel) -> Tensor:
    return model.embed(TEXTS)


def test_embeddings_are_the_same_merged_and_not(groups, run: Path, base: Path) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        own, merged, without = load_model(run), load_model(run, ["lora.rank=0"]), load_model(base)
    assert not [warning for warning in warned if "DTensor" in str(warning.message)]  # which a script would print
    assert not any(is_adapter(name) for name, _ in merged.chunks[0].named_parameters())
    torch.testing.assert_close(embedded(merged), embedded(own), rtol=0, atol=1e-6)
    assert (embedded(own) - embedded(without)).abs().max() > 1e-2
    assert torch.equal(embedded(initial_model(own)), embedded(without))


def test_inspect_tells_adapters_and_base(groups, run: Path, base: Path, capsys) -> None:
    assert inspect(run, groups) == 0
    told = capsys.readouterr().out
    assert "rank 4, alpha 64, of language, projector" in told and f"was in {base} (SHA-256" in told
    assert "complete: every tensor is there" in told


@pytest.fixture
def still(run: Path, openmoji_data: Path, tmp_path: Path) -> Iterator[Path]:
    """Runs that start from the adapters and change nothing: with adapters, and with merged weights."""
    for name, init, lora in (
        ("on", run, [*LORA, "lora.save_base=true"]),
        ("merged", run, []),
        ("further", tmp_path / "on", LORA),
    ):
        run_ranks(1, TRAIN, *arguments(openmoji_data, tmp_path / name, init, *lora, *STILL))
    yield tmp_path


@pytest.mark.slow
def test_training_goes_on_with_the_adapters_or_with_the_merged_weights(groups, run: Path, still: Path) -> None:
    assert losses(still / "on")[1] == pytest.approx(losses(still / "merged")[1], rel=1e-5)
    expected = adapters(run)
    for name, value in adapters(still / "on").items():  # a checkpoint with the base
        assert torch.equal(value, expected[name]), name
    for name, has_base in (("on", True), ("merged", True), ("further", False)):
        assert (folders.find(still / name) / "assets" / "base.json").exists() is not has_base
        for overrides in ([], ["lora.rank=0"]):
            ours = embedded(load_model(still / name, overrides))
            torch.testing.assert_close(ours, embedded(load_model(run)), rtol=0, atol=1e-6)
    parameters = load_model(still / "merged").chunks[0].named_parameters()
    assert all(value.requires_grad for _, value in parameters)


def test_another_base_is_refused_in_one_line(
    groups, run: Path, base: Path, openmoji_data: Path, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(base, moved)
    shutil.copytree(base, other)
    config = other / folders.CONFIG
    config.write_text(config.read_text() + "\n")
    manifest = other / folders.MANIFEST
    values = json.loads(manifest.read_text())
    del values["sha256"][folders.CONFIG]
    values["files"][folders.CONFIG] += 1
    manifest.write_text(json.dumps(values))
    resumed = run_script(TRAIN, *arguments(openmoji_data, run, other, *LORA, *STEPS, "--resume", "auto"))
    said = resumed.stderr.strip().splitlines()[-1]
    assert resumed.returncode == 2 and f"checkpoint.init={other}, holds others" in said and str(base) in said, said
    with pytest.raises(CheckpointError, match=f"{other} holds others .*lora.base"):
        load_model(run, [f"lora.base={other}"])
    with pytest.raises(CheckpointError, match="holds adapters without .*nothing does not exist.*lora.base"):
        load_model(run, ["lora.base=nothing"])
    assert adapters(run, f"lora.base={moved}").keys() == adapters(run).keys()
    with pytest.raises(ConfigError, match="lora.rank=8 contradicts the adapters in .*, where it is 4; lora.rank=0"):
        load_model(run, ["lora.rank=8"])

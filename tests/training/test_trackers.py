"""TensorBoard and Weights & Biases get the numbers of every step; where a package is missing, one line says so."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError
from megatron_llave.training.logger import RunLog
from megatron_llave.training.metrics import GRADIENT_NORMS, StepResult, collect
from megatron_llave.training.trackers import GROUP_OF, open_trackers, scalars_of


class FakeWriter:
    """torch.utils.tensorboard.SummaryWriter, as far as it is used."""

    made: list["FakeWriter"] = []

    def __init__(self, folder: str, purge_step: int, flush_secs: int) -> None:
        self.folder, self.purge_step, self.scalars, self.is_closed = folder, purge_step, [], False
        self.texts = []
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))

    def close(self) -> None:
        self.is_closed = True


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_the_numbers_and_forgets_steps_that_come_again(tmp_path: Path, monkeypatch) -> None:
    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=FakeWriter)
    trackers = open_trackers(
        LogConfig(tensorboard=True), tmp_path, 3, {"loss": {"alpha": 9.0}, "data": {"path": "https://me:SECRET@h/x"}}
    )
    values = {"loss": 0.5, "subset": "birds", "seconds": 2.0, "pairs": 4, "tokens": 9, "skipped": 0, "histogram": [1]}
    log = RunLog(tmp_path, 0, 9, True, trackers)
    log.step({"step": 3, **values, "gradient_norm": float("nan")})
    log.evaluation(3, {"names": 40.0}, seconds=1.0, candidates={"names": 9})
    log.close()
    [writer] = FakeWriter.made
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 3 and writer.is_closed
    expected = {"loss/all": 0.5, "loss/birds": 0.5, "data/pairs": 4, "data/tokens": 9, "data/skipped": 0}
    expected |= {"performance/seconds": 2.0, "performance/pairs_per_second": 2.0, "performance/tokens_per_second": 4.5}
    assert set(writer.scalars) == {(name, value, 3) for name, value in expected.items()} | {
        ("precision_at_1/names", 40.0, 3)
    }
    assert writer.texts == [("configuration", "    loss:\n      alpha: 9.0\n    data:\n      path: https://h/x\n", 3)]


def test_every_number_of_a_step_has_a_group(groups) -> None:
    """Of a real record, so that a number that is added later is given a group."""
    row = SimpleNamespace(lengths=[2, 2], num_sequences=2, num_tokens=4, num_tiles=0, grids=[])
    counts = dict.fromkeys(("num_pairs", "num_targets", "num_hard_negatives", "num_skipped", "num_cut"), 1)
    batch = SimpleNamespace(subset="birds", query_ids=torch.zeros(1), sequences=row, **counts)
    result = StepResult(LossConfig(), [batch], [], [1.0] * len(GRADIENT_NORMS), 1e-3, temperature_gradient=0.5)
    cfg = config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 1}})
    record = collect(cfg, 1, result, groups.dp, 0.0, 0.0) | {"save_seconds": 0.0, "bad_steps": 0}
    numbers = {key for key, value in record.items() if isinstance(value, (int, float))} - {"step", "loss"}
    assert numbers <= GROUP_OF.keys(), numbers - GROUP_OF.keys()
    assert scalars_of(record)["temperature/birds"] == LossConfig().temperature


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(id=options["id"] or "new-id", log=lambda *_, **__: None, finish=lambda: None)

    fake_module(monkeypatch, "wandb", init=init)
    config = {"seed": 1, "data": {"path": "pipe:get --token SECRET {file}", "cache": "/copies"}}
    for _ in range(2):
        for tracker in open_trackers(LogConfig(wandb_project="mine"), tmp_path, 1, config):
            tracker.step(1, {"loss": 0.5})
            tracker.close()
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("new-id", "allow")]
    assert calls[0]["config"] == {"seed": 1, "data": {"path": "a command", "cache": "/copies"}}
    assert calls[0]["project"] == "mine" and calls[0]["name"] == tmp_path.name


@pytest.mark.parametrize(
    ("given", "module", "said"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "log.tensorboard=true needs the package tensorboard"),
        ({"wandb_project": "mine"}, "wandb", "log.wandb_project=mine needs the package wandb"),
    ],
)
def test_missing_package_is_one_line(tmp_path: Path, monkeypatch, given, module, said) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=said):
        open_trackers(LogConfig(**given), tmp_path, 1, {})
    assert open_trackers(LogConfig(), tmp_path, 1, {}) == []

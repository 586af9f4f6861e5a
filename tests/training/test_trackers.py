"""TensorBoard and Weights & Biases get the numbers of every step; where a package is missing, one line says so."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError
from megatron_llave.training.logger import RunLog
from megatron_llave.training.trackers import open_trackers


class FakeWriter:
    """torch.utils.tensorboard.SummaryWriter, as far as it is used."""

    made: list["FakeWriter"] = []

    def __init__(self, folder: str, purge_step: int, flush_secs: int) -> None:
        self.folder, self.purge_step, self.scalars, self.is_closed = folder, purge_step, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        self.is_closed = True


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_the_numbers_and_forgets_steps_that_come_again(tmp_path: Path, monkeypatch) -> None:
    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=FakeWriter)
    trackers = open_trackers(LogConfig(tensorboard=True), tmp_path, 3, {})
    values = {"loss": 0.5, "subset": "birds", "seconds": 1.0, "pairs": 4, "tokens": 9, "skipped": 0, "histogram": [1]}
    log = RunLog(tmp_path, 0, 9, True, trackers)
    log.step({"step": 3, **values, "gradient_norm": float("nan")})
    log.evaluation(3, {"names": 40.0}, seconds=1.0)
    log.close()
    [writer] = FakeWriter.made
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 3 and writer.is_closed
    expected = {("loss", 0.5, 3), ("pairs", 4, 3), ("seconds", 1.0, 3), ("tokens", 9, 3), ("skipped", 0, 3)}
    assert set(writer.scalars) == expected | {("precision_at_1/names", 40.0, 3)}


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(id=options["id"] or "new-id", log=lambda *_, **__: None, finish=lambda: None)

    fake_module(monkeypatch, "wandb", init=init)
    for _ in range(2):
        for tracker in open_trackers(LogConfig(wandb_project="mine"), tmp_path, 1, {"seed": 1}):
            tracker.step(1, {"loss": 0.5})
            tracker.close()
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("new-id", "allow")]
    assert calls[0]["project"] == "mine" and calls[0]["config"] == {"seed": 1} and calls[0]["name"] == tmp_path.name


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

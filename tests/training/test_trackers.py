"""The trackers get the numbers of every step, histograms and images; what fails there never ends a run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import LogConfig
from megatron_llave.errors import ConfigError
from megatron_llave.training.logger import LOG_FILE, RunLog, read_log
from megatron_llave.training.metrics import GRADIENT_NORMS, StepResult, collect
from megatron_llave.training.tracked_values import GROUP_OF, Histogram, scalars_of
from megatron_llave.training.trackers import open_trackers


class FakeWriter:
    """torch.utils.tensorboard.SummaryWriter, as far as it is used."""

    made: list["FakeWriter"] = []

    def __init__(self, folder: str, purge_step: int, flush_secs: int) -> None:
        self.folder, self.purge_step, self.scalars, self.is_closed = folder, purge_step, [], False
        self.texts, self.histograms, self.images = [], [], []
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append((name, text, step))

    def add_histogram_raw(self, *histogram, bucket_limits: list, bucket_counts: list, global_step: int) -> None:
        self.histograms.append((*histogram, bucket_limits, bucket_counts, global_step))

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str) -> None:
        self.images.append((name, image.shape, step, dataformats))

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
    log.step({"step": 3, **values, "gradient_norm": float("nan"), "hardest_share_histogram": [1, 0, 0, 3]})
    trackers[0].image(3, "montage", Image.new("RGB", (3, 2)))
    log.evaluation(3, {"names": 40.0}, seconds=1.0, candidates={"names": 9})
    log.close()
    writer = FakeWriter.made.pop()
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 3 and writer.is_closed
    expected = {"loss/all": 0.5, "loss/birds": 0.5, "data/pairs": 4, "data/tokens": 9, "data/skipped": 0}
    expected |= {"performance/seconds": 2.0, "performance/pairs_per_second": 2.0, "performance/tokens_per_second": 4.5}
    assert set(writer.scalars) == {(name, value, 3) for name, value in expected.items()} | {
        ("precision_at_1/names", 40.0, 3)
    }
    # Lowest and highest edge, number, sum and sum of squares of the middles 0.125 and 0.875, upper edges, counts.
    sums = (4, 2.75, 0.125**2 + 3 * 0.875**2)
    name = "similarity/hardest_share_histogram"
    assert writer.histograms == [(name, 0, 1, *sums, [0.25, 0.5, 0.75, 1.0], [1, 0, 0, 3], 3)]
    assert writer.images == [("montage", (2, 3, 3), 3, "HWC")]
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


class FakeRun:
    """A run of Weights & Biases, as far as it is used; its server has what it was sent."""

    server: list[tuple[int, dict]] = []

    def __init__(self, options: dict) -> None:
        self.id, self.step = options["id"] or "new-id", 1 + max((step for step, _ in self.server), default=-1)

    def log(self, values: dict, step: int) -> None:
        self.server.append((step, values))

    def finish(self) -> None:
        pass


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    calls: list[dict] = []
    members = {"Settings": dict, "Histogram": lambda np_histogram: np_histogram, "Image": lambda image: image.size}
    fake_module(monkeypatch, "wandb", init=lambda **given: calls.append(given) or FakeRun(given), **members)
    monkeypatch.setattr(FakeRun, "server", [])
    return calls


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path: Path, monkeypatch, caplog) -> None:
    calls = fake_wandb(monkeypatch)
    caplog.set_level("INFO", "megatron_llave")
    config = {"seed": 1, "data": {"path": "pipe:get --token SECRET {file}", "cache": "/copies"}}
    for first, last in ((1, 4), (3, 6)):
        [tracker] = open_trackers(LogConfig(wandb_project="mine"), tmp_path, first, config)
        for step in range(first, last + 1):
            tracker.step(step, {"loss": step / 2}, {"h": Histogram([1, 2], -1, 1)} if step == 5 else {})
        tracker.close()
    tracker.image(6, "montage", Image.new("RGB", (3, 2)))
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("new-id", "allow")]
    assert calls[0]["config"] == {"seed": 1, "data": {"path": "a command", "cache": "/copies"}}
    assert calls[0]["project"] == "mine" and calls[0]["name"] == tmp_path.name
    assert all(call["settings"] == {"x_disable_meta": True} for call in calls)  # which has the words of the command
    with_histogram = {"loss": 2.5, "h": ([1, 2], [-1.0, 0.0, 1.0])}
    expected = [*((step, {"loss": step / 2}) for step in (1, 2, 3, 4)), (5, with_histogram), (6, {"loss": 3.0})]
    assert FakeRun.server == [*expected, (6, {"montage": (3, 2)})]
    [said] = [one.getMessage() for one in caplog.records]
    assert said == "Weights & Biases has the steps 3 to 4 already and keeps them as they are"


def test_a_run_that_begins_again_is_a_new_one(tmp_path: Path, monkeypatch) -> None:
    calls = fake_wandb(monkeypatch)
    for _ in range(2):
        open_trackers(LogConfig(wandb_project="mine"), tmp_path, 1, {})
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None)] * 2


class Broken(FakeRun):
    def log(self, values: dict, step: int) -> None:
        raise ValueError("no\nserver at https://me:SECRET@host/x?key=SECRET")

    finish = property(lambda self: 1 / 0)


@pytest.mark.parametrize("is_broken_at_once", [True, False])
def test_failures_are_one_line_and_cost_no_step(tmp_path: Path, monkeypatch, caplog, is_broken_at_once) -> None:
    def init(**options):
        return Broken(options).log({}, 1) if is_broken_at_once else Broken(options)

    fake_module(monkeypatch, "wandb", init=init, Settings=dict)
    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=FakeWriter)
    trackers = open_trackers(LogConfig(wandb_project="mine", tensorboard=True), tmp_path, 1, {})
    log = RunLog(tmp_path, 0, 9, True, trackers)
    for step in (1, 2):
        log.step({"step": step, "loss": 0.5, "seconds": 2.0, "pairs": 4, "skipped": 0})
    trackers[1].image(2, "montage", Image.new("RGB", (3, 2)))
    log.close()
    [warning] = [one.getMessage() for one in caplog.records]
    said = (
        "log.wandb_project: ValueError: no server at https://host/x; the run continues without what cannot be recorded"
    )
    assert warning == said
    writer = FakeWriter.made.pop()  # the other one has everything
    assert writer.is_closed and [step for name, _, step in writer.scalars if name == "loss/all"] == [1, 2]
    assert [record["step"] for record in read_log(tmp_path / LOG_FILE)] == [1, 2]


@pytest.mark.parametrize(
    ("given", "module", "said"),
    [
        ({"tensorboard": True}, "tensorboard", "log.tensorboard=true needs tensorboard: pip install tensorboard"),
        ({"wandb_project": "mine"}, "wandb", "log.wandb_project=mine needs wandb: pip install wandb"),
        ({"mlflow_experiment": "mine"}, "mlflow", "log.mlflow_experiment=mine needs mlflow: pip install mlflow-"),
    ],
)
def test_missing_package_is_one_line(tmp_path: Path, monkeypatch, given, module, said) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=said):
        open_trackers(LogConfig(**given), tmp_path, 1, {})
    assert open_trackers(LogConfig(), tmp_path, 1, {}) == []

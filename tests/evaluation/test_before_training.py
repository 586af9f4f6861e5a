"""Scores before training: the run's own initial weights, scores of an earlier report, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from golden_mmeb import golden_tasks
from golden_model import ONEVISION, byte_tokenizer

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.pretrained import Pretrained
from megatron_llave.config.load import config_from_dict
from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.embedder import LoadedModel
from megatron_llave.errors import CheckpointError, ConfigError, DataError
from megatron_llave.evaluation.before_training import initial_model, read_scores
from megatron_llave.files import write_json
from megatron_llave.models import build_model, build_processor


def trained(groups, folder: Path, init: Path | None = None, **position) -> LoadedModel:
    """A model whose weights are all 0, as if it had been loaded from a checkpoint in `folder`."""
    values = {"model": {"preset": "tiny"}, "train": {"seed": 3}, "data": {"tokenizer": str(byte_tokenizer(folder))}}
    cfg = config_from_dict({**values, "checkpoint": {"init": None if init is None else str(init)}})
    chunks = build_model(cfg.model, cfg.parallel, groups, device(), seed=0)
    for parameter in chunks[0].parameters():
        torch.nn.init.zeros_(parameter)
    if position:
        write_json(folder / folders.POSITION, position)
    encoder = build_processor(cfg.data, cfg.model)
    return LoadedModel(cfg, chunks, encoder, groups, source=Pretrained(folder, cfg, is_hf=False))


def test_the_initial_weights_are_those_that_training_draws(groups, tmp_path):
    model = trained(groups, tmp_path, step=1, subsets={})
    initial = initial_model(model)
    drawn = build_model(model.cfg.model, model.cfg.parallel, groups, device(), seed=3)[0].state_dict()
    there = initial.chunks[0].state_dict()
    assert all(torch.equal(there[name], value) for name, value in drawn.items() if isinstance(value, torch.Tensor))
    assert not initial.chunks[0].training and not any(p.any() for p in model.chunks[0].parameters())


def test_weights_that_no_run_has_trained_have_no_initial_ones(groups, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no data.json, so no training run saved it; evaluate"):
        initial_model(trained(groups, tmp_path))
    model = trained(groups, tmp_path, init=tmp_path / "gone", step=1, subsets={})
    with pytest.raises(CheckpointError, match="gone does not exist; name a checkpoint"):
        initial_model(model)
    model.source = Pretrained(ONEVISION, model.cfg, is_hf=True)
    with pytest.raises(CheckpointError, match="--before initial: .* no training run saved it"):
        initial_model(model)


def report(**given) -> dict:
    [task] = [task for task in golden_tasks() if task.name == "CIRR"]
    scored = {"name": "CIRR", "precision_at_1": 25.0, "num_queries": len(task.queries)}
    return {"ties": "first", "sets": [{**scored, "num_candidates": task.num_candidates, **given}]}


def test_scores_of_an_earlier_report(tmp_path):
    write_json(tmp_path / "report.json", report())
    for path in (tmp_path, tmp_path / "report.json"):
        assert read_scores(path, golden_tasks(), "first") == {"CIRR": 25.0}


@pytest.mark.parametrize(
    ("written", "error", "message"),
    [
        (report(name="other"), ConfigError, "has none of these sets: ImageNet-1K, CIRR"),
        (report(num_queries=3), ConfigError, "set CIRR has 3 queries and"),
        (report() | {"ties": "strict"}, ConfigError, "was scored with --ties strict, and this evaluation uses first"),
        ({"sets": [1]}, DataError, "is not the report.json of an evaluation"),
        ({"sets": [{"name": "CIRR", "precision_at_1": "x"}]}, DataError, "is not the report.json of an evaluation"),
        ([], DataError, "report.json"),
    ],
)
def test_a_report_of_something_else_is_one_line(tmp_path, written, error, message):
    (tmp_path / "report.json").write_text(json.dumps(written))
    with pytest.raises(error, match=message) as raised:
        read_scores(tmp_path, golden_tasks(), "first")
    assert "\n" not in str(raised.value) and "report.json" in str(raised.value)

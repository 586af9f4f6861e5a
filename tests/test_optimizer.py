"""Learning rates: of parts, of the warmup, and what a skipped step leaves alone."""

import pytest
import torch
from reference import pack_pair_batch, random_pairs

from megatron_llave import config_file
from megatron_llave.errors import ConfigError
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import Trainable, build_trainable, learning_rate
from megatron_llave.train import train_step

RATE = 1e-3


def build(groups, **optimizer) -> tuple[object, Trainable]:
    values = {"learning_rate": RATE, **optimizer}
    cfg = config_file.build({"model": {"preset": "tiny"}, "train": {"steps": 20}, "optimizer": values})
    chunks = build_model(cfg.model, cfg.parallel, groups, torch.device("cpu"), seed=0)
    return cfg, build_trainable(cfg, chunks, groups)


def step(cfg, trainable: Trainable, groups) -> dict[str, float]:
    """Largest change of each parameter in a step."""
    before = {name: value.detach().clone() for name, value in trainable.chunks[0].named_parameters()}
    train_step(trainable, [pack_pair_batch(random_pairs(cfg.model, 4), cfg.model, 1)], cfg.loss, 0, groups)
    now = trainable.chunks[0].named_parameters()
    return {name.removeprefix("module."): (value - before[name]).abs().max().item() for name, value in now}


def test_parts_have_rates_of_their_own(groups) -> None:
    cfg, trainable = build(groups, part_learning_rates={"vision": 1e-5, "projector": 0.0})
    changes = step(cfg, trainable, groups)
    parts = {part: [c for name, c in changes.items() if name.startswith(part)] for part in ("vision", "language")}
    assert all(0 < change <= 1.1e-5 for change in parts["vision"])
    assert max(parts["language"]) == pytest.approx(RATE, rel=0.1)
    assert {changes[name] for name in changes if name.startswith(("projector", "image_newline"))} == {0.0}
    assert learning_rate(trainable) == max(group["lr"] for group in trainable.optimizer.param_groups)


def test_unknown_part_is_named() -> None:
    with pytest.raises(ConfigError, match="optimizer.part_learning_rates='tower' is not one of vision, projector"):
        config_file.build({"optimizer": {"part_learning_rates": {"tower": 1e-5}}})


@pytest.mark.parametrize("given", [{"warmup_steps": 4}, {"warmup_fraction": 0.2}])
def test_warmup_in_steps_or_as_a_share_of_them(groups, given) -> None:
    _, trainable = build(groups, **given)
    rates = []
    for _ in range(6):
        rates.append(learning_rate(trainable))
        trainable.schedule.step(increment=1)
    assert rates[:5] == pytest.approx([0.0, RATE / 4, RATE / 2, 3 * RATE / 4, RATE])
    assert rates[5] < RATE


def test_skipped_step_changes_no_weight_but_moves_the_schedule_on(groups) -> None:
    cfg, trainable = build(groups)
    step(cfg, trainable, groups)
    before = [value.detach().clone() for value in trainable.chunks[0].parameters()]
    rate = learning_rate(trainable)
    trainable.update(is_skipped=True)
    assert all(torch.equal(*pair) for pair in zip(before, trainable.chunks[0].parameters()))
    assert learning_rate(trainable) < rate

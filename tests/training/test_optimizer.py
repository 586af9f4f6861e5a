"""Learning rates: of parts, of the warmup, and what a skipped step leaves alone."""

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from reference import pack_pair_batch, random_pairs

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.optimizer import OptimizerConfig
from megatron_llave.errors import ConfigError
from megatron_llave.models import build_model
from megatron_llave.train import train_step
from megatron_llave.training.optimizer import (
    Trainable,
    build_trainable,
    choose_fused,
    inner_optimizers,
    learning_rate,
    require_runnable,
)

RATE = 1e-3


def build(groups, preset: str = "tiny", **optimizer) -> tuple[object, Trainable]:
    values = {"learning_rate": RATE, **optimizer}
    cfg = config_from_dict({"model": {"preset": preset}, "train": {"steps": 20}, "optimizer": values})
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


def test_part_that_starts_late_stays_as_it_is_until_then(groups) -> None:
    cfg, trainable = build(groups, part_start_steps={"vision": 2}, part_learning_rates={"projector": 1e-5})
    changes = [step(cfg, trainable, groups) for _ in range(4)]
    tower = [max(c for name, c in change.items() if name.startswith("vision")) for change in changes]
    assert tower[:2] == [0.0, 0.0] and min(tower[2:]) > 1e-4
    for change in changes:  # the others know nothing of it
        assert max(c for name, c in change.items() if name.startswith("language")) > 1e-4
        assert 0 < max(c for name, c in change.items() if name.startswith("projector")) <= 1.1e-5
    assert learning_rate(trainable) > 0


def test_learning_rate_of_a_late_part_is_that_of_its_step(groups) -> None:
    """It joins the schedule where the others are; nothing is warmed up again."""
    _, late = build(groups, part_start_steps={"vision": 3}, warmup_steps=2)
    _, plain = build(groups, warmup_steps=2)
    for number in range(8):
        rates = {group["lr"] for group in late.optimizer.param_groups}
        assert rates == ({learning_rate(plain)} if number >= 3 else {0.0, learning_rate(plain)})
        for one in (late, plain):
            one.schedule.step(increment=1)


@pytest.mark.parametrize("preset", ["tiny", "tiny_qwen3vl"])
def test_layers_of_the_vision_encoder_have_decaying_rates(groups, preset: str) -> None:
    """In the first step of AdamW, in which a weight moves by the rate whatever its gradient is."""
    late = {"part_start_steps": {"projector": 9}, "part_learning_rates": {"vision": 2 * RATE}}
    moved = []
    for decay in (1.0, 0.5):
        cfg, trainable = build(groups, preset, vision_layer_decay=decay, **late)
        before = {name: value.detach().clone() for name, value in trainable.chunks[0].module.named_parameters()}
        step(cfg, trainable, groups)
        now = trainable.chunks[0].module.named_parameters()
        moved.append({name: value.detach() - before[name] for name, value in now})
    above = {f"layers.{number}.": 1 - number for number in range(2)}
    for name, plain in moved[0].items():
        scale = 0.5 ** next((n for part, n in above.items() if part in name), 2) if name.startswith("vision") else 1.0
        torch.testing.assert_close(moved[1][name], scale * plain, rtol=0, atol=3e-7)
        assert (plain.abs().max() > RATE / 2) != name.startswith(("projector", "image_newline")), name


def test_norms_of_parts_are_those_of_their_gradients(groups) -> None:
    cfg, trainable = build(groups)
    step(cfg, trainable, groups)  # which leaves the gradients in the buffers, clipped nowhere but in the optimizer's
    squares = trainable.squared_norms().tolist()
    expected = {"vision": 0.0, "projector": 0.0, "language": 0.0}
    for name, parameter in trainable.chunks[0].module.named_parameters():
        part = "projector" if name == "image_newline" else name.split(".")[0]
        expected[part] += parameter.main_grad.double().square().sum().item()
    assert squares == pytest.approx([sum(expected.values()), *expected.values()], rel=1e-5)
    assert min(squares) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tower": 3}, "optimizer.part_start_steps='tower' is not one of"),
        ({"vision": -1}, "vision=-1 must be at least 0"),
    ],
)
def test_first_step_that_cannot_be(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"optimizer": {"part_start_steps": given}})


def test_unknown_part_is_named() -> None:
    with pytest.raises(ConfigError, match="optimizer.part_learning_rates='tower' is not one of vision, projector"):
        config_from_dict({"optimizer": {"part_learning_rates": {"tower": 1e-5}}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"moments": "bf16"}, "optimizer.moments=bf16 needs Transformer Engine, which is not installed"),
        ({"offload_fraction": 0.5}, "optimizer.offload_fraction=0.5 needs a GPU"),
    ],
)
@pytest.mark.skipif(USING_TE_OPTIMIZER or torch.cuda.is_available(), reason="nothing to refuse")
def test_what_this_machine_lacks_is_one_line(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_runnable(OptimizerConfig(**given))
    require_runnable(OptimizerConfig())


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
    trainable.update(None)
    assert all(torch.equal(*pair) for pair in zip(before, trainable.chunks[0].parameters()))
    assert learning_rate(trainable) < rate


def test_fused_update_is_the_same(groups) -> None:
    """A GPU uses torch's fused AdamW, which torch also has for a CPU."""
    plain, fused = (build(groups, weight_decay=0.1)[1] for _ in range(2))
    both = list(zip(inner_optimizers(plain.optimizer), inner_optimizers(fused.optimizer), strict=True))
    for _, inner in both:
        choose_fused(inner, True)
    assert (plain.describe(), fused.describe()) == ("AdamW of torch", "fused AdamW of torch")
    pairs = [p for one in both for p in zip(*(sum((g["params"] for g in inner.param_groups), []) for inner in one))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for one, other in pairs:
            one.grad = other.grad = torch.randn(one.shape, generator=generator)
        for inner in sum(both, ()):
            inner.step()
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [None, True])
def test_checkpoint_does_not_bring_the_choice_of_another_machine(fused: bool | None) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer, other = (torch.optim.AdamW([weight]) for _ in range(2))
    choose_fused(optimizer, fused)
    other.param_groups[0]["fused"] = not fused
    other.step()
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["fused"] is fused
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 2

"""The learned temperature: Adam on its logarithm, within bounds that it can leave again, saved with all its state."""

import math

import pytest
import torch

from megatron_llave.config.loss import LossConfig
from megatron_llave.config.optimizer import OptimizerConfig
from megatron_llave.training.temperature import LearnedTemperature

OPTIMIZER = OptimizerConfig(beta1=0.9, beta2=0.98, epsilon=1e-6)


def learned(how: str = "subset", **keys: object) -> tuple[LearnedTemperature, LossConfig]:
    loss = LossConfig(temperature=0.05, temperature_learning=how, temperature_learning_rate=0.1, **keys)
    return LearnedTemperature(loss, OPTIMIZER), loss


def test_each_subset_has_its_own_and_moves_in_its_own_steps(groups) -> None:
    temperature, loss = learned()
    parameter = torch.tensor(0.05, dtype=torch.float64).log().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.98), eps=1e-6)
    for step, gradient in enumerate([0.3, -2.0, 0.1, 0.0]):
        config, log = temperature.of_step(loss, "birds", step)
        assert config.temperature == math.exp(parameter.item()) and float(log) == float(parameter) and log.requires_grad
        assert temperature.of_step(loss, "trees", step)[0].temperature == pytest.approx(0.05, rel=1e-15)
        temperature.update("birds", gradient)
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step()
    assert temperature.temperatures() == {"birds": math.exp(parameter.item()), "trees": pytest.approx(0.05)}


def test_one_for_all_subsets_that_starts_after_the_warmup(groups) -> None:
    temperature, loss = learned("one", temperature_start=0.2, temperature_warmup_steps=3)
    assert temperature.of_step(loss, "birds", 2) == (loss, None) and temperature.temperatures() == {}
    temperature.of_step(loss, "birds", 3)
    temperature.update("birds", 1.0)
    config, _ = temperature.of_step(loss, "trees", 4)
    assert {"all": config.temperature} == temperature.temperatures() and config.temperature < 0.05


def test_at_a_bound_it_stays_and_comes_back(groups) -> None:
    temperature, loss = learned("one", temperature_bounds=[0.045, 0.06])
    temperature.of_step(loss, "birds", 0)

    def after(gradient: float, steps: int) -> float:
        for _ in range(steps):
            temperature.update("birds", gradient)
        return temperature.temperatures()["all"]

    for outwards, bound in ((1.0, 0.045), (-1.0, 0.06)):
        assert after(outwards, 40) == pytest.approx(bound, rel=1e-12)
        assert 0.045 < after(-outwards, 9) < 0.06, "momentum fades, and it leaves the bound"


@pytest.mark.parametrize("how", ["one", "subset"])
def test_it_goes_on_bit_by_bit_after_a_resume(groups, how: str) -> None:
    (whole, loss), (resumed, _), (old, _) = learned(how), learned(how), learned(how)
    for step, subset in enumerate(["birds", "birds", "trees"]):
        whole.of_step(loss, subset, step)
        whole.update(subset, 0.1 + step)
    whole.of_step(loss, "words", 4)  # known, and not updated yet
    resumed.restore(whole.to_save())
    assert resumed.to_save() == whole.to_save()
    for subset in ("birds", "trees", "words", "new"):
        for temperature in (whole, resumed):
            temperature.of_step(loss, subset, 5)
            temperature.update(subset, -0.7)
    assert resumed.to_save() == whole.to_save()
    old.restore({})  # of a run that did not learn it
    assert old.of_step(loss, "birds", 9)[0].temperature == pytest.approx(0.05, rel=1e-15)

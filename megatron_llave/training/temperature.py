"""The learned temperature of `loss.temperature_learning`: one logarithm, or one for each subset.

It is no parameter of the model: every rank holds the same numbers, the loss gives their gradient, and the training step
updates them beside the optimizer. Adam is that of torch, in float64 on the host.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.batch import to_device
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.optimizer import OptimizerConfig
from megatron_llave.distributed.process_groups import device
from megatron_llave.loss.schedules import is_warming_up

ALL = "all"
"""Name of the temperature that all subsets share."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""State of Adam, in the order in which checkpoints have it."""


class LearnedTemperature:
    """Logarithms of temperatures by name, each with an Adam of its own: a subset's moves in its own steps alone."""

    def __init__(self, loss: LossConfig, optimizer: OptimizerConfig) -> None:
        """Hold none yet: a temperature starts at that of the first step that learns it."""
        self._is_shared = loss.temperature_learning == "one"
        self._lowest, self._highest = map(math.log, loss.temperature_bounds)
        betas = optimizer.beta1, optimizer.beta2
        self._adam = {"lr": loss.temperature_learning_rate, "betas": betas, "eps": optimizer.epsilon}
        self._optimizers: dict[str, torch.optim.Adam] = {}
        self._logs: dict[str, Tensor] = {}

    def of_step(self, config: LossConfig, subset: str, step: int) -> tuple[LossConfig, Tensor | None]:
        """Return the loss with the learned temperature, and its logarithm, a leaf on the device that gets the gradient.

        During the warmup the temperature is that of the schedule, and the second is None.

        Args:
            config: the loss of the step, with the temperature of the schedule (`schedules.at_step`).
            subset: the subset of the step.
            step: steps done before this one.
        """
        if is_warming_up(config, step):
            return config, None
        name = self._name(subset)
        if name not in self._logs:
            self._add(name, math.log(config.temperature))
        log = self._logs[name].detach()
        return replace(config, temperature=math.exp(log.item())), to_device(log.clone(), device()).requires_grad_()

    def update(self, subset: str, gradient: float) -> None:
        """Take a step of Adam with the gradient of the whole step's loss, and put the result back within the bounds.

        At a bound the gradient still counts, so that the temperature leaves it as soon as the gradient turns.
        """
        name = self._name(subset)
        self._logs[name].grad = torch.tensor(gradient, dtype=torch.float64)
        self._optimizers[name].step()
        with torch.no_grad():
            self._logs[name].clamp_(self._lowest, self._highest)

    def temperatures(self) -> dict[str, float]:
        """Return the temperatures by subset, or that of ALL."""
        return {name: math.exp(log.item()) for name, log in self._logs.items()}

    def to_save(self) -> dict[str, list[float]]:
        """Return by name the logarithm and the state of Adam, which is empty before the first update."""
        states = {name: self._optimizers[name].state[log] for name, log in self._logs.items()}
        return {
            name: [log.item(), *(float(states[name][key]) for key in MOMENTS if states[name])]
            for name, log in self._logs.items()
        }

    def restore(self, saved: dict[str, list[float]]) -> None:
        """Restore the result of `to_save`; bounds and rate are those of this run."""
        for name, (log, *moments) in saved.items():
            self._add(name, log)
            if moments:
                values = [torch.tensor(moments[0]), *(torch.tensor(x, dtype=torch.float64) for x in moments[1:])]
                self._optimizers[name].state[self._logs[name]] = dict(zip(MOMENTS, values))

    def _name(self, subset: str) -> str:
        return ALL if self._is_shared else subset

    def _add(self, name: str, log: float) -> None:
        start = min(max(log, self._lowest), self._highest)
        self._logs[name] = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        self._optimizers[name] = torch.optim.Adam([self._logs[name]], **self._adam)


def read_gradient(log_temperature: Tensor | None, groups: ProcessGroupCollection, is_one_pass: bool) -> float | None:
    """Wait for the gradient of the step's loss with respect to the logarithm of the temperature, on all ranks.

    Args:
        log_temperature: the leaf of `of_step`, without a gradient on all pipeline stages but the last; None: the step
            learns no temperature, and there is no gradient.
        groups: the parallel layout.
        is_one_pass: whether the loss went backward inside of megatron-core's schedule, which multiplies it by the
            number of context ranks.
    """
    if log_temperature is None:
        return None
    gradient = torch.zeros_like(log_temperature) if log_temperature.grad is None else log_temperature.grad.clone()
    gradient /= groups.cp.size() if is_one_pass else 1  # before the sum: with a token budget the ranks may differ
    dist.all_reduce(gradient)
    ranks = dist.get_world_size() // groups.pp.size()  # all of the last stage have a share, or a copy of one
    return float(gradient) / ranks

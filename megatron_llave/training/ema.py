"""An exponential moving average of the trained weights: the reward model of `loss.reward: ema`.

Beside the optimizer; training updates it after each step and lends it to the gradient cache as a context.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class ExponentialMovingAverage:
    """Float32 average of the trained parameters of this rank's chunks; frozen ones are their own average.

    In bfloat16 a thousandth of a difference would be rounded away.
    """

    def __init__(self, chunks: list[Module], decay: float) -> None:
        """Start from the weights as they are.

        Args:
            chunks: this rank's model chunks.
            decay: share of the average that an update keeps, once there were enough of them.
        """
        self._chunks, self._decay = chunks, decay
        self.updates = 0
        """Updates so far."""
        trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
        self._averages = [(parameter, parameter.detach().float().clone()) for parameter in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights; faster in the first updates, so that random weights are soon forgotten."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for parameter, average in self._averages:
            average.lerp_(parameter.detach().float(), 1 - decay)

    def tensors(self) -> dict[Parameter, Tensor]:
        """Float32 average of each trained parameter."""
        return dict(self._averages)

    @torch.no_grad()
    def restore(self, averages: dict[Parameter, Tensor], updates: int) -> None:
        """Go on from what `tensors` gave after `updates` updates."""
        for parameter, average in self._averages:
            average.copy_(averages[parameter])
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the chunks hold the average in place of their weights, in the weights' dtype, and do not drop out."""
        held = [parameter.data for parameter, _ in self._averages]
        was_training = [chunk.training for chunk in self._chunks]
        for parameter, average in self._averages:
            # Of the same dtype: with another one torch would forget the hooks that gather the parameter's gradient.
            parameter.data = average.to(parameter.dtype)
        for chunk in self._chunks:
            chunk.eval()
        try:
            yield
        finally:
            for (parameter, _), weight in zip(self._averages, held):
                parameter.data = weight
            for chunk, training in zip(self._chunks, was_training):
                chunk.train(training)

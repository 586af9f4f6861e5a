"""An exponential moving average of the trained weights: the reward model of `loss.reward: ema`.

The training step updates it after the optimizer and passes it to the gradient cache as a context manager.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class ExponentialMovingAverage:
    """Float32 average of the trained parameters of this rank's chunks; a frozen parameter equals its average.

    It is float32 because bfloat16 would round away a thousandth of a difference.
    """

    def __init__(self, chunks: list[Module], decay: float) -> None:
        """Start with the current weights as the average.

        Args:
            chunks: this rank's model chunks.
            decay: share of the average that an update keeps; less in the first updates.
        """
        self._chunks, self._decay = chunks, decay
        self.updates = 0
        """Number of updates so far."""
        trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
        self._averages = [(parameter, parameter.detach().float().clone()) for parameter in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, faster in the first updates so that random weights fade quickly."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for parameter, average in self._averages:
            average.lerp_(parameter.detach().float(), 1 - decay)

    def tensors(self) -> dict[Parameter, Tensor]:
        """Trained parameter -> its float32 average."""
        return dict(self._averages)

    @torch.no_grad()
    def restore(self, averages: dict[Parameter, Tensor], updates: int) -> None:
        """Restore the result of `tensors` and the number of updates at that time."""
        for parameter, average in self._averages:
            average.copy_(averages[parameter])
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the chunks hold the average instead of their weights, and have no dropout."""
        held = [parameter.data for parameter, _ in self._averages]
        was_training = [chunk.training for chunk in self._chunks]
        for parameter, average in self._averages:
            # Keep the dtype: with another one torch would drop the hooks that accumulate the parameter's gradient.
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

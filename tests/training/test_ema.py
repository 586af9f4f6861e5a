"""The averaged weights of the reward model."""

import pytest
import torch

from megatron_llave.training.ema import ExponentialMovingAverage


def layer(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    chunk = torch.nn.Linear(1, 1).to(dtype)
    chunk.bias.requires_grad_(False)
    with torch.no_grad():
        chunk.weight.fill_(1.0)
        chunk.bias.fill_(7.0)
    return chunk


def test_follows_the_weights_slower_and_slower() -> None:
    chunk = layer()
    average = ExponentialMovingAverage([chunk], decay=0.25)
    expected = 1.0
    for update, weight in enumerate((2.0, 3.0, 4.0, 5.0)):
        with torch.no_grad():
            chunk.weight.fill_(weight)
        average.update()
        kept = min(0.25, (1 + update) / (10 + update))
        expected = kept * expected + (1 - kept) * weight
        with average.applied():
            assert chunk.weight.item() == pytest.approx(expected)
            assert chunk.bias.item() == 7.0 and not chunk.training
        assert chunk.weight.item() == weight and chunk.training


def test_weights_come_back_after_an_error() -> None:
    chunk = layer()
    average = ExponentialMovingAverage([chunk], decay=0.5)
    storage = chunk.weight.data_ptr()
    with pytest.raises(RuntimeError, match="on purpose"), average.applied():
        raise RuntimeError("on purpose")
    assert chunk.weight.data_ptr() == storage and chunk.training


def test_small_differences_add_up_in_bfloat16() -> None:
    """A thousandth of a step of 2^-7 is far below bfloat16's spacing, but not below the average's."""
    chunk = layer(torch.bfloat16)
    average = ExponentialMovingAverage([chunk], decay=0.999)
    average.updates = 100_000  # past the fast beginning
    with torch.no_grad():
        chunk.weight.fill_(1.0078125)
    for _ in range(1000):
        average.update()
    assert average.tensors()[chunk.weight].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**1000), abs=1e-5)
    with average.applied():
        assert chunk.weight.dtype == torch.bfloat16

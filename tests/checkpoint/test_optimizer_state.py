"""The boxes by which a rank describes its range of a parameter, against the elements counted one by one."""

import itertools
import math

import pytest
import torch

from megatron_llave.checkpoint.optimizer_state import boxes_of_range


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (3, 1, 2, 2)])
def test_boxes_are_the_range_in_its_order(shape: tuple[int, ...]) -> None:
    number = math.prod(shape)
    elements = torch.arange(number).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(number + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        found = [elements[tuple(slice(o, o + n) for o, n in zip(*box))].flatten() for box in boxes]
        assert torch.cat([torch.arange(0), *found]).tolist() == list(range(start, stop))
        assert len(boxes) <= 2 * len(shape) - 1

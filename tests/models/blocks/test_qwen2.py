"""Which position turns which pair of channels of the decoder's heads, against transformers."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megatron_llave.models.blocks.qwen2 import RotaryEmbedding, mrope_axes


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("section", [[4, 2, 2], [2, 3, 3], [16, 24, 24], [24, 20, 20]])
def test_axes_are_those_of_transformers(section: list[int], is_interleaved: bool) -> None:
    """Of one frequency per axis, also for the slow channels, whose turn a whole model hardly notices."""
    axes = mrope_axes(section, is_interleaved)
    theirs = (Qwen3VLTextRotaryEmbedding if is_interleaved else Qwen2_5_VLRotaryEmbedding).recomposition_frequencies
    owner = SimpleNamespace(mrope_section=section)
    of_axes = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, sum(section)).clone()
    assert torch.cat([torch.tensor(axes)] * 2).tolist() == theirs(owner, of_axes).flatten().tolist()
    if not is_interleaved:
        assert [axes.count(axis) for axis in range(3)] == section


def test_without_sections_there_is_one_axis() -> None:
    assert mrope_axes([], False) is None
    positions = torch.tensor([[0, 5], [1, 6], [2, 7]])
    angles = RotaryEmbedding(4, 100.0, [0, 2])(positions).flatten(1)
    torch.testing.assert_close(angles, torch.tensor([[0.0, 0.2, 0.0, 0.2], [5.0, 0.7, 5.0, 0.7]]))

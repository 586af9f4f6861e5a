"""Where patches lie, against transformers' own index arithmetic."""

import numpy as np
import pytest
import torch
from transformers import vision_utils as theirs

from megatron_llave.models.qwen_vl import patches

GRIDS = [[(1, 4, 4)], [(1, 6, 22), (3, 6, 4), (1, 18, 4)], [(2, 2, 2), (1, 26, 14), (1, 2, 40)]]


@pytest.mark.parametrize("grids", GRIDS)
def test_positions_and_frames_are_those_of_transformers(grids: list[tuple[int, int, int]]) -> None:
    grid = torch.tensor(grids)
    assert patches.patch_positions(grids).T.tolist() == theirs.get_vision_position_ids(grid, 2).tolist()
    bounds = np.cumsum([0, *patches.frame_lengths(grids)])
    assert bounds.tolist() == theirs.get_vision_cu_seqlens(grid).tolist()


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("grids", GRIDS)
def test_windows_are_those_of_transformers(grids: list[tuple[int, int, int]], side: int) -> None:
    order, lengths = patches.window_order(grids, side)
    expected, bounds = theirs.get_vision_window_index(torch.tensor(grids), 2, side * 2 * 14, 14)
    assert order.tolist() == expected.tolist() and np.cumsum([0, *lengths]).tolist() == bounds.tolist()


@pytest.mark.parametrize("grids", GRIDS)
def test_learned_positions_are_interpolated_as_in_transformers(grids: list[tuple[int, int, int]]) -> None:
    """Blended rows of a random table, 1e-6."""
    side, table = 8, torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    corners, weights = map(torch.from_numpy, patches.position_corners(grids, side))
    rows, shares = theirs.get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), side, align_corners=True, spatial_merge_size=2
    )
    ours = (table[corners] * weights[:, :, None]).sum(0)
    torch.testing.assert_close(ours, (table[rows] * shares[:, :, None]).sum(1), rtol=0, atol=1e-6)

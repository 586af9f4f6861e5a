"""Where the patches of a micro batch's images lie: index arithmetic on the CPU, from the grids of patches alone.

Patches come block by block: the four of each 2 x 2 block, which the projector merges into one visual token, follow each
other. A grid has frames, rows and columns of patches; each frame is a sequence of its own for the attention.

Shapes: s patches, k blocks (s = 4k).

Source: transformers' vision_utils.py and modeling_qwen2_5_vl.py.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from megatron_llave.models.qwen_vl.resize import MERGED

Grid = Sequence[int]
"""Frames, rows and columns of patches."""


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Return the number of patches of each frame."""
    return [rows * columns for frames, rows, columns in grids for _ in range(frames)]


def patch_positions(grids: Sequence[Grid]) -> np.ndarray:
    """Return row and column of each patch in its frame, [2, s] int64."""
    of_grids = [np.tile(_in_blocks(np.indices((rows, columns))), frames) for frames, rows, columns in grids]
    return np.concatenate(of_grids, axis=1)


def window_order(grids: Sequence[Grid], side: int) -> tuple[np.ndarray, list[int]]:
    """Return the order in which the blocks of a window follow each other, and the number of patches of each window.

    Args:
        grids: of the images.
        side: of a window, in blocks. Windows at the right and lower end of a frame are smaller.

    Returns:
        [k] int64, for each place the block that stands there; and the lengths of the windows.
    """
    orders, lengths = [], []
    starts = accumulate((frames * rows * columns // MERGED**2 for frames, rows, columns in grids), initial=0)
    for (frames, rows, columns), start in zip(grids, starts):
        frame, row, column = np.indices((frames, rows // MERGED, columns // MERGED))
        down, across = -(-rows // MERGED // side), -(-columns // MERGED // side)
        window = ((frame * down + row // side) * across + column // side).ravel()
        orders.append(np.argsort(window, kind="stable") + start)
        lengths += (np.bincount(window) * MERGED**2).tolist()
    return np.concatenate(orders), lengths


def position_corners(grids: Sequence[Grid], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows of a table of side x side positions are blended for each patch, and their weights.

    The corners of the table are the corner patches of a frame, and positions between are interpolated bilinearly.

    Returns:
        [4, s] int64 and [4, s] float32.
    """
    corners, weights = [], []
    for frames, rows, columns in grids:
        (low, high, right), (left, far, across) = _ends(rows, side), _ends(columns, side)
        row, column = _in_blocks(np.indices((rows, columns)))
        pairs = [(v * side, share) for v, share in ((low, 1 - right), (high, right))]
        found = [
            (top[row] + end[column], down[row] * share[column])
            for top, down in pairs
            for end, share in ((left, 1 - across), (far, across))
        ]
        corners.append(np.tile(np.stack([corner for corner, _ in found]), frames))
        weights.append(np.tile(np.stack([weight for _, weight in found]), frames))
    return np.concatenate(corners, axis=1), np.concatenate(weights, axis=1)


def _ends(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for `size` places on an axis of `side` positions those before and after, and the share of the latter."""
    place = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, side - 1), place - before.astype(np.float32)


def _in_blocks(values: np.ndarray) -> np.ndarray:
    """[n, rows, columns] -> [n, rows * columns], block by block."""
    number, rows, columns = values.shape
    blocks = values.reshape(number, rows // MERGED, MERGED, columns // MERGED, MERGED)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(number, -1)

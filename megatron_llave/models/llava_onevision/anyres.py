"""Anyres, as in the official repository: from an image to uint8 tiles, and the order of their features in the sequence.

The number of visual tokens depends on width and height alone. A grid is (columns, rows) of square tiles; an image
becomes one base tile, into which it is squashed, and the tiles of the grid that suits its size, row by row. Without
grids there is only the base tile.
Shapes: k tiles, p patches per tile, v visual tokens, u of them blended.

If an image keeps the patches of more than 1.21 * `max_tiles` tiles (10.89 for anyres_max_9 of the released models), the
projected features of its grid are reduced by bilinear interpolation: such a visual token is a weighted sum of four
rows. The grids that LLaVE is trained with are at most 2x2, so that this never happens there.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_llave.data.packing import NEWLINE, VisualLayout

Grids = tuple[tuple[int, int], ...]


LARGEST_SHRINKAGE_IGNORED = 1.1
"""A feature map is interpolated only if both its sides would shrink by more than this factor (official repository)."""


def select_grid(width: int, height: int, grids: Grids, tile: int) -> tuple[int, int]:
    """Return the (columns, rows) that keeps most pixels of the image.

    Among equals it is the one with the least padding, and then the first in `grids`.
    """
    best, best_kept, best_wasted = grids[0], -1, 0
    for columns, rows in grids:
        scale = min(columns * tile / width, rows * tile / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = columns * rows * tile * tile - kept
        if kept > best_kept or (kept == best_kept and wasted < best_wasted):
            best, best_kept, best_wasted = (columns, rows), kept, wasted
    return best


def cut_tiles(image: Image.Image, grids: Grids, tile_size: int) -> np.ndarray:
    """RGB image -> uint8 [k, 3, tile_size, tile_size]: the base tile (squashed), then those of the grid, row by row."""
    base = _pixels(_resize(image, tile_size, tile_size))  # [H, W, 3]
    if not grids:
        return np.ascontiguousarray(base.transpose(2, 0, 1))[None]  # [1, 3, H, W]
    columns, rows = select_grid(*image.size, grids, tile_size)
    canvas = _pixels(_resize_and_pad(image, columns * tile_size, rows * tile_size))
    cells = canvas.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3)  # [rows, columns, 3, H, W]
    tiles = np.empty((1 + columns * rows, 3, tile_size, tile_size), np.uint8)
    tiles[0] = base.transpose(2, 0, 1)
    tiles[1:].reshape(cells.shape)[...] = cells
    return tiles


def _pixels(image: Image.Image) -> np.ndarray:
    """Return uint8 [height, width, 3]; twice as fast as np.asarray for small images."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _resize_and_pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the image, its aspect kept, as large as fits and centred on black."""
    size, corner = place(*image.size, width, height)
    if size == (width, height):
        return _resize(image, width, height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(_resize(image, *size), corner)
    return canvas


def place(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) of an image as large as the canvas allows, its aspect kept, and its top left corner."""
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        size = canvas_width, min(math.ceil(height * scale_x), canvas_height)
    else:
        size = min(math.ceil(width * scale_y), canvas_width), canvas_height
    return size, ((canvas_width - size[0]) // 2, (canvas_height - size[1]) // 2)


class FeatureMap(NamedTuple):
    """Sizes of the feature map of an image's grid, in patches, without the base tile."""

    columns: int
    """Tiles side by side."""
    rows: int
    """Tiles on top of each other."""
    skip_x: int
    """Columns of patches on the left that hold only padding; there are as many on the right."""
    skip_y: int
    """Rows of patches at the top that hold only padding; there are as many at the bottom."""
    unpadded: tuple[int, int]
    """(height, width) without the padding."""
    final: tuple[int, int]
    """(height, width) after interpolation; equal to `unpadded` if that is not needed."""


def feature_map(
    width: int, height: int, grids: Grids, tile_size: int, patches_per_side: int, max_tiles: int | None
) -> FeatureMap:
    """Return the result of grid choice, spatial unpad and anyres_max for an image's size; `grids` is not empty.

    A much larger map is reduced to the patches of `max_tiles` tiles; None: never.
    """
    columns, rows = select_grid(width, height, grids, tile_size)
    full_width, full_height = columns * patches_per_side, rows * patches_per_side
    # In float64 and truncated like unpad_image of the official repository; rounding changes the count for some sizes.
    skip_x = skip_y = 0
    if width / height > full_width / full_height:
        skip_y = (full_height - int(height * (full_width / width))) // 2
    else:
        skip_x = (full_width - int(width * (full_height / height))) // 2
    unpadded = final = full_height - 2 * skip_y, full_width - 2 * skip_x
    if max_tiles is not None:
        shrinkage = math.sqrt(unpadded[0] * unpadded[1] / (max_tiles * patches_per_side**2))
        if shrinkage > LARGEST_SHRINKAGE_IGNORED:
            final = int(unpadded[0] // shrinkage), int(unpadded[1] // shrinkage)
    return FeatureMap(columns, rows, skip_x, skip_y, unpadded, final)


@functools.lru_cache(maxsize=256)  # an interpolated layout takes 370 KB
def visual_layout(
    width: int, height: int, grids: Grids, tile_size: int, patches_per_side: int, max_tiles: int | None
) -> VisualLayout:
    """Return the layout of an image of this size; its arrays are read-only.

    The patches of the base tile come first, without newlines; then the patches of the complete grid, row by row across
    tile borders, without rows or columns of padding alone (spatial unpad), each row ending in NEWLINE.
    Without grids: the base tile, then one NEWLINE. `max_tiles`: see feature_map.
    """
    side = patches_per_side
    base = np.arange(side * side, dtype=np.int64)  # [p]
    if not grids:
        layout = VisualLayout(np.append(base, NEWLINE))
    else:
        sizes = feature_map(width, height, grids, tile_size, patches_per_side, max_tiles)
        y = np.arange(sizes.skip_y, sizes.skip_y + sizes.unpadded[0])[:, None]
        x = np.arange(sizes.skip_x, sizes.skip_x + sizes.unpadded[1])[None, :]
        tile = 1 + y // side * sizes.columns + x // side
        patches = tile * side * side + y % side * side + x % side  # [patch rows, patch columns]
        blends = ()
        if sizes.final != sizes.unpadded:
            blends = _bilinear(patches, *sizes.final)
            first = (1 + sizes.columns * sizes.rows) * side * side
            patches = first + np.arange(len(blends[0])).reshape(sizes.final)
        lines = np.pad(patches, ((0, 0), (0, 1)), constant_values=NEWLINE)
        layout = VisualLayout(np.concatenate([base, lines.ravel()]), *blends)
    for array in (layout.source, layout.blend_source, layout.blend_weights):
        array.flags.writeable = False
    return layout


@functools.lru_cache(maxsize=64)
def video_layout(num_frames: int, patches_per_side: int, newline: str) -> VisualLayout:
    """Return the layout of a video with one tile per frame; its arrays are read-only.

    The s x s features of a frame are reduced to ceil(s / 2) x ceil(s / 2) by bilinear interpolation, as get_2dPool of
    the official repository does with stride 2; frame by frame, row by row, with NEWLINE where `newline` says.
    """
    side = patches_per_side
    pooled = -(-side // 2)
    one_source, one_weights = _bilinear(np.arange(side * side).reshape(side, side), pooled, pooled)
    frames = np.arange(num_frames)
    tokens = num_frames * side * side + np.arange(num_frames * pooled * pooled).reshape(num_frames, pooled, pooled)
    if newline == "grid":
        tokens = np.pad(tokens, ((0, 0), (0, 0), (0, 1)), constant_values=NEWLINE)
    elif newline == "frame":
        tokens = np.pad(tokens.reshape(num_frames, -1), ((0, 0), (0, 1)), constant_values=NEWLINE)
    tokens = np.append(tokens, NEWLINE) if newline == "one_token" else tokens.ravel()
    source = (one_source + frames[:, None, None] * side * side).reshape(-1, 4)
    layout = VisualLayout(tokens, source, np.tile(one_weights, (num_frames, 1)))
    for array in (layout.source, layout.blend_source, layout.blend_weights):
        array.flags.writeable = False
    return layout


def num_visual_tokens(
    width: int, height: int, grids: Grids, tile_size: int, patches_per_side: int, max_tiles: int | None
) -> int:
    """Return the length of `visual_layout` for the same arguments."""
    if not grids:
        return patches_per_side**2 + 1
    rows, columns = feature_map(width, height, grids, tile_size, patches_per_side, max_tiles).final
    return patches_per_side**2 + rows * (columns + 1)


def _bilinear(patches: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a map [h, w] to [height, width]: the four patches that each new one is blended from, and their weights.

    torch's interpolate with mode bilinear, align_corners False, no antialias. int64 and float32 [height * width, 4].
    """
    top, down = _between(patches.shape[0], height)
    left, along = _between(patches.shape[1], width)
    corners = [patches[np.ix_(top + y, left + x)] for y in (0, 1) for x in (0, 1)]
    shares = [np.outer(y, x) for y in (1 - down, down) for x in (1 - along, along)]
    return np.stack(corners, axis=-1).reshape(-1, 4), np.stack(shares, axis=-1).reshape(-1, 4)


def _between(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each new position the old one before it, int64 [new_size], and the weight of the one after, float32.

    new_size is so much smaller than size that the position after always exists.
    """
    scale = np.float32(size) / np.float32(new_size)
    # torch computes in float32 with product and difference fused, so that it rounds once; rounding twice makes weights
    # wrong by up to 3e-5.
    position = (np.float64(scale) * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32)
    before = position.astype(np.int64)
    return before, position - before.astype(np.float32)

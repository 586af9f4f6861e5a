"""Encoded image -> uint8 tiles and the order in which their features enter the sequence (anyres), as the released code.

Pure functions; packing.py calls them. The number of visual tokens follows from width and height alone. A grid is
(columns, rows) of square tiles; an image gets the whole picture squashed into one base tile, then the tiles of the grid
that suits its size, row by row. With no grids to choose from there is only the base tile.
Shapes: k tiles, p patches per tile, v visual tokens, u of them blended.

Where an image keeps more than 1.21 * `max_tiles` tiles' worth of patches (10.89 for the released anyres_max_9), the
projected features of its grid are shrunk by bilinear interpolation: such a visual token is a weighted sum of four rows.
The grids LLaVE is trained with end at 2x2, so there it never happens.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_llave.data.packing import NEWLINE, VisualLayout

Grids = tuple[tuple[int, int], ...]


LARGEST_SHRINKAGE_IGNORED = 1.1
"""A feature map is interpolated only if both its sides would shrink by more than this factor, as released."""


def select_grid(width: int, height: int, grids: Grids, tile: int) -> tuple[int, int]:
    """The (columns, rows) that keeps most of the picture's own pixels; on ties less padding, then the earlier one."""
    best, best_kept, best_wasted = grids[0], -1, 0
    for columns, rows in grids:
        scale = min(columns * tile / width, rows * tile / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = columns * rows * tile * tile - kept
        if kept > best_kept or (kept == best_kept and wasted < best_wasted):
            best, best_kept, best_wasted = (columns, rows), kept, wasted
    return best


def cut_tiles(image: Image.Image, grids: Grids, tile_size: int) -> np.ndarray:
    """RGB picture -> uint8 [k, 3, tile_size, tile_size]: base tile (aspect not kept), then the grid's, row by row."""
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
    """uint8 [height, width, 3]; twice as fast as np.asarray for small pictures."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _resize_and_pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture as large as fits with its aspect kept, centred on black."""
    size, corner = place(*image.size, width, height)
    if size == (width, height):
        return _resize(image, width, height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(_resize(image, *size), corner)
    return canvas


def place(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of a picture as large as the canvas allows with its aspect kept, and its top left corner."""
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        size = canvas_width, min(math.ceil(height * scale_x), canvas_height)
    else:
        size = min(math.ceil(width * scale_y), canvas_width), canvas_height
    return size, ((canvas_width - size[0]) // 2, (canvas_height - size[1]) // 2)


class FeatureMap(NamedTuple):
    """Sizes of the feature map of an image's grid, in patches; the base tile is not in it."""

    columns: int
    """Tiles side by side."""
    rows: int
    """Tiles on top of each other."""
    skip_x: int
    """Patch columns on the left, and as many on the right, that hold only padding."""
    skip_y: int
    """Patch rows at the top, and as many at the bottom, that hold only padding."""
    unpadded: tuple[int, int]
    """(height, width) without the padding."""
    final: tuple[int, int]
    """(height, width) once interpolated; the same as `unpadded` where that is not needed."""


def feature_map(
    width: int, height: int, grids: Grids, tile_size: int, patches_per_side: int, max_tiles: int | None
) -> FeatureMap:
    """Grid choice, spatial unpad and anyres_max of the released code, from an image's size (grids not empty).

    `max_tiles`: tiles' worth of patches that the map is shrunk to where it is much larger; None: never.
    """
    columns, rows = select_grid(width, height, grids, tile_size)
    full_width, full_height = columns * patches_per_side, rows * patches_per_side
    # In float64 and truncated like the released unpad_image: rounding instead changes the count for some sizes.
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
    """The layout of an image of this size; its arrays are read-only.

    The base tile's patches come first, without newlines; then the patches of the whole grid, row by row across tile
    borders, without the rows or columns that are padding only (spatial unpad), each row ending in NEWLINE.
    Without grids: the one tile, then one NEWLINE. `max_tiles`: see feature_map.
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
    """The layout of a video, a tile for each frame; its arrays are read-only.

    The features of a frame, s x s of them, are shrunk to ceil(s / 2) x ceil(s / 2) by bilinear interpolation, as the
    released get_2dPool does with stride 2; frame by frame, row by row, with NEWLINE as `newline` says.
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
    """Length of `visual_layout`, from the same sizes."""
    if not grids:
        return patches_per_side**2 + 1
    rows, columns = feature_map(width, height, grids, tile_size, patches_per_side, max_tiles).final
    return patches_per_side**2 + rows * (columns + 1)


def _bilinear(patches: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The map [h, w] shrunk to [height, width]: which four patches each one is blended from and their weights.

    torch's interpolate with mode bilinear, align_corners False, no antialias. int64 and float32 [height * width, 4].
    """
    top, down = _between(patches.shape[0], height)
    left, along = _between(patches.shape[1], width)
    corners = [patches[np.ix_(top + y, left + x)] for y in (0, 1) for x in (0, 1)]
    shares = [np.outer(y, x) for y in (1 - down, down) for x in (1 - along, along)]
    return np.stack(corners, axis=-1).reshape(-1, 4), np.stack(shares, axis=-1).reshape(-1, 4)


def _between(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each new place the old one before it, int64 [new_size], and the share of the one after, float32.

    new_size is so much smaller than size that the place after always exists.
    """
    scale = np.float32(size) / np.float32(new_size)
    # torch's float32, whose compilers fuse product and difference: rounded once. Twice, weights are off by up to 3e-5.
    position = (np.float64(scale) * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32)
    before = position.astype(np.int64)
    return before, position - before.astype(np.float32)

"""Encoded image -> uint8 tiles and the order in which their features enter the sequence (anyres), as the released code.

Pure functions; packing.py calls them. The number of visual tokens follows from width and height alone. A grid is
(columns, rows) of square tiles; an image gets the whole picture squashed into one base tile, then the tiles of the grid
that suits its size, row by row. With no grids to choose from there is only the base tile.
Shapes: k tiles, p patches per tile, v visual tokens.

Where an image keeps more than 10.89 tiles' worth of patches the released code shrinks its feature map by interpolation;
here it keeps every patch. The grids LLaVE is trained with end at 2x2, so there the two never differ.
"""

import functools
import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_llave.errors import DataError

Grids = tuple[tuple[int, int], ...]

NEWLINE = -1
"""Stands in a visual layout for the learned image_newline vector."""

MAX_PIXELS = 89_000_000
"""Largest width * height that is decoded (Pillow warns a little above): a small file could fill the memory."""


class BadImageError(DataError):
    """Bytes that are no readable picture; the pair they belong to is left out."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes -> RGB picture: alpha is dropped and EXIF rotation ignored, as in the released code.

    Raises:
        BadImageError: not a picture, damaged, or more than `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height <= max_pixels:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a readable image in a known format ({len(data)} bytes)") from error
    except Exception as error:  # each of Pillow's decoders raises its own kinds; all mean the same here
        raise BadImageError(f"not a readable image ({len(data)} bytes): {' '.join(str(error).split())}") from error
    raise BadImageError(f"image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels")


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
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        size = width, min(math.ceil(image.height * scale_x), height)
    else:
        size = min(math.ceil(image.width * scale_y), width), height
    if size == (width, height):
        return _resize(image, width, height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(_resize(image, *size), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


@functools.lru_cache(maxsize=1024)
def visual_layout(width: int, height: int, grids: Grids, tile_size: int, patches_per_side: int) -> np.ndarray:
    """Read-only int64 [v]: visual token i is row layout[i] of the image's own features [k * p], or NEWLINE.

    The base tile's patches come first, without newlines; then the patches of the whole grid, row by row across tile
    borders, without the rows or columns that are padding only (spatial unpad), each row ending in NEWLINE.
    Without grids: the one tile, then one NEWLINE.
    """
    side = patches_per_side
    base = np.arange(side * side)  # [p]
    if not grids:
        layout = np.append(base, NEWLINE)
    else:
        columns, rows = select_grid(width, height, grids, tile_size)
        skip_x, skip_y = _padding(width, height, columns * side, rows * side)
        y = np.arange(skip_y, rows * side - skip_y)[:, None]
        x = np.arange(skip_x, columns * side - skip_x)[None, :]
        tile = 1 + y // side * columns + x // side
        source = tile * side * side + y % side * side + x % side  # [patch rows, patch columns]
        lines = np.pad(source, ((0, 0), (0, 1)), constant_values=NEWLINE)
        layout = np.concatenate([base, lines.ravel()])
    layout = layout.astype(np.int64)
    layout.flags.writeable = False
    return layout


def num_visual_tokens(width: int, height: int, grids: Grids, tile_size: int, patches_per_side: int) -> int:
    """Length of `visual_layout`, from the same sizes."""
    side = patches_per_side
    if not grids:
        return side * side + 1
    columns, rows = select_grid(width, height, grids, tile_size)
    skip_x, skip_y = _padding(width, height, columns * side, rows * side)
    return side * side + (rows * side - 2 * skip_y) * (columns * side - 2 * skip_x + 1)


def _padding(width: int, height: int, patch_columns: int, patch_rows: int) -> tuple[int, int]:
    """Patch columns (left and right alike) and rows (top and bottom alike) that hold only padding.

    In float64 and truncated like the released unpad_image: rounding instead changes the count for some sizes.
    """
    if width / height > patch_columns / patch_rows:
        return 0, (patch_rows - int(height * (patch_columns / width))) // 2
    return (patch_columns - int(width * (patch_rows / height))) // 2, 0

"""Images and videos of the Qwen-VL families: their size in patches, and their pixels as one tile per visual token.

An image keeps its shape. It is resized so that its sides are multiples of two patches and its number of pixels lies
within a budget, as transformers' processors do it (4.57 and 5.23; `smart_resize`). The size is known from width and
height alone. A patch has two frames: those of a video, or an image twice, of which its tiles have one. Four patches,
two rows by two columns, become one visual token, and are one tile. Pillow resizes frames too, while transformers does
so with torchvision, whose bicubic filter may differ by one of 255 levels.

Shapes: k visual tokens, f frames, P side of a patch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_llave.config.data import DataConfig
from megatron_llave.data.image_files import BadImageError
from megatron_llave.errors import require

MERGED = 2
"""Patches along each side of the block that becomes a visual token."""
FRAMES = 2
"""Frames of a patch."""
LONGEST_SHAPE = 200
"""How many times as long as wide an image may be."""
DEFAULT_TOKENS = (4, 1280)
"""Visual tokens of the smallest and of the largest image where data.min_pixels and data.max_pixels are null."""

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches of an image or a video; a frame of patches is two frames of pixels."""


@dataclass(frozen=True)
class PixelBudget:
    """How large images and videos become."""

    patch_size: int
    """P, the side of a patch, pixels."""
    min_pixels: int
    """Images with fewer pixels are enlarged."""
    max_pixels: int
    """Images with more pixels are shrunk."""
    is_for_whole_video: bool = False
    """Whether the pixels of all frames count together, as for Qwen3-VL; otherwise those of each frame count."""

    @property
    def unit(self) -> int:
        """The side of a visual token, pixels, of which both sides of an image become multiples."""
        return MERGED * self.patch_size

    def image_grid(self, width: int, height: int) -> Grid:
        """Return the patches of an image.

        Raises:
            BadImageError: one side is more than 200 times as long as the other.
        """
        return self._grid(1, (width, height), (width, height), 1)

    def video_grid(self, num_frames: int, width: int, height: int) -> Grid:
        """Return the patches of a video; an odd number of frames counts as one more.

        Raises:
            BadImageError: one side is more than 200 times as long as the other.
        """
        num_pairs, size = -(-num_frames // FRAMES), (width, height)
        if not self.is_for_whole_video:
            return self._grid(num_pairs, size, size, 1)
        if min(size) < self.unit:
            scale = max(self.unit / height, self.unit / width)
            size = (int(width * scale), int(height * scale))
        return self._grid(num_pairs, size, (width, height), max(num_frames, FRAMES))

    def _grid(self, num_pairs: int, size: tuple[int, int], given: tuple[int, int], counted_frames: int) -> Grid:
        """Return the grid for a width and height that count `counted_frames` times; `given` is for the message."""
        if max(size) / min(size) > LONGEST_SHAPE:
            shape = "x".join(map(str, given))
            raise BadImageError(f"image of {shape} pixels has a side more than {LONGEST_SHAPE} times the other one")
        width, height = size
        unit, pixels = self.unit, counted_frames * width * height
        columns, rows = round(width / unit), round(height / unit)  # to even, as Python and transformers do
        times = 1 if counted_frames == 1 else round(counted_frames / FRAMES) * FRAMES
        if times * columns * rows * unit**2 > self.max_pixels:
            shrink = math.sqrt(pixels / self.max_pixels)
            columns, rows = (max(1, math.floor(side / shrink / unit)) for side in (width, height))
        elif times * columns * rows * unit**2 < self.min_pixels:
            enlarge = math.sqrt(self.min_pixels / pixels)
            columns, rows = (math.ceil(side * enlarge / unit) for side in (width, height))
        return num_pairs, rows * MERGED, columns * MERGED


def pixel_budget(data: DataConfig, patch_size: int, is_for_whole_video: bool = False) -> PixelBudget:
    """Return the budget of a configuration.

    Raises:
        ConfigError: data.min_pixels is above data.max_pixels, one of which is the default.
    """
    lowest, highest = (tokens * (MERGED * patch_size) ** 2 for tokens in DEFAULT_TOKENS)
    lowest = lowest if data.min_pixels is None else data.min_pixels
    highest = highest if data.max_pixels is None else data.max_pixels
    require(lowest <= highest, f"data.min_pixels={lowest} is above data.max_pixels={highest}; set both")
    return PixelBudget(patch_size, lowest, highest, is_for_whole_video)


def num_visual_tokens(grid: Grid) -> int:
    """Return k, the number of visual tokens, and of tiles, of a grid."""
    return math.prod(grid) // MERGED**2


def image_tiles(image: Image.Image, budget: PixelBudget) -> tuple[np.ndarray, Grid]:
    """Return the tiles of an RGB image, [k, 4, 3, 1, P, P] uint8 (`frame_tiles`), and its grid.

    Raises:
        BadImageError: one side is more than 200 times as long as the other.
    """
    grid = budget.image_grid(*image.size)
    pixels = _resized(image, grid, budget.patch_size)
    return frame_tiles(pixels[None], budget.patch_size, 1), grid


def video_tiles(frames: np.ndarray, budget: PixelBudget) -> tuple[np.ndarray, Grid]:
    """Return the tiles of a video, [k, 4, 3, 2, P, P] uint8 (`frame_tiles`), and its grid.

    Args:
        frames: [f, height, width, 3] uint8 RGB; the last one of an odd number is repeated.
        budget: of the run.

    Raises:
        BadImageError: one side is more than 200 times as long as the other.
    """
    num_frames, height, width, _ = frames.shape
    grid = budget.video_grid(num_frames, width, height)
    resized = [_resized(Image.fromarray(frame), grid, budget.patch_size) for frame in frames]
    resized += resized[-1:] * (-num_frames % FRAMES)
    return frame_tiles(np.stack(resized), budget.patch_size), grid


def frame_tiles(frames: np.ndarray, patch_size: int, frames_per_tile: int = FRAMES) -> np.ndarray:
    """Cut frames into tiles, one per visual token.

    Args:
        frames: [f, height, width, 3] uint8; f is even, height and width are multiples of 2 * patch_size.
        patch_size: P.
        frames_per_tile: 2, or 1 for an image, which is the same in both frames.

    Returns:
        [k, 4, 3, frames_per_tile, P, P] uint8 in the order of pairs of frames, rows, columns: the patches of a visual
        token row by row, and of each its channels, frames, rows and columns of pixels. With both frames,
        `tiles.reshape(4 * k, -1)` are the rows of transformers' pixel_values, before they are normalised.
    """
    num_frames, height, width, channels = frames.shape
    rows, columns = (side // (MERGED * patch_size) for side in (height, width))
    in_time = (num_frames // frames_per_tile, frames_per_tile)
    shape = (*in_time, rows, MERGED, patch_size, columns, MERGED, patch_size, channels)
    tiles = frames.reshape(shape).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return tiles.reshape(-1, MERGED**2, channels, frames_per_tile, patch_size, patch_size)


def normalise(tiles: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the pixels that the vision encoder takes: (pixel / 255 - mean) / std, equal to transformers' bit by bit.

    Args:
        tiles: [k, 4, 3, 1 or 2, P, P] uint8, one frame of images or both.
        mean: [3] float32, of red, green and blue, where 255 is 1; on the device of `tiles`.
        std: [3] float32, likewise, the deviation.

    Returns:
        [k, 4, 3, 2, P, P] float32, a view that has an image's one frame as both.
    """
    white = torch.full((), 255.0, device=tiles.device)  # by a number, CUDA multiplies with its reciprocal
    pixels = (tiles.float() / white - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    return pixels.expand(-1, -1, -1, FRAMES, -1, -1)


def _resized(image: Image.Image, grid: Grid, patch_size: int) -> np.ndarray:
    """Return the pixels [height, width, 3] uint8 of an image that is resized to a grid."""
    _, rows, columns = grid
    return np.asarray(image.resize((columns * patch_size, rows * patch_size), Image.Resampling.BICUBIC))

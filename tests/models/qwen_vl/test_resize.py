"""Sizes, patches and pixel values of the Qwen-VL families against transformers: stored ones, and its own functions."""

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from megatron_llave.config.data import DataConfig
from megatron_llave.data.image_files import BadImageError
from megatron_llave.errors import ConfigError
from megatron_llave.models.qwen_vl.resize import (
    PixelBudget,
    frame_tiles,
    image_tiles,
    normalise,
    num_visual_tokens,
    pixel_budget,
    video_tiles,
)

GOLDEN = Path(__file__).parents[2] / "golden/qwen_vl"
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
MEAN_AND_STD = {"qwen2_vl": CLIP, "qwen2_5_vl": CLIP, "qwen3_vl": ([0.5] * 3, [0.5] * 3)}


def checks(family: str) -> dict:
    return json.loads((GOLDEN / family / "checks.json").read_text())


def budget(family: str) -> PixelBudget:
    stored = checks(family)
    return PixelBudget(stored["patch"], stored["min_pixels"], stored["max_pixels"], family == "qwen3_vl")


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / f"picture_{name}.png").convert("RGB")


def smart_resize_of(module: str) -> Callable[..., tuple[int, int]]:
    """transformers' own function, taken from its source since the module around it needs torchvision."""
    source = (Path(transformers.__file__).parent / "models" / module).read_text()
    [function] = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "smart_resize"]
    names: dict = {"math": math}
    exec(compile(ast.Module([function], []), module, "exec"), names)
    return names["smart_resize"]


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_the_stored_one(family: str) -> None:
    for entry in checks(family)["geometry"]:
        assert list(budget(family).image_grid(entry["width"], entry["height"])) == entry["grid_thw"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("case", "pictures"),
    [("image_small", ["small"]), ("image_wide", ["wide"]), ("image_tall", ["tall"]), ("two_images", ["wide", "small"])],
)
def test_pixel_values_are_the_stored_ones_bit_by_bit(family: str, case: str, pictures: list[str]) -> None:
    tiles, grids = zip(*(image_tiles(picture(name), budget(family)) for name in pictures))
    mean, std = map(torch.tensor, MEAN_AND_STD[family])
    with np.load(GOLDEN / family / f"input_{case}.npz") as stored:
        assert [list(grid) for grid in grids] == stored["image_grid_thw"].tolist()
        expected = stored["pixel_values"]
    values = normalise(torch.from_numpy(np.concatenate(tiles)), mean, std)
    assert torch.equal(values.reshape(len(expected), -1), torch.from_numpy(expected))
    assert [len(of_image) for of_image in tiles] == [num_visual_tokens(grid) for grid in grids]


def test_images_are_resized_as_transformers_resizes_them() -> None:
    theirs = smart_resize_of("qwen2_vl/image_processing_qwen2_vl.py")
    rng = np.random.default_rng(0)
    sizes = np.unique(np.exp(rng.uniform(0, 8, (400, 2))).astype(int), axis=0).tolist() + [[200, 1], [1, 200], [7, 7]]
    for limits in [(3136, 50176), (3136, 1003520), (100352, 100352), (1, 784)]:
        ours = PixelBudget(14, *limits)
        for width, height in sizes:
            if max(width, height) > 200 * min(width, height):
                with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
                    theirs(height, width, 28, *limits)
                with pytest.raises(BadImageError, match=f"image of {width}x{height} pixels has a side more than 200"):
                    ours.image_grid(width, height)
                continue
            rows, columns = theirs(height, width, 28, *limits)
            assert ours.image_grid(width, height) == (1, rows // 14, columns // 14), (width, height, limits)


def test_videos_of_qwen3_vl_share_the_pixels_of_all_frames() -> None:
    theirs = smart_resize_of("qwen3_vl/video_processing_qwen3_vl.py")
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.uniform(0, 7.5, (200, 2))).astype(int).tolist()
    for limits in [(4096, 65536), (131072, 786432)]:
        ours = PixelBudget(16, *limits, is_for_whole_video=True)
        for number, (width, height) in enumerate(sizes):
            frames = 2 + number % 31
            try:
                rows, columns = theirs(frames, height, width, 2, 32, *limits)
            except ValueError:
                with pytest.raises(BadImageError, match=f"image of {width}x{height} pixels has a side more than 200"):
                    ours.video_grid(frames, width, height)
                continue
            expected = ((frames + 1) // 2, rows // 16, columns // 16)
            assert ours.video_grid(frames, width, height) == expected, (frames, width, height, limits)
        assert ours.video_grid(1, 640, 480) == ours.video_grid(2, 640, 480), "one frame is a pair with itself"


def test_frames_of_other_families_are_resized_like_images() -> None:
    ours = PixelBudget(14, 3136, 50176)
    assert ours.video_grid(9, 300, 90) == (5, 6, 22) and ours.image_grid(300, 90) == (1, 6, 22)


def test_a_video_is_cut_into_pairs_of_frames_and_its_last_frame_repeated() -> None:
    frames = np.stack([np.asarray(picture("wide").rotate(angle)) for angle in (0, 90, 180)])
    ours = PixelBudget(14, 3136, 20000)
    tiles, grid = video_tiles(frames, ours)
    pictures = [image_tiles(Image.fromarray(frame), ours) for frame in frames]
    assert {found for _, found in pictures} == {(1, *grid[1:])} and grid[0] == 2
    [first, second, third] = [of_frame[:, :, :, 0] for of_frame, _ in pictures]
    expected = np.concatenate([np.stack([first, second], axis=3), np.stack([third, third], axis=3)])
    assert np.array_equal(tiles, expected)


def test_a_tile_is_two_rows_of_two_patches() -> None:
    pixels = np.arange(2 * 8 * 12 * 3, dtype=np.uint16).astype(np.uint8).reshape(2, 8, 12, 3)
    tiles = frame_tiles(pixels, 2)
    assert tiles.shape == (6, 4, 3, 2, 2, 2)
    for row, column, patch, frame in np.ndindex(2, 3, 4, 2):
        top, left = row * 4 + patch // 2 * 2, column * 4 + patch % 2 * 2
        expected = pixels[frame, top : top + 2, left : left + 2].transpose(2, 0, 1)
        assert np.array_equal(tiles[row * 3 + column, patch, :, frame], expected)


def test_the_default_budget_is_four_to_1280_visual_tokens() -> None:
    assert pixel_budget(DataConfig(), 14) == PixelBudget(14, 3136, 1003520)
    assert pixel_budget(DataConfig(min_pixels=1024, max_pixels=4096), 16) == PixelBudget(16, 1024, 4096)
    with pytest.raises(ConfigError, match="data.min_pixels=2000000 is above data.max_pixels=1003520; set both"):
        pixel_budget(DataConfig(min_pixels=2_000_000), 14)


def test_frames_differ_from_those_of_torchvision_by_one_level_at_most() -> None:
    """torch's bicubic filter on uint8 is what torchvision, and so transformers, resizes frames with."""
    frame = np.asarray(picture("wide"))
    ours = PixelBudget(14, 3136, 20000)
    tiles, (_, rows, columns) = video_tiles(np.stack([frame, frame]), ours)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(frame.transpose(2, 0, 1).copy())[None],
        (rows * 14, columns * 14),
        mode="bicubic",
        antialias=True,
    )
    resized = frame_tiles(theirs.permute(0, 2, 3, 1).repeat(2, 1, 1, 1).numpy(), 14)
    assert np.abs(tiles.astype(int) - resized).max() <= 1

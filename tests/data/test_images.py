"""Anyres against the released code's numbers: geometry, token counts, tile pixels, merged features; and bad bytes."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from megatron_llave.data.images import (
    NEWLINE,
    BadImageError,
    cut_tiles,
    decode_image,
    num_visual_tokens,
    select_grid,
    visual_layout,
)

GOLDEN = Path(__file__).parents[1] / "golden/anyres"
GEOMETRY = json.loads((GOLDEN / "geometry.json").read_text())
TILES = json.loads((GOLDEN / "images.json").read_text())["images"]
MERGE = {case["name"]: case for case in json.loads((GOLDEN / "merge.json").read_text())}
TILE, SIDE = GEOMETRY["tile"], GEOMETRY["patches_per_side"]


def grids_up_to(n):
    """All (columns, rows) up to n x n, columns outermost."""
    return tuple((columns, rows) for columns in range(1, n + 1) for rows in range(1, n + 1))


GRIDS = {"(1x1),...,(2x2)": grids_up_to(2), "(1x1),...,(6x6)": grids_up_to(6)}


@pytest.mark.parametrize("name", GRIDS)
def test_geometry_of_every_golden_size(name):
    grids, rows = GRIDS[name], GEOMETRY["grids"][name]
    assert len(rows) > 30
    for row in rows:
        size = row["width"], row["height"]
        assert select_grid(*size, grids, TILE) == (row["grid_cols"], row["grid_rows"]), size
        if row["interpolated"]:
            assert name != "(1x1),...,(2x2)"
            continue
        layout = visual_layout(*size, grids, TILE, SIDE)
        assert len(layout) == num_visual_tokens(*size, grids, TILE, SIDE) == row["n_visual_tokens"], size
        assert (layout == NEWLINE).sum() == row["n_newline_tokens"], size
        assert layout.max() < row["n_tiles_with_base"] * SIDE**2


def test_count_without_grids():
    layout = visual_layout(500, 20, (), TILE, SIDE)
    assert len(layout) == num_visual_tokens(500, 20, (), TILE, SIDE) == GEOMETRY["single_tile"]["n_visual_tokens"]
    np.testing.assert_array_equal(layout, [*range(SIDE**2), NEWLINE])


@pytest.mark.parametrize("case", TILES)
def test_tiles_have_the_released_pixels(case):
    name, grids = case.split("|")
    tiles = cut_tiles(decode_image((GOLDEN / "images" / name).read_bytes()), GRIDS[grids], TILE)
    hashes = [hashlib.sha256(np.ascontiguousarray(tile.transpose(1, 2, 0))).hexdigest() for tile in tiles]
    recent = int(PIL.__version__.split(".")[0]) >= 13
    assert hashes == TILES[case]["tiles_uint8_hwc_sha256_pillow13" if recent else "tiles_uint8_hwc_sha256"]
    assert tiles.dtype == np.uint8 and tiles.shape == (TILES[case]["n_tiles_with_base"], 3, TILE, TILE)


@pytest.mark.parametrize(
    "name", [n for n, c in MERGE.items() if c["modality"] == "image" and n != "anyres_2000x800_g6"]
)
def test_layout_gathers_the_released_visual_tokens(name):
    arrays, case = np.load(GOLDEN / "merge.npz"), MERGE[name]
    features = np.concatenate([arrays[f"{name}_in"].reshape(-1, 8), arrays["image_newline"][None]])
    grids = () if name == "single_tile" else GRIDS[case["grid"]]
    merged = features[visual_layout(*case["size_wh"], grids, TILE, SIDE)]  # NEWLINE = -1 is the last row
    np.testing.assert_array_equal(merged, arrays[f"{name}_out"])


def test_layout_is_shared_and_cannot_be_changed():
    layout = visual_layout(500, 300, GRIDS["(1x1),...,(2x2)"], TILE, SIDE)
    assert layout is visual_layout(500, 300, GRIDS["(1x1),...,(2x2)"], TILE, SIDE)
    with pytest.raises(ValueError, match="read-only"):
        layout[0] = 1


def png(image, **options):
    """The image as encoded bytes."""
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def test_one_tile_without_grids_keeps_pixels_of_a_fitting_image():
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    tiles = cut_tiles(decode_image(png(Image.fromarray(pixels))), (), 56)
    np.testing.assert_array_equal(tiles, pixels.transpose(2, 0, 1)[None])
    assert tiles.flags.c_contiguous
    assert cut_tiles(Image.new("RGB", (30, 90), "red"), (), 56).shape == (1, 3, 56, 56)


def test_grid_tiles_go_row_by_row():
    image = Image.new("RGB", (112, 112))
    for number, corner in enumerate([(0, 0), (56, 0), (0, 56), (56, 56)]):
        image.paste((10 * number + 10,) * 3, (*corner, corner[0] + 56, corner[1] + 56))
    tiles = cut_tiles(image, grids_up_to(2), 56)
    assert tiles.shape == (5, 3, 56, 56)
    assert [int(np.unique(tile).item()) for tile in tiles[1:]] == [10, 20, 30, 40]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (9, 7))
    data = io.BytesIO()
    image.save(data, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode_image(data.getvalue())
    assert decoded.mode == "RGB" and decoded.size == (9, 7)


def test_alpha_is_dropped_not_blended():
    assert decode_image(png(Image.new("RGBA", (4, 4), (200, 100, 50, 0)))).getpixel((1, 1)) == (200, 100, 50)


PIXELS = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture at all",
        png(Image.fromarray(PIXELS))[:2000],
        png(Image.fromarray(PIXELS))[:8] + b"\xff" * 500,
        png(Image.fromarray(PIXELS)).replace(b"IDAT", b"IDAX"),
    ],
)
def test_unreadable_bytes_are_a_bad_image(data):
    with pytest.raises(BadImageError, match="not a readable image") as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding():
    data = png(Image.new("1", (12000, 12000)))
    assert len(data) < 100_000
    with pytest.raises(BadImageError, match="12000x12000 pixels exceeds the limit of 89000000"):
        decode_image(data)
    with pytest.raises(BadImageError, match="limit of 10 pixels"):
        decode_image(png(Image.new("RGB", (4, 4))), max_pixels=10)

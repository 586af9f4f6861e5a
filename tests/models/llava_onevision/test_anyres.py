"""Anyres against the released code's numbers: geometry, token counts, tile pixels, merged features; and bad bytes."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.data.image_files import HIGH_BITS, RELEASED, TRANSPARENT, BadImageError, decode_image
from megatron_llave.data.packing import NEWLINE
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.models.blocks.siglip import normalise
from megatron_llave.models.llava_onevision import processor as processor_module
from megatron_llave.models.llava_onevision.anyres import cut_tiles, feature_map, num_visual_tokens, place, visual_layout
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

GOLDEN = Path(__file__).parents[2] / "golden/anyres"
TOKENIZER = GOLDEN.parent / "prompts" / "qwen_subset_tokenizer.json"
GEOMETRY = json.loads((GOLDEN / "geometry.json").read_text())
TILES = json.loads((GOLDEN / "images.json").read_text())["images"]
TILE, SIDE = GEOMETRY["tile"], GEOMETRY["patches_per_side"]


def grids_up_to(n):
    """All (columns, rows) up to n x n, columns outermost."""
    return tuple((columns, rows) for columns in range(1, n + 1) for rows in range(1, n + 1))


GRIDS = {"(1x1),...,(2x2)": grids_up_to(2), "(1x1),...,(6x6)": grids_up_to(6)}


@pytest.mark.parametrize("name", GRIDS)
def test_geometry_of_every_golden_size(name):
    grids, rows = GRIDS[name], GEOMETRY["grids"][name]
    assert len(rows) == 36 and sum(row["interpolated"] for row in rows) == (6 if name.endswith("(6x6)") else 0)
    for row in rows:
        size = row["width"], row["height"]
        sizes = feature_map(*size, grids, TILE, SIDE, 9)
        canvas = sizes.columns * TILE, sizes.rows * TILE
        resized, corner = place(*size, *canvas)
        layout = visual_layout(*size, grids, TILE, SIDE, 9)
        num_features = (1 + sizes.columns * sizes.rows) * SIDE**2
        ours = {
            "best_resolution": [*canvas],
            "grid_cols": sizes.columns,
            "grid_rows": sizes.rows,
            "n_tiles": sizes.columns * sizes.rows,
            "n_tiles_with_base": 1 + sizes.columns * sizes.rows,
            "resized_wh": [*resized],
            "paste_xy": [*corner],
            "padded_feature_hw": [sizes.rows * SIDE, sizes.columns * SIDE],
            "unpadded_feature_hw": [*sizes.unpadded],
            "interpolated": len(layout.blend_source) > 0,
            "final_feature_hw": [*sizes.final],
            "n_newline_tokens": (layout.source == NEWLINE).sum(),
            "n_visual_tokens": len(layout),
        }
        assert ours == {column: row[column] for column in ours}, size
        assert {*row} - {*ours} == {"width", "height", "hf_unpadded_feature_hw", "hf_unpad_differs"}
        assert num_visual_tokens(*size, grids, TILE, SIDE, 9) == len(layout)
        assert layout.source.max() < num_features + len(layout.blend_source)
        assert (layout.blend_source < num_features).all() and (layout.blend_source >= SIDE**2).all()


def test_count_without_grids():
    layout = visual_layout(500, 20, (), TILE, SIDE, 9)
    assert len(layout) == num_visual_tokens(500, 20, (), TILE, SIDE, 9) == GEOMETRY["single_tile"]["n_visual_tokens"]
    np.testing.assert_array_equal(layout.source, [*range(SIDE**2), NEWLINE])


@pytest.mark.parametrize("case", TILES)
def test_tiles_have_the_released_pixels(case):
    name, grids = case.split("|")
    golden = TILES[case]
    image = decode_image((GOLDEN / "images" / name).read_bytes(), RELEASED)
    assert hashlib.sha256(image.tobytes()).hexdigest() == golden["rgb_uint8_sha256"]
    tiles = cut_tiles(image, GRIDS[grids], TILE)
    hashes = [hashlib.sha256(np.ascontiguousarray(tile.transpose(1, 2, 0))).hexdigest() for tile in tiles]
    recent = int(PIL.__version__.split(".")[0]) >= 13
    assert hashes == golden["tiles_uint8_hwc_sha256_pillow13" if recent else "tiles_uint8_hwc_sha256"]
    assert tiles.dtype == np.uint8 and tiles.shape == (golden["n_tiles_with_base"], 3, TILE, TILE)


@pytest.mark.parametrize("case", TILES)
def test_normalised_tiles_are_the_released_tensors(case):
    """Bit for bit, except for the one tile that Pillow 13 resizes otherwise, by up to two levels (0.016)."""
    name, grids = case.split("|")
    image = decode_image((GOLDEN / "images" / name).read_bytes(), RELEASED)
    pixels = normalise(torch.from_numpy(cut_tiles(image, GRIDS[grids], TILE)))
    golden, stats = TILES[case], np.load(GOLDEN / "images_stats.npz")
    known = [a == b for a, b in zip(golden["tiles_uint8_hwc_sha256"], golden["tiles_uint8_hwc_sha256_pillow13"])]
    exact = np.array(known) if int(PIL.__version__.split(".")[0]) >= 13 else np.ones(len(known), bool)
    assert exact.sum() >= len(exact) - (name == "tall_150x420.png")
    hashes = np.array([hashlib.sha256(tile.numpy()).hexdigest() for tile in pixels])
    np.testing.assert_array_equal(hashes[exact], np.array(golden["tiles_f32_chw_sha256"])[exact])
    name = case.replace("|", "__")
    mean_std = torch.stack([pixels.mean(dim=(1, 2, 3)), pixels.std(dim=(1, 2, 3))], dim=1)
    np.testing.assert_allclose(mean_std, stats[f"{name}_mean_std_f16"], rtol=0, atol=2e-3)
    channel_mean = pixels.double().mean(dim=(2, 3))
    np.testing.assert_allclose(channel_mean[exact], stats[f"{name}_channel_mean_f64"][exact], rtol=0, atol=1e-6)
    for key, values in ((f"{name}_first8_f16", pixels[:, :, 0, :8]), (f"{name}_mid8_f16", pixels[:, :, 192, 188:196])):
        np.testing.assert_allclose(values[exact], stats[key][exact], rtol=0, atol=1e-3)
        np.testing.assert_allclose(values, stats[key], rtol=0, atol=0.016)


def test_layout_is_shared_and_cannot_be_changed():
    sizes = 2000, 800, GRIDS["(1x1),...,(6x6)"], TILE, SIDE, 9
    layout = visual_layout(*sizes)
    assert layout is visual_layout(*sizes)
    for array in (layout.source, layout.blend_source, layout.blend_weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("max_tiles", [1, 2, 9])
def test_blended_rows_are_torchs_interpolation(max_tiles):
    """Against interpolate on the unpadded map of random features, 1e-6; also for other caps than the released 9."""
    grids, side, width, height = grids_up_to(6), 5, 2100, 1300
    sizes = feature_map(width, height, grids, 384, side, max_tiles)
    layout = visual_layout(width, height, grids, 384, side, max_tiles)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(36 * 25, 3)).astype(np.float32))
    tiles = features[25 : 25 + sizes.columns * sizes.rows * 25].reshape(sizes.rows, sizes.columns, side, side, 3)
    whole = tiles.permute(4, 0, 2, 1, 3).reshape(1, 3, sizes.rows * side, sizes.columns * side)
    y, x = (whole.shape[2] - sizes.unpadded[0]) // 2, (whole.shape[3] - sizes.unpadded[1]) // 2
    unpadded = whole[:, :, y : y + sizes.unpadded[0], x : x + sizes.unpadded[1]]
    expected = F.interpolate(unpadded, list(sizes.final), mode="bilinear")[0].flatten(1).T
    blended = (features[layout.blend_source.copy()] * torch.tensor(layout.blend_weights)[:, :, None]).sum(1)
    torch.testing.assert_close(blended, expected, rtol=0, atol=1e-6)
    assert sizes.final[0] * sizes.final[1] <= max_tiles * side**2


def test_interpolation_starts_above_the_threshold_and_can_be_switched_off():
    for columns in (11, 12):  # 10 is the cap: sqrt(1.1) = 1.049, sqrt(1.2) = 1.095
        sizes = feature_map(columns * 10, 10, ((columns, 1),), 10, 10, 10)
        assert sizes.final == sizes.unpadded == (10, columns * 10)
    shrunk = feature_map(130, 10, ((13, 1),), 10, 10, 10)  # sqrt(1.3) = 1.140
    assert (shrunk.unpadded, shrunk.final) == ((10, 130), (8, 114))
    assert len(visual_layout(130, 10, ((13, 1),), 10, 10, 10)) == 100 + 8 * 115
    whole = visual_layout(130, 10, ((13, 1),), 10, 10, None)
    assert len(whole) == num_visual_tokens(130, 10, ((13, 1),), 10, 10, None) == 100 + 10 * 131
    assert len(whole.blend_source) == 0


def png(image):
    """The image as encoded bytes."""
    return encoded(image, "PNG")


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


def noise(mode, size=(90, 40)):
    """A picture of random pixels in one of Pillow's modes."""
    rng = np.random.default_rng(3)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    if mode == "P":
        return noise("RGB", size).quantize(16)
    if mode == "1":
        return noise("L", size).convert("1")
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (size[1], size[0], channels)).astype(np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def encoded(image, kind, **options):
    """The image as encoded bytes."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def rotated():
    """EXIF that says: turn by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


INPUTS = {
    "grey": lambda: encoded(noise("L"), "PNG"),
    "grey+alpha": lambda: encoded(noise("LA"), "PNG"),
    "alpha": lambda: encoded(noise("RGBA"), "PNG"),
    "palette": lambda: encoded(noise("P"), "PNG"),
    "palette, one colour transparent": lambda: encoded(noise("P"), "PNG", transparency=3),
    "palette, alpha per colour": lambda: encoded(noise("P"), "PNG", transparency=bytes(range(0, 160, 10))),
    "rgb, one colour transparent": lambda: encoded(noise("RGB"), "PNG", transparency=(0, 0, 0)),
    "1 bit": lambda: encoded(noise("1"), "PNG"),
    "16 bit": lambda: encoded(noise("I;16"), "PNG"),
    "cmyk jpeg": lambda: encoded(noise("CMYK"), "JPEG"),
    "cmyk tiff": lambda: encoded(noise("CMYK"), "TIFF"),
    "grey jpeg": lambda: encoded(noise("L"), "JPEG"),
    "32 bit": lambda: encoded(Image.fromarray(np.arange(-1800, 1800, dtype=np.int32).reshape(40, 90)), "TIFF"),
    "float": lambda: encoded(Image.fromarray(np.linspace(-99, 300, 3600, dtype=np.float32).reshape(40, 90)), "TIFF"),
    "rotated jpeg": lambda: encoded(noise("RGB"), "JPEG", exif=rotated()),
    "rotated png": lambda: encoded(noise("RGB"), "PNG", exif=rotated()),
    "animated gif": lambda: encoded(noise("RGB"), "GIF", save_all=True, append_images=[Image.new("RGB", (90, 40))]),
    "animated webp": lambda: encoded(noise("RGBA"), "WEBP", save_all=True, append_images=[Image.new("RGB", (90, 40))]),
    "animated png": lambda: encoded(noise("RGB"), "PNG", save_all=True, append_images=[Image.new("RGB", (90, 40))]),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # of Pillow, for what is expected
@pytest.mark.parametrize("name", INPUTS)
def test_every_kind_of_file_is_read_as_pillow_converts_it(name):
    data, grids = INPUTS[name](), grids_up_to(6)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    decoded = decode_image(data, RELEASED)
    assert decoded.mode == "RGB" and decoded.size == expected.size == (90, 40)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
    assert len(np.unique(np.asarray(decoded))) > 1
    tiles, layout = cut_tiles(decoded, grids, 28), visual_layout(90, 40, grids, 28, 2, None)
    np.testing.assert_array_equal(tiles, cut_tiles(expected, grids, 28))
    assert len(tiles) == layout.source.max() // 4 + 1
    assert len(layout) == num_visual_tokens(90, 40, grids, 28, 2, None)


def test_first_frame_is_taken_and_exif_rotation_is_not():
    frames = [Image.new("RGB", (90, 40), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        np.testing.assert_allclose(decode_image(data).getpixel((45, 20)), (255, 0, 0), atol=3)
    with_exif, without = (encoded(noise("RGB"), "JPEG", exif=exif) for exif in (rotated(), Image.Exif()))
    assert Image.open(io.BytesIO(with_exif)).getexif()[0x0112] == 6
    np.testing.assert_array_equal(*(np.asarray(decode_image(data, RELEASED)) for data in (with_exif, without)))


def test_extreme_sides_take_little_memory_and_short_memory_is_a_bad_image(monkeypatch):
    processor = LlavaOnevisionProcessor(load_tokenizer(TOKENIZER), "plain", 4096, grids_up_to(2), 28, 14)
    for size in ((1_000_000, 1), (1, 1_000_000)):
        encoded_side = processor.encode(Side("", [encoded(Image.linear_gradient("L").resize(size), "PNG")]))
        assert len(encoded_side.tiles[0]) > 1 and len(encoded_side.layouts[0]) < 40
    monkeypatch.setattr(processor_module.anyres, "cut_tiles", lambda *given: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(BadImageError, match="memory is too small for the tiles of images of 90x40 pixels"):
        processor.encode(Side("", [encoded(noise("RGB"), "PNG")]))


def test_the_processor_notes_what_images_lose():
    processor = LlavaOnevisionProcessor(load_tokenizer(TOKENIZER), "plain", 4096, (), 28, 14)
    images = [encoded(noise(mode), "PNG") for mode in ("RGB", "RGBA", "I;16")]
    assert processor.encode(Side("", images)).image_notes == (TRANSPARENT, HIGH_BITS)
    assert processor.encode(Side("", [noise("RGBA")])).image_notes == (TRANSPARENT,)

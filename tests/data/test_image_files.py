"""Every kind of image file comes out as the image that it shows; limits hold before anything is decoded."""

import io
import re
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from megatron_llave.checkpoint import folders
from megatron_llave.config.load import config_from_dict, load_config, save_config
from megatron_llave.data import image_files
from megatron_llave.data.image_files import (
    HIGH_BITS,
    ONE_COLOUR,
    RELEASED,
    TRANSPARENT,
    BadImageError,
    ImageSettings,
    TooLargeError,
    decode_image,
)
from megatron_llave.errors import ConfigError

SIZE = (48, 30)
TINY = {"model": {"preset": "tiny"}}
STEPS = np.linspace(3, 252, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
GREY = np.uint8(STEPS)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
OPAQUE = np.arange(SIZE[1])[:, None] >= 10 + 0 * GREY  # the upper third is transparent
ALPHA = np.uint8(255 * OPAQUE)
ON_WHITE = np.where(OPAQUE[..., None], RGB, 255)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png_chunks(colour_type: int, bits: int, rows: bytes, size=SIZE, **chunks: bytes) -> bytes:
    """A PNG written by hand, for the kinds that Pillow does not write; `rows` have no filter bytes."""

    def chunk(name: str, data: bytes) -> bytes:
        content = name.encode() + data
        return len(data).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")

    width, height = size
    step = len(rows) // height
    lines = b"".join(b"\0" + rows[y * step : (y + 1) * step] for y in range(height if rows else 0))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour_type, 0, 0, 0])
    more = b"".join(chunk(name, data) for name, data in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + more + chunk("IDAT", zlib.compress(lines)) + chunk("IEND", b"")
    )


def sixteen(pixels: np.ndarray) -> bytes:
    return (pixels.astype(np.uint16) * 257).astype(">u2").tobytes()


def palette_image() -> Image.Image:
    """RGB reduced to a palette whose index 0 is only where OPAQUE is false."""
    indices = np.where(OPAQUE, 1 + GREY // 2, 0).astype(np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([0, 0, 0] + [value for i in range(255) for value in (2 * i % 256, i, 255 - i)])
    return image


def on_white(image: Image.Image) -> np.ndarray:
    return np.where(OPAQUE[..., None], np.asarray(image.convert("RGB")), 255)


def rotated(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def lab() -> Image.Image:
    srgb, space = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(RGB), srgb, space, outputMode="LAB")


def grey(white: float, kind: type) -> Image.Image:
    """The grey image with values up to about `white`."""
    return Image.fromarray((GREY / 255 * white).astype(kind) if white != 65535 else (GREY * 257.0).astype(kind))


def frames(kind: str, **options) -> bytes:
    more = [Image.new("RGB", SIZE, "red")]
    return encoded(Image.fromarray(RGB), kind, save_all=True, append_images=more, **options)


THREE_GREY = np.repeat(GREY[..., None], 3, axis=-1)
RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
EXACT, CLOSE = 0, 2
FILES = {  # name -> (bytes, pixels, largest difference, notes)
    "grey": (encoded(Image.fromarray(GREY), "PNG"), THREE_GREY, EXACT, []),
    "rgb png": (encoded(Image.fromarray(RGB), "PNG"), RGB, EXACT, []),
    "rgba png": (encoded(RGBA, "PNG"), ON_WHITE, EXACT, [TRANSPARENT]),
    "opaque rgba png": (encoded(Image.fromarray(RGB).convert("RGBA"), "PNG"), RGB, EXACT, []),
    "rgba webp": (encoded(RGBA, "WEBP", lossless=True), ON_WHITE, EXACT, [TRANSPARENT]),
    "rgba tiff": (encoded(RGBA, "TIFF"), ON_WHITE, EXACT, [TRANSPARENT]),
    "rgba tga": (encoded(RGBA, "TGA"), ON_WHITE, EXACT, [TRANSPARENT]),
    "la png": (
        encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "PNG"),
        np.where(OPAQUE[..., None], THREE_GREY, 255),
        EXACT,
        [TRANSPARENT],
    ),
    "palette": (encoded(palette_image(), "PNG"), np.asarray(palette_image().convert("RGB")), EXACT, []),
    "palette, transparent index": (
        encoded(palette_image(), "PNG", transparency=0),
        on_white(palette_image()),
        EXACT,
        [TRANSPARENT],
    ),
    "palette, alpha per index": (
        encoded(palette_image(), "PNG", transparency=bytes([0] + [255] * 200)),
        on_white(palette_image()),
        EXACT,
        [TRANSPARENT],
    ),
    "transparent gif": (
        encoded(palette_image(), "GIF", transparency=0),
        on_white(palette_image()),
        EXACT,
        [TRANSPARENT],
    ),
    "rgb, transparent colour": (
        encoded(Image.fromarray(np.where(OPAQUE[..., None], RGB, 0).astype(np.uint8)), "PNG", transparency=(0, 0, 0)),
        ON_WHITE,
        EXACT,
        [TRANSPARENT],
    ),
    "16-bit grey png": (encoded(grey(65535, np.uint16), "PNG"), THREE_GREY, EXACT, [HIGH_BITS]),
    "16-bit grey tiff": (encoded(grey(65535, np.uint16), "TIFF"), THREE_GREY, EXACT, [HIGH_BITS]),
    "16-bit big-endian tiff": (
        encoded(Image.frombytes("I;16B", SIZE, sixteen(GREY)), "TIFF"),
        THREE_GREY,
        EXACT,
        [HIGH_BITS],
    ),
    "16-bit pgm": (b"P5 48 30 65535\n" + sixteen(GREY), THREE_GREY, EXACT, [HIGH_BITS]),
    "16-bit ppm": (b"P6 48 30 65535\n" + sixteen(RGB), RGB, EXACT, [HIGH_BITS]),
    "12 bits in 16": (encoded(grey(4095, np.uint16), "PNG"), THREE_GREY, CLOSE, [HIGH_BITS]),
    "8 bits in 16": (encoded(Image.fromarray(GREY.astype(np.uint16)), "PNG"), THREE_GREY, EXACT, [HIGH_BITS]),
    "16-bit transparent": (
        png_chunks(0, 16, sixteen(np.where(OPAQUE, GREY, 0)), tRNS=b"\0\0"),
        np.where(OPAQUE[..., None], THREE_GREY, 255),
        EXACT,
        [HIGH_BITS, TRANSPARENT],
    ),
    "16-bit grey and alpha": (
        png_chunks(4, 16, sixteen(np.dstack([GREY, ALPHA]))),
        np.where(OPAQUE[..., None], THREE_GREY, 255),
        EXACT,
        [HIGH_BITS, TRANSPARENT],
    ),
    "16-bit rgb": (png_chunks(2, 16, sixteen(RGB)), RGB, EXACT, [HIGH_BITS]),
    "16-bit rgb, transparent colour": (
        png_chunks(2, 16, sixteen(np.where(OPAQUE[..., None], RGB, 9)), tRNS=sixteen(np.uint8([9, 9, 9]))),
        ON_WHITE,
        EXACT,
        [HIGH_BITS, TRANSPARENT],
    ),
    "16-bit rgba": (png_chunks(6, 16, sixteen(np.asarray(RGBA))), ON_WHITE, EXACT, [HIGH_BITS, TRANSPARENT]),
    "32-bit tiff": (encoded(grey(65535, np.int32), "TIFF"), THREE_GREY, EXACT, [HIGH_BITS]),
    "float tiff to 1": (encoded(grey(1, np.float32), "TIFF"), THREE_GREY, EXACT, [HIGH_BITS]),
    "float tiff that overshoots": (
        encoded(Image.fromarray((GREY / 255 * 1.02).astype(np.float32)), "TIFF"),
        np.minimum(np.rint(THREE_GREY * 1.02), 255),
        CLOSE,
        [HIGH_BITS],
    ),
    "float tiff to 255": (encoded(grey(255, np.float32), "TIFF"), THREE_GREY, EXACT, [HIGH_BITS]),
    "float tiff beyond": (
        encoded(Image.fromarray(np.float32(STEPS * 1000 - 99000)), "TIFF"),
        np.repeat(np.rint((STEPS - STEPS.min()) / np.ptp(STEPS) * 255)[..., None], 3, axis=-1),
        CLOSE,
        [HIGH_BITS],
    ),
    "1 bit": (encoded(Image.fromarray(OPAQUE), "PNG"), np.repeat(ALPHA[..., None], 3, axis=-1), EXACT, []),
    "cmyk jpeg": (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100, subsampling=0), RGB, 12, []),
    "cmyk tiff": (encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, EXACT, []),
    "ycbcr tiff": (encoded(Image.fromarray(RGB).convert("YCbCr"), "TIFF"), RGB, 3, []),
    "lab tiff": (encoded(lab(), "TIFF"), RGB, 30, []),
    "animated png": (frames("PNG"), RGB, EXACT, []),
    "tiff of two pages": (frames("TIFF"), RGB, EXACT, []),
    "animated webp": (frames("WEBP", lossless=True), RGB, EXACT, []),
    "mpo": (frames("MPO", quality=100, subsampling=0), RGB, 6, []),
    "rotated png": (encoded(Image.fromarray(RGB), "PNG", exif=rotated()), np.rot90(RGB, -1), EXACT, []),
    "rotated tiff": (encoded(Image.fromarray(RGB), "TIFF", exif=rotated()), np.rot90(RGB, -1), EXACT, []),
    "rotated rgba": (encoded(RGBA, "PNG", exif=rotated()), np.rot90(ON_WHITE, -1), EXACT, [TRANSPARENT]),
    "damaged exif": (encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\0\xff"), RGB, EXACT, []),
    "all transparent": (encoded(Image.new("RGBA", SIZE), "PNG"), 255 + 0 * RGB, EXACT, [TRANSPARENT, ONE_COLOUR]),
    "all black": (encoded(Image.new("L", SIZE), "PNG"), 0 * RGB, EXACT, [ONE_COLOUR]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_shows_what_it_shows(name):
    data, expected, tolerance, noted = FILES[name]
    notes = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        decoded = decode_image(data, notes=notes)
    assert decoded.mode == "RGB" and decoded.size == expected.shape[1::-1]
    difference = np.abs(np.asarray(decoded).astype(int) - expected.astype(int))
    assert difference.max() <= tolerance
    assert notes == noted
    assert not [w for w in told if "Palette" in str(w.message)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation):
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB, -1),
        7: np.rot90(RGB, 2).swapaxes(0, 1),
        8: np.rot90(RGB),
    }
    data = encoded(Image.fromarray(RGB), "PNG", exif=rotated(orientation))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), turned[orientation])
    np.testing.assert_array_equal(np.asarray(decode_image(data, ImageSettings(corrections=("bit_depth",)))), RGB)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGBA", "RGBa", "La", "LA", "PA", "CMYK", "YCbCr", "HSV", "I", "F", "RGBX"]
)
def test_pillow_images_are_taken_and_not_changed(mode):
    image = Image.fromarray(RGB)
    image = image.convert({"RGBa": "RGBA"}.get(mode, "LA" if mode == "La" else "L" if mode in ("I", "F") else "RGB"))
    image = image if mode == image.mode else image.convert(mode)
    before = image.mode, image.info.copy(), image.tobytes()
    decoded = decode_image(image)
    assert (image.mode, image.info, image.tobytes()) == before
    grey_modes = ("L", "LA", "La", "I", "F")
    expected = Image.fromarray(RGB).convert("L").convert("RGB") if mode in grey_modes else Image.fromarray(RGB)
    if mode not in ("1", "P", "PA"):  # which lose colours before they come here
        np.testing.assert_allclose(np.asarray(decoded).astype(int), np.asarray(expected).astype(int), atol=9)
    assert decoded.mode == "RGB" and not image_files._is_one_colour(decoded)


def test_background_is_the_configured_colour():
    settings = image_files.image_settings(config_from_dict({**TINY, "data": {"image_background": [0, 128, 7]}}).data)
    assert decode_image(FILES["rgba png"][0], settings).getpixel((0, 0)) == (0, 128, 7)
    half = encoded(Image.new("RGBA", SIZE, (200, 100, 50, 128)), "PNG")
    np.testing.assert_allclose(decode_image(half).getpixel((1, 1)), (227, 177, 152), atol=1)
    assert decode_image(half, RELEASED).getpixel((1, 1)) == (200, 100, 50)
    for wrong in ([0, 128], [0, 0, 256]):
        with pytest.raises(ConfigError, match="data.image_background=.* must be null or"):
            config_from_dict({**TINY, "data": {"image_background": wrong}})


def test_configurations_of_earlier_versions_keep_their_pixels(tmp_path):
    file = tmp_path / "config.yaml"
    save_config(config_from_dict(TINY), file)
    assert image_files.settings_of_embeddings(load_config(file, leave_out=["parallel"]).data).keys() == {
        "image_background",
        "image_corrections",
    }
    earlier = [
        line for line in file.read_text().splitlines(True) if not re.search("image_(ba|c)|- (255|exif|bit)", line)
    ]
    file.write_text("".join(earlier))
    assert image_files.image_settings(load_config(file, leave_out=["parallel"]).data) == RELEASED
    assert image_files.image_settings(load_config(file).data) == ImageSettings()
    changed = folders.require_same_run(tmp_path, load_config(file))
    assert changed[0] == "data.image_background was None, is [255, 255, 255]" and len(changed) == 2


NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
NOISE_PNG = encoded(Image.fromarray(NOISE), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture at all",
        NOISE_PNG[:2000],
        NOISE_PNG[:8] + b"\xff" * 500,
        NOISE_PNG.replace(b"IDAT", b"IDAX"),
    ],
)
def test_unreadable_bytes_are_a_bad_image(data):
    with pytest.raises(BadImageError, match="not a readable image") as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_eps_is_not_run():
    with pytest.raises(BadImageError, match="EPS is a program"):
        decode_image(encoded(Image.new("RGB", (8, 8)), "EPS"))


def huge_jpeg() -> bytes:
    """A JPEG of 1,213 bytes or so whose header claims 65500x1350 pixels."""
    data = encoded(Image.fromarray(RGB), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + (1350).to_bytes(2, "big") + (65500).to_bytes(2, "big") + data[at + 4 :]


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (encoded(Image.new("RGB", (4, 4)), "PNG"), ImageSettings(10), "4x4 pixels exceeds the limit of 10 pixels"),
        (encoded(Image.new("1", (12000, 12000)), "PNG"), ImageSettings(), "12000x12000 .* the limit of 89000000"),
        (png_chunks(0, 8, b"", (80_000_000, 1)), ImageSettings(), "80000000x1 pixels has a side beyond"),
        (png_chunks(0, 8, b"", (1, 80_000_000)), ImageSettings(), "1x80000000 pixels has a side beyond"),
        (png_chunks(0, 8, b"", (2**31 - 1, 2**31 - 1)), ImageSettings(), "too large|exceeds the limit"),
        (huge_jpeg(), ImageSettings(), "cannot hold a JPEG of 65500x1350"),
    ],
)
def test_limits_hold_before_anything_is_decoded(data, settings, words):
    tracemalloc.start()
    with pytest.raises(BadImageError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        decode_image(data, settings)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_the_limit_of_the_configuration_replaces_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(Image.fromarray(NOISE), "PNG")  # 4096 pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(decode_image(data, ImageSettings(4096))), NOISE)
        with pytest.raises(TooLargeError):
            decode_image(data, ImageSettings(4095))


def test_short_memory_is_a_bad_image(monkeypatch):
    monkeypatch.setattr(image_files, "_scaled", lambda values: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(BadImageError, match="memory is too small for an image of 48x30 pixels"):
        decode_image(FILES["16-bit grey png"][0])

"""The one reader of images: bytes of a file, or a Pillow image, become 8-bit RGB pixels.

Training, embedding, evaluation, preparation and reports all read images here, so that they see the same pixels. Limits
are checked on the header, before anything is decoded. ICC profiles are not applied.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from megatron_llave.config.data import IMAGE_CORRECTIONS, DataConfig
from megatron_llave.config.schema import EARLIER
from megatron_llave.errors import DataError

MAX_PIXELS = DataConfig.max_image_pixels
"""The largest width * height that is decoded by default; docs/data.md says how much memory that takes."""
MAX_SIDE = 1_000_000
"""The longest side that is decoded, pixels. Resizing takes 32 bytes per pixel of a side for its coefficients."""
JPEG_PIXELS_PER_BYTE = 1024
"""No complete JPEG with Huffman codes has more pixels per byte: 64 pixels take at least one bit."""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm"}
"""Endings of the names of image files, in lower case."""

TRANSPARENT = "image with transparency"
HIGH_BITS = "image of more than 8 bits per channel"
ONE_COLOUR = "image of one colour"

FIRST_QUARTER_TURN = 5
"""The EXIF orientations from this one on exchange width and height."""
PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
"""Pillow's modes of colours that are multiplied by alpha -> those that are not."""
RANGES = (1, 255, 4095, 65535)
"""White of floats, and of integers of 8, 12 and 16 bits."""
OVERSHOOT = 1.05
"""How many times white a float may be and count as white."""
BLOCK_PIXELS = 2**20
"""Number of pixels whose bits are reduced at a time, to bound the memory."""

# Pillow warns once per process of damaged metadata and of sizes; the first is not needed, the second is checked here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImageError(DataError):
    """The bytes are not a readable image; the pair that they belong to is dropped."""


class TooLargeError(BadImageError):
    """The image exceeds the limits on its size, so that it is not decoded."""


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes 8-bit RGB."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are refused (data.max_image_pixels)."""
    background: tuple[int, int, int] | None = (255, 255, 255)
    """Colour (red, green, blue) under transparent pixels; None: alpha is dropped (data.image_background)."""
    corrections: tuple[str, ...] = IMAGE_CORRECTIONS
    """See data.image_corrections."""


RELEASED = ImageSettings(background=None, corrections=())
"""What the official LLaVE repository does: Pillow's `Image.open(...).convert("RGB")`, pixel for pixel."""


def image_settings(data: DataConfig) -> ImageSettings:
    """Return the settings of a configuration."""
    background = None if data.image_background is None else tuple(data.image_background)
    return ImageSettings(data.max_image_pixels, background, tuple(data.image_corrections))


def settings_of_embeddings(data: DataConfig) -> dict[str, Any]:
    """Return the settings that change embeddings, where they are not those of the official repository."""
    return {key: getattr(data, key) for key, released in EARLIER["data"].items() if getattr(data, key) != released}


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an image file: its format and size, without decoding it.

    Raises:
        TooLargeError: it has more than twice `max_pixels` pixels; those with fewer may still exceed the limit.
        BadImageError: the bytes are not an image.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and limit < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses more than twice as many
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"image exceeds the limit of {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a readable image in a known format ({len(data)} bytes)") from error
    except Exception as error:  # each of Pillow's decoders raises its own kinds; all mean the same here
        raise BadImageError(f"not a readable image ({len(data)} bytes): {_one_line(error)}") from error


def decode_image(
    data: bytes | Image.Image, settings: ImageSettings = ImageSettings(), notes: list[str] | None = None
) -> Image.Image:
    """Return an image as 8-bit RGB. Images that are so already keep every bit.

    The first frame of an animation or of several pages is taken. CMYK, YCbCr, LAB, HSV, palettes and grey become RGB.

    Args:
        data: bytes of an image file, or a Pillow image, which is not changed.
        settings: of the run.
        notes: if given, TRANSPARENT, HIGH_BITS and ONE_COLOUR are added to it where they apply.

    Raises:
        TooLargeError: the image exceeds the limits.
        BadImageError: the bytes are not an image or are damaged, or the memory is too small for it.
    """
    image = _open_checked(data, settings)
    try:
        return _to_rgb(image, settings, [] if notes is None else notes)
    except MemoryError as error:
        raise BadImageError(f"the memory is too small for an image of {image.width}x{image.height} pixels") from error
    except Exception as error:  # each of Pillow's decoders raises its own kinds; all mean the same here
        size = f" ({len(data)} bytes)" if isinstance(data, bytes) else ""
        raise BadImageError(f"not a readable image{size}: {_one_line(error)}") from error


def shrink(data: bytes, side: int, quality: int) -> bytes:
    """Return an image as WebP, whose longest side is at most `side` pixels; quality is from 0 to 100.

    Raises:
        BadImageError: it cannot be read, or is beyond the limits of data.image_files.
    """
    image = open_image(data)
    if image.format == "JPEG":
        image.draft(
            "RGB", (2 * side, 2 * side)
        )  # reads a large one at a fraction of its size, in a fraction of the time
    rgb = decode_image(image)
    rgb.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    rgb.save(content, "WEBP", quality=quality, method=2)
    return content.getvalue()


def image_size(data: bytes | Image.Image, settings: ImageSettings = ImageSettings()) -> tuple[int, int]:
    """Return width and height in pixels of what `decode_image` makes of an image, from the header of its file.

    A rotation that is noted after the pixels, where a PNG may have it, is not seen.

    Raises:
        TooLargeError: the image exceeds the limits.
        BadImageError: the bytes are not an image.
    """
    image = _open_checked(data, settings)
    if "exif_rotation" not in settings.corrections:
        return image.size
    try:
        # For a PNG without EXIF in its header, Pillow's own method would decode the image to look behind its pixels.
        is_turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= FIRST_QUARTER_TURN
    except Exception:  # damaged EXIF says nothing
        is_turned = False
    return image.size[::-1] if is_turned else image.size


def _open_checked(data: bytes | Image.Image, settings: ImageSettings) -> Image.Image:
    image = open_image(data, settings.max_pixels) if isinstance(data, bytes) else data
    if image.format == "EPS":
        raise BadImageError("EPS is a program, which is not run; convert it to PNG")
    _check_size(image, len(data) if isinstance(data, bytes) else None, settings.max_pixels)
    return image


def decode_frames(
    images: Sequence[bytes | Image.Image], settings: ImageSettings = ImageSettings(), notes: list[str] | None = None
) -> np.ndarray:
    """Return the frames of a video, [frames, height, width, 3] uint8; arguments and errors are those of decode_image.

    Raises:
        BadImageError: also where the frames are not of one size, or there are none.
    """
    frames = [decode_image(image, settings, notes) for image in images]
    _one_size([frame.size for frame in frames])
    return np.stack([np.asarray(frame) for frame in frames])


def frames_size(images: Sequence[bytes | Image.Image], settings: ImageSettings = ImageSettings()) -> tuple[int, int]:
    """Return width and height in pixels of the frames that `decode_frames` makes, as `image_size`; raises as both."""
    return _one_size([image_size(image, settings) for image in images])


def _one_size(frames: Sequence[tuple[int, int]]) -> tuple[int, int]:
    sizes = sorted(set(frames))
    if len(sizes) != 1:
        found = " and ".join(f"{width}x{height}" for width, height in sizes[:2])
        raise BadImageError(f"the frames of a video must have one size, not {found or 'none'}")
    return sizes[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_size(image: Image.Image, num_bytes: int | None, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise TooLargeError(f"image of {width}x{height} pixels exceeds the limit of {max_pixels} pixels")
    if max(width, height) > MAX_SIDE:
        raise TooLargeError(f"image of {width}x{height} pixels has a side beyond the limit of {MAX_SIDE} pixels")
    if width * height < 1:
        raise BadImageError(f"not a readable image: it has {width}x{height} pixels")
    is_cut = num_bytes is not None and width * height > JPEG_PIXELS_PER_BYTE * num_bytes
    if image.format in ("JPEG", "MPO") and is_cut:
        raise BadImageError(f"not a readable image: {num_bytes} bytes cannot hold a JPEG of {width}x{height} pixels")


def _to_rgb(image: Image.Image, settings: ImageSettings, notes: list[str]) -> Image.Image:
    keeps_upper_bits = _has_high_bits(image)  # before the pixels are read, when Pillow forgets it
    image.load()
    if "exif_rotation" in settings.corrections and _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    image, alpha, has_high_bits = _at_eight_bits(image, keeps_upper_bits, is_scaled="bit_depth" in settings.corrections)
    if has_high_bits:
        notes.append(HIGH_BITS)
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode == "LAB":
        image = ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("LAB", "sRGB")), outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        notes.append(TRANSPARENT)
        if settings.background is not None:
            canvas = Image.new("RGB", rgb.size, settings.background)
            canvas.paste(rgb, mask=alpha)
            rgb = canvas
    if _is_one_colour(rgb):
        notes.append(ONE_COLOUR)
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing
        return 1


def _has_high_bits(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits per channel, of which Pillow keeps the upper 8; before it is decoded."""
    for tile in getattr(image, "tile", []):
        raw_mode, *more = tile[3] if isinstance(tile[3], tuple) else [tile[3]]
        if image.format == "PPM" and more and more[0] > 255:
            return True
        if tile[0] == "SGI16" or re.match(r"(?!BGR)\w+;(12|16)", str(raw_mode)):  # BGR;16 has 16 bits per pixel
            return True
    return False


def _at_eight_bits(
    image: Image.Image, keeps_upper_bits: bool, is_scaled: bool
) -> tuple[Image.Image, Image.Image | None, bool]:
    """Return the image with 8 bits per channel, its alpha where that was lost, and whether it had more bits."""
    transparency = image.info.get("transparency")
    if image.mode != "F" and not image.mode.startswith("I"):
        if keeps_upper_bits and isinstance(transparency, tuple):
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in transparency)
        return image, None, keeps_upper_bits
    values = np.asarray(image)
    alpha = None if transparency is None else Image.fromarray(np.uint8(255) * (values != transparency))
    if is_scaled:
        return Image.fromarray(_scaled(values)), alpha, True
    image = image.convert("L" if image.mode == "F" else "RGB")
    image.info.pop("transparency", None)
    return image, alpha, True


def _scaled(values: np.ndarray) -> np.ndarray:
    """Reduce integers or floats [h, w] to uint8: black is 0, white is the least of RANGES that no value exceeds.

    Floats may exceed it by OVERSHOOT, as resizing leaves at edges. If values are negative or beyond all RANGES, black
    is the lowest value and white the highest.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    limit = high / OVERSHOOT if values.dtype.kind == "f" else high
    white = next((white for white in RANGES if limit <= white), None)
    black, span = (0.0, white) if low >= 0 and white is not None else (low, high - low or 1.0)
    scaled = np.empty(values.shape, np.uint8)
    step = max(1, BLOCK_PIXELS // values.shape[1])
    for top in range(0, len(values), step):
        block = (values[top : top + step].astype(np.float64) - black) * (255 / span)
        scaled[top : top + step] = np.rint(np.nan_to_num(block, nan=0, posinf=255, neginf=0).clip(0, 255))
    return scaled


def _is_one_colour(image: Image.Image) -> bool:
    """Whether all pixels of an RGB image are equal; most images show on their diagonal that they are not."""
    right, bottom = image.width - 1, image.height - 1
    diagonal = {image.getpixel((right * i // 16, bottom * i // 16)) for i in range(17)}
    return len(diagonal) == 1 and all(low == high for low, high in image.getextrema())

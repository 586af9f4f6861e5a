"""Decoding of image files."""

import io

from PIL import Image, UnidentifiedImageError

from megatron_llave.errors import DataError

MAX_PIXELS = 89_000_000
"""The largest width * height that is decoded, since a small file could otherwise fill the memory. Pillow warns a little
above it."""


class BadImageError(DataError):
    """The bytes are not a readable image; the pair that they belong to is dropped."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB, pixel for pixel as Pillow's `Image.open(...).convert("RGB")`.

    This is what the official LLaVE repository does: alpha is dropped, not blended; the first frame of an animation is
    taken; EXIF rotation is ignored (but Pillow itself rotates a TIFF); 16-bit grey is clipped at 255, not scaled.

    Raises:
        BadImageError: the bytes are not an image, are damaged, or have more than `max_pixels` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":
            raise BadImageError("EPS is a program, which is not run; convert it to PNG")
        if image.width * image.height <= max_pixels:
            image.load()
            image.info.pop("transparency", None)  # Pillow would warn in each process that a palette's is dropped
            return image if image.mode == "RGB" else image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a readable image in a known format ({len(data)} bytes)") from error
    except Exception as error:  # each of Pillow's decoders raises its own kinds; all mean the same here
        raise BadImageError(f"not a readable image ({len(data)} bytes): {' '.join(str(error).split())}") from error
    raise BadImageError(f"image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels")

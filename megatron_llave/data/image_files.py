"""Decoding of image files."""

import io

from PIL import Image, UnidentifiedImageError

from megatron_llave.errors import DataError

MAX_PIXELS = 89_000_000
"""Largest width * height that is decoded (Pillow warns a little above): a small file could fill the memory."""


class BadImageError(DataError):
    """Bytes that are no readable picture; the pair they belong to is left out."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes -> RGB picture, pixel for pixel Pillow's `Image.open(...).convert("RGB")` as in the released code.

    So alpha is dropped, not blended; of an animation the first frame is taken; EXIF rotation is ignored (but Pillow
    itself turns a TIFF); 16-bit grey is clipped at 255, not scaled.

    Raises:
        BadImageError: not a picture, damaged, or more than `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":
            raise BadImageError("EPS is a program, which is not run; convert it to PNG")
        if image.width * image.height <= max_pixels:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a readable image in a known format ({len(data)} bytes)") from error
    except Exception as error:  # each of Pillow's decoders raises its own kinds; all mean the same here
        raise BadImageError(f"not a readable image ({len(data)} bytes): {' '.join(str(error).split())}") from error
    raise BadImageError(f"image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels")

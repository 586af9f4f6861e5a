"""Turns what users pass to LoadedModel.embed into inputs of the model: texts, image files, PIL images and arrays."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.errors import DataError

Embeddable: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Mapping[str, Any] | Side
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
RIGHT = (
    "give a text, a pathlib.Path of an image, a PIL image, a uint8 array [h, w], [h, w, 3] or [h, w, 4], the bytes of "
    'an image file, {"text": ..., "image": ...}, or a Side'
)


def to_side(value: Embeddable, where: str) -> Side:
    """Return the input that a user has passed, which LoadedModel.embed describes.

    Raises:
        DataError: it is of another kind, or its image file cannot be read; the message begins with `where`.
    """
    if isinstance(value, str):
        return Side(_checked_text(value, where), [])
    if isinstance(value, Side):
        if not isinstance(value.text, str) or not isinstance(value.images, list):
            raise DataError(f"{where}: a Side has a text and a list of images; Side.read(text, FILE) reads files")
        return Side(value.text, [_image_bytes(image, where) for image in value.images], value.frames)
    if isinstance(value, Mapping):
        unknown = sorted(map(str, value.keys() - {"text", "image", "images"}))
        if unknown or not value:
            what = f"the key {unknown[0]!r} is unknown" if unknown else "the mapping is empty"
            raise DataError(f"{where}: {what}; a mapping has text, image, or both")
        text, images = value.get("text", ""), value.get("images", value.get("image", []))
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        images = [Path(image) if isinstance(image, str) else image for image in images]
        if not isinstance(text, str):
            raise DataError(f"{where}: text must be a str, not {type(text).__name__}")
        return Side(text, [_image_bytes(image, where) for image in images])
    return Side("", [_image_bytes(value, where)])


def _checked_text(text: str, where: str) -> str:
    """Refuse a text that is the name of an image file on this machine: embedding the name itself helps nobody."""
    if len(text) < 4096 and "\0" not in text and Path(text).suffix.lower() in IMAGE_SUFFIXES and Path(text).is_file():
        right = f"pathlib.Path({text!r}) embeds the image, Side({text!r}, []) these words"
        raise DataError(f"{where}: {text!r} is the name of an image file; {right}")
    return text


def _image_bytes(image: Any, where: str) -> bytes:
    """The bytes of an image file that holds this image."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Path):
        try:
            return image.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{where}: image {image} cannot be read: {reason}") from error
    if isinstance(image, np.ndarray):
        shape_is_right = image.ndim == 2 or image.ndim == 3 and image.shape[2] in (3, 4)
        if image.dtype != np.uint8 or not shape_is_right or image.size == 0:
            raise DataError(f"{where}: an array must be uint8 [h, w], [h, w, 3] or [h, w, 4], not {_kind(image)}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"{where} is of type {type(image).__name__}; {RIGHT}")
    content = BytesIO()
    image.save(content, "PNG" if image.mode in PNG_MODES else "TIFF")  # neither loses anything
    return content.getvalue()


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"

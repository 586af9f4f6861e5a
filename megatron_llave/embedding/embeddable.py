"""Turns what users pass to LoadedModel.embed into inputs of the model: texts, image files, PIL images and arrays."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from megatron_llave.batch import Side
from megatron_llave.data.image_files import IMAGE_SUFFIXES
from megatron_llave.data.items import IMAGE_KEYS, KEYS, TWO_KEYS, frame_seconds
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.errors import DataError

ImageLike: TypeAlias = os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray
Embeddable: TypeAlias = str | ImageLike | Mapping[str, Any] | tuple[str, ImageLike] | Side
_ADDRESS = re.compile("data:image/|(file|https?|s3|gs|hf)://", re.IGNORECASE)
_QUERY = re.compile("[?#].*")
RIGHT = (
    "give a text, a pathlib.Path of an image, a PIL image, a uint8 array [h, w], [h, w, 3] or [h, w, 4], the bytes of "
    'an image file, {"text": ..., "image": ...}, a pair (text, image), a Side, or a list of these'
)


def to_sides(inputs: Embeddable | Iterable[Embeddable]) -> tuple[list[Side], bool]:
    """Return the inputs, and whether it was a single one, which a tuple of a text and an image is too.

    Raises:
        DataError: as `to_side` does, or `inputs` is neither an input nor an iterable of them in a certain order.
    """
    is_text_array = isinstance(inputs, np.ndarray) and inputs.ndim == 1 and inputs.dtype.kind in "UO"
    if _is_pair(inputs) or isinstance(inputs, (str, ImageLike, Mapping, Side)) and not is_text_array:
        return [to_side(inputs, "the input")], True
    if not isinstance(inputs, Iterable) or isinstance(inputs, (set, frozenset)) or hasattr(inputs, "detach"):
        raise DataError(f"the input is of {_kind(inputs)}; {RIGHT}")
    return [to_side(value, f"input {index}") for index, value in enumerate(inputs)], False


def to_side(value: Embeddable, where: str) -> Side:
    """Return the input that a user has passed, which LoadedModel.embed describes; its text is marked as a user's.

    Raises:
        DataError: it is of another kind, or its image file cannot be read; the message begins with `where`.
    """
    try:
        if isinstance(value, Side):
            return replace(value, text=mark_user_text(value.text, value.num_placeholders))
        text, images, is_video = _parts(value)
        seconds = frame_seconds(value, len(images)) if isinstance(value, Mapping) else ()
        side = Side("", [_to_image(image) for image in images], is_video=is_video, seconds=seconds)
        return replace(side, text=mark_user_text(text, side.num_placeholders))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], ImageLike)
    )


def _parts(value: Any) -> tuple[str, list[Any], bool]:
    """Text and images of an input, and whether these are the frames of a video."""
    if isinstance(value, str):
        _refuse_file_name(value)
        return str(value), [], False
    if isinstance(value, Mapping):
        return _parts_of_item(value)
    if _is_pair(value):
        return value[0], [value[1]], False
    return "", [value], False


def _parts_of_item(item: Mapping[Any, Any]) -> tuple[str, list[Any], bool]:
    unknown = sorted(map(str, item.keys() - set(KEYS)))
    if unknown:
        raise DataError(f"the key {unknown[0]!r} is unknown; a mapping has text, image, or both")
    given = [key for key in IMAGE_KEYS if key in item]
    if len(given) > 1:
        raise DataError(f"{given[0]} and {given[1]} {TWO_KEYS}")
    text, images = item.get("text", ""), item[given[0]] if given else []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not isinstance(text, str):
        raise DataError(f"text must be a string, not of {_kind(text)}")
    if not text and not images:
        raise DataError("the mapping has neither text nor image")
    images = [Path(image) if isinstance(image, str) else image for image in images]
    return text, images, given == ["frames"]


def _refuse_file_name(text: str) -> None:
    """Refuse a text that is the name or the address of a file: embedding the name itself helps nobody."""
    name, right = text.strip(), f'{{"text": {text!r}}} embeds these words'
    is_word, is_address = not re.search(r"\s", name), bool(_ADDRESS.match(name))
    is_image = os.path.splitext(_QUERY.sub("", name) if is_address else name)[1].lower() in IMAGE_SUFFIXES
    if is_word and is_address and (is_image or not name.startswith("http")):
        raise DataError(f"{text[:200]!r} is the address of a file, which is not fetched; {right}")
    if is_word and is_image or (is_image or os.sep in name) and os.path.exists(name):
        raise DataError(f"{text!r} is the name of a file; pathlib.Path({name!r}) embeds an image, {right}")


def _to_image(image: Any) -> bytes | Image.Image:
    if isinstance(image, os.PathLike):
        return Side.read("", image).images[0]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, np.ndarray):
        shape_is_right = image.ndim == 2 or image.ndim == 3 and image.shape[2] in (3, 4)
        if image.dtype != np.uint8 or not shape_is_right or image.size == 0:
            kind = f"{image.dtype} {list(image.shape)}"
            raise DataError(f"an array must be uint8 [h, w], [h, w, 3] or [h, w, 4], not {kind}")
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise DataError(f"it is of {_kind(image)}; {RIGHT}")
    return image


def _kind(value: Any) -> str:
    return f"type {type(value).__name__}"

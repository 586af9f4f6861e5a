"""The one reader of JSONL files and of an item in them: an input of the model that a user has written down.

An item is {"text": ..., "image": FILE or [FILES], "id": ...}: a text, images, or both; `images` is another spelling of
`image`, and `frames` names images that are the frames of a video, of which `fps` tells the number per second. Each line
of a file for llave embed, and of the queries and the corpus of a retrieval, is an item (embedding/jsonl.py). The
query, the target and the hard negatives of a training pair are items (prepare/jsonl.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.errors import DataError
from megatron_llave.files import parse_json, read_lines

IMAGE_KEYS = ("image", "images", "frames")
KEYS = ("id", "text", *IMAGE_KEYS, "fps")
TWO_KEYS = "are two spellings of one key; give one of them"
LONGEST_PATH = 4096
"""The most bytes that a path may have on Linux."""


@dataclass(frozen=True)
class Item:
    """A text, images, or both, as they are written in a file."""

    text: str
    """As `mark_user_text` has marked it; "" where there is no text."""
    images: tuple[str, ...]
    """Image paths as they are written."""
    id: str | None
    """The user's name for it; None where there is none."""
    is_video: bool = False
    """Whether the images are the frames of a video."""
    seconds: tuple[float, ...] = ()
    """When each frame was taken; empty where the item does not say."""


def read_jsonl(path: str | Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number of the line from 1, FILE:LINE, its JSON value) of each line that is not blank.

    A byte order mark at the beginning of the file and line ends of Windows are accepted.

    Raises:
        DataError: the file cannot be read, or a line is not JSON (files.parse_json); the message has FILE:LINE.
    """
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        yield number, where, parse_json(line, where)


def parse_item(values: Any, where: str) -> Item:
    """Check the JSON value of an item; whether text and images are empty or missing files is the caller's concern.

    Raises:
        DataError: it is not an item; the message begins with `where` and names the key.
    """
    check_keys(values, KEYS, where)
    given = [key for key in IMAGE_KEYS if key in values]
    if "text" not in values and not given:
        raise DataError(f"{where}: neither text nor image")
    if len(given) > 1:
        raise DataError(f"{where}: {given[0]} and {given[1]} {TWO_KEYS}")
    key = given[0] if given else "image"
    text, images, name = values.get("text", ""), values.get(key, []), values.get("id")
    images = [images] if isinstance(images, str) else images
    if not isinstance(text, str):
        raise DataError(f"{where}: text must be a string, not {_shown(text)}")
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise DataError(f"{where}: {key} must be a file name or a list of them, not {_shown(images)}")
    is_video = key == "frames"
    if is_video and not images:
        raise DataError(f"{where}: frames must name at least one file")
    if any(len(image.encode()) > LONGEST_PATH for image in images):
        raise DataError(f"{where}: {key} has a path of more than {LONGEST_PATH} bytes")
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if name is not None and not (isinstance(name, str) and name and name.isprintable()):
        raise DataError(f"{where}: id must be a whole number or a string of printable characters, not {_shown(name)}")
    try:
        seconds = frame_seconds(values, len(images))
        return Item(mark_user_text(text, 1 if is_video else len(images)), tuple(images), name, is_video, seconds)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def frame_seconds(values: Mapping[str, Any], num_frames: int) -> tuple[float, ...]:
    """Return when each frame of an item was taken, seconds, from its key `fps`; () if there is none.

    Raises:
        DataError: `fps` is no such number, or the item has no `frames`.
    """
    fps = values.get("fps")
    if fps is None:
        return ()
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 1e-3 <= fps <= 1e3:
        raise DataError(f"fps must be the frames per second, a number from 0.001 to 1000, not {_shown(fps)}")
    if "frames" not in values:
        raise DataError("fps is for the images in frames, which are missing")
    return tuple(number / float(fps) for number in range(num_frames))


def check_keys(values: Any, known: Sequence[str], where: str) -> None:
    """Raise a DataError that begins with `where` unless `values` is a JSON object with no other keys than `known`."""
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be an object with {', '.join(known)}, not {_shown(values)}")
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0][:60]!r}; known keys: {', '.join(known)}")


def _shown(value: Any) -> str:
    return f"{value!r:.60}"

"""Reads the inputs that a source of pairs names: texts as they are, and the bytes of image files.

An input that cannot be used is left out for one of the reasons here, which shard_jobs.py counts.
"""

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_llave.batch import Side, check_text
from megatron_llave.data.image_files import BadImageError, ImageSettings, TooLargeError, decode_image, open_image
from megatron_llave.errors import DataError
from megatron_llave.prepare.stored_images import StoredImage

AGAIN = "the same command resumes after the shards that are finished"

MISSING = "missing image"
CORRUPT = "corrupt image"
TOO_LARGE = "image too large"
OUTSIDE = "image path outside the source"
IS_URL = "image is a URL"
EMPTY = "empty side"
BAD_TEXT = "text is not Unicode"
NO_PAIR = "row is no pair"
EQUAL = "equal to a target or to an earlier hard negative"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class SourceSide:
    """A query, target or hard negative as the source describes it; `is_video` and `seconds` are those of a Side."""

    text: str
    images: tuple[str | StoredImage, ...]
    """Image paths as they are written in the source, and images that lie inside of a file of it."""
    id: str = ""
    """Equal ids mean equal queries or equal targets; "": the contents decide (content_id)."""
    is_video: bool = False
    seconds: tuple[float, ...] = ()


class LeftOutError(DataError):
    """A query, target or hard negative cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_side(
    side: SourceSide, name: str, folder: str, is_confined: bool, max_pixels: int
) -> tuple[Side, list[tuple[str, str]]]:
    """Return the side with the bytes of its images, and the notes about them, each with its detail.

    Args:
        side: as the source describes it.
        name: what it is, for the detail of a reason.
        folder: the folder that its image paths are relative to.
        is_confined: whether they must stay inside the folder.
        max_pixels: an image with more pixels cannot be used.

    Raises:
        LeftOutError: it cannot be used.
        DataError: the storage has failed.
    """
    if not side.text.strip() and not side.images:
        raise LeftOutError(EMPTY, f"{name}: neither text nor image")
    try:
        check_text(side.text)
    except DataError as error:
        raise LeftOutError(BAD_TEXT, f"{name}: {error}") from error
    try:
        images, noticed = [], []
        for written in side.images:
            notes: list[str] = []
            images.append(_checked(*read_image(written, folder, is_confined), max_pixels, notes))
            shown = repr(written) if isinstance(written, str) else str(written)
            noticed += [(note, f"{name}: {shown}") for note in notes]
        if side.is_video and len({open_image(image).size for image in images}) > 1:
            raise LeftOutError(CORRUPT, f"{side.images[0]!r} and the other frames of a video differ in size")
        return Side(side.text, images, is_video=side.is_video, seconds=side.seconds), noticed
    except LeftOutError as error:
        raise LeftOutError(error.reason, f"{name}: {error.detail}") from error


def locate(image: str, folder: str, is_confined: bool) -> Path:
    """Return the file that an image path of the source names; a LeftOutError if it may not be read."""
    if _URL.match(image):
        raise LeftOutError(IS_URL, f"{image[:200]!r}: download it first")
    try:
        is_name = b"\0" not in os.fsencode(image)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise LeftOutError(MISSING, f"{image!r} cannot be the name of a file")
    path = PurePosixPath(image)
    if is_confined and (path.is_absolute() or ".." in path.parts):
        raise LeftOutError(OUTSIDE, repr(image))
    return Path(folder, path)


def read_image(image: str | StoredImage, folder: str, is_confined: bool) -> tuple[bytes, str]:
    """Return the bytes of an image of the source, and where they are from, for messages.

    Raises:
        LeftOutError: there is no such image, or it may not be read.
        DataError: the storage has failed.
    """
    if not isinstance(image, str):
        contents = image.read()
        if contents is None:
            raise LeftOutError(MISSING, f"{image} has neither bytes nor path")
        if isinstance(contents, bytes):
            return contents, str(image)
        image = contents
    path = locate(image, folder, is_confined)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise LeftOutError(MISSING, f"{str(path)!r} is not a file")
        return path.read_bytes(), repr(str(path))
    except OSError as error:
        if error.errno in _NO_FILE:
            raise LeftOutError(MISSING, f"{str(path)!r}: {error.strerror}") from error
        # The storage has failed, not the image: skipping it would lose pairs that are intact.
        raise DataError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from error


def state_of(image: str | StoredImage, folder: str, is_confined: bool) -> str:
    """Return size and modification time of the file that an image of the source is in."""
    try:
        status = os.stat(locate(image, folder, is_confined) if isinstance(image, str) else image.file)
        return f"{status.st_size} {status.st_mtime_ns}"
    except (OSError, ValueError):
        return "unusable"


def content_id(side: Side) -> str:
    """Return an id that depends on the text and on the bytes of the images alone."""
    parts = [side.text.encode(), *(bytes(image) for image in side.images)]
    return hashlib.blake2b(b"".join(hashlib.blake2b(part).digest() for part in parts), digest_size=16).hexdigest()


def _checked(data: bytes, where: str, max_pixels: int, notes: list[str]) -> bytes:
    """Return the bytes of an image file after decoding them as training will; `notes` are those of decode_image.

    A truncated JPEG passes a look at its header and Pillow's verify().
    """
    try:
        decode_image(data, ImageSettings(max_pixels), notes)
    except TooLargeError as error:
        raise LeftOutError(TOO_LARGE, f"{where}: {error}") from error
    except BadImageError as error:
        raise LeftOutError(CORRUPT, f"{where}: {error}") from error
    return data

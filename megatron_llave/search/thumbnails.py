"""What the page shows of the images: small ones for the grid and a larger one, made anew from the files of the index.

A file is read only if it still holds the bytes that were indexed, so that nothing else of the machine can be seen, not
by a name, a link or a changed file; what was made of it is kept. What is sent is always a WebP that this module has
made: upright, without metadata.
"""

import hashlib
import os
from collections import OrderedDict
from threading import Lock

from megatron_llave.batch import MAX_IMAGE_BYTES
from megatron_llave.data.image_files import shrink
from megatron_llave.errors import DataError
from megatron_llave.files import read_bytes
from megatron_llave.search.index import ImageIndex

SIDES = {"thumbnail": 384, "image": 2048}
"""The longest side of what is sent, pixels; images are never made larger."""
QUALITIES = {"thumbnail": 82, "image": 92}
MOST_BYTES = 2**27
"""Bytes of what is kept in memory; browsers keep it too."""
MEDIA_TYPE = "image/webp"


class Thumbnails:
    """Makes thumbnails and keeps the latest in memory; for several threads."""

    def __init__(self, pictures: str | os.PathLike, most_bytes: int = MOST_BYTES) -> None:
        """Read from the folder `pictures`; nothing is read yet."""
        self.pictures, self.most_bytes = pictures, most_bytes
        self._kept: OrderedDict[tuple[bytes, str], bytes] = OrderedDict()
        self._size, self._lock = 0, Lock()

    def get(self, index: ImageIndex, row: int, size: str) -> bytes:
        """Return an image of the index as WebP, its longest side at most SIDES[size].

        Raises:
            DataError: no file holds it any more, or it cannot be read.
        """
        key = index.files_of(row)[0].digest, size
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = shrink(read_indexed(index, row, self.pictures), SIDES[size], QUALITIES[size])
        with self._lock:
            if key not in self._kept and len(made) <= self.most_bytes:
                self._kept[key] = made
                self._size += len(made)
            while self._size > self.most_bytes:
                self._size -= len(self._kept.popitem(last=False)[1])
        return made


def read_indexed(index: ImageIndex, row: int, pictures: str | os.PathLike) -> bytes:
    """Read an image from the first of its files that still holds the bytes that were indexed.

    Raises:
        DataError: none does.
    """
    files = index.files_of(row)
    found = False
    for file in files:
        path = os.path.join(os.fspath(pictures), file.name)
        try:
            data = read_bytes(path, MAX_IMAGE_BYTES)
        except DataError:
            continue
        found = True
        if hashlib.sha256(data).digest() == file.digest:
            return data
    what = "has changed since the index was built" if found else "is no longer there"
    raise DataError(f"{files[0].name} {what}; llave search build brings the index up to date")

"""Finds the image files of a folder and what has changed since they were indexed.

A file is known by its path, relative to the folder, in bytes: names need not be UTF-8 and may hold any character but
NUL and `/`. What it holds is known by SHA-256.
"""

import hashlib
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llave.batch import MAX_IMAGE_BYTES
from megatron_llave.data.image_files import IMAGE_SUFFIXES
from megatron_llave.errors import DataError
from megatron_llave.files import HASH_BYTES

THREADS = 8
"""Files that are read and hashed at a time."""
RACY_NS = 2_000_000_000
"""A file that was changed so shortly before it was hashed, in ns, may change again without another time."""
UNKNOWN_TIME = -1
"""Modification time of a file that has to be hashed again the next time."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file of the folder."""

    path: bytes
    """Relative to the folder."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, or UNKNOWN_TIME."""
    digest: bytes = b""
    """SHA-256 of the content, 32 bytes; empty while unknown, or where the file cannot be read."""
    problem: str = ""
    """Why the file has no embedding; empty: it has one, or is to get one."""

    @property
    def name(self) -> str:
        """The path as text, with half surrogate pairs in place of bytes that are not UTF-8."""
        return os.fsdecode(self.path)


@dataclass
class Scan:
    """What a folder holds."""

    files: list[ImageFile] = field(default_factory=list)
    """By path; without digest."""
    folder_problems: list[tuple[str, str]] = field(default_factory=list)
    """Folders that cannot be read, and why."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files have other endings than images have, by ending."""


def scan_folder(folder: str | Path, left_out: Iterable[str | Path] = ()) -> Scan:
    """Find all files whose names end as those of images do, in a folder and the folders in it.

    Names that begin with a dot are left out. Links to files and folders are followed; each folder is read once, so that
    links in a circle end. Where a folder can be reached in several ways, the path without links is taken.

    Args:
        folder: the folder.
        left_out: folders that are not read, such as that of the index.

    Raises:
        DataError: the folder does not exist or cannot be read.
    """
    root, scan = os.fsencode(folder), Scan()
    try:
        os.scandir(root).close()
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}; name a folder of images") from error
    seen = {_identity(os.stat(os.fsencode(path))) for path in left_out if os.path.isdir(path)}
    links: list[bytes] = []
    _read_tree(root, b"", seen, links, scan)
    while links:  # after all folders that need no link
        _read_tree(root, links.pop(0), seen, links, scan)
    scan.files.sort(key=lambda file: file.path)
    return scan


def _read_tree(root: bytes, start: bytes, seen: set[tuple[int, int]], links: list[bytes], scan: Scan) -> None:
    waiting = [start]
    while waiting:
        relative = waiting.pop()
        path = os.path.join(root, relative)
        try:
            identity = _identity(os.stat(path))
            if identity in seen:
                continue
            seen.add(identity)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            scan.folder_problems.append((os.fsdecode(relative), error.strerror or "it cannot be read"))
            continue
        for entry in entries:
            inner = os.path.join(relative, entry.name)
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else waiting).append(inner)
            else:
                _add_file(entry, inner, scan)


def _add_file(entry: os.DirEntry, relative: bytes, scan: Scan) -> None:
    suffix = os.path.splitext(os.fsdecode(entry.name))[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        scan.others[suffix or "no ending"] += 1
        return
    try:
        status = entry.stat()
    except OSError as error:  # a link that leads nowhere
        scan.files.append(ImageFile(relative, 0, UNKNOWN_TIME, problem=f"{error.strerror}"))
        return
    problem = "" if stat.S_ISREG(status.st_mode) else "it is not a regular file"
    scan.files.append(ImageFile(relative, status.st_size, status.st_mtime_ns, problem=problem))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def with_digests(
    folder: str | Path,
    files: Iterable[ImageFile],
    known: Mapping[bytes, ImageFile],
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[ImageFile]:
    """Yield the files with their digests, in order; a file whose size and time are as before is not read.

    Args:
        folder: that the paths are relative to.
        files: of a scan.
        known: the files of the last build by path.
        progress: called with the number of files that were hashed.
    """

    def complete(file: ImageFile) -> ImageFile:
        before = known.get(file.path)
        is_same = before is not None and before.digest and (before.size, before.mtime_ns) == (file.size, file.mtime_ns)
        if file.problem:
            return file
        return ImageFile(file.path, file.size, file.mtime_ns, before.digest) if is_same else hash_file(folder, file)

    with ThreadPoolExecutor(THREADS) as pool:
        for done, file in enumerate(pool.map(complete, files), 1):
            progress(done)
            yield file


def hash_file(folder: str | Path, file: ImageFile) -> ImageFile:
    """Return the file with its digest, and with the size and time that it has when it is read."""
    digest, path = hashlib.sha256(), os.path.join(os.fsencode(folder), file.path)
    try:
        with open(path, "rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            if status.st_size > MAX_IMAGE_BYTES:
                problem = f"it has {status.st_size} bytes, more than the {MAX_IMAGE_BYTES} that are read"
                return ImageFile(file.path, status.st_size, UNKNOWN_TIME, problem=problem)
            while block := stream.read(HASH_BYTES):
                digest.update(block)
    except OSError as error:
        return ImageFile(file.path, file.size, UNKNOWN_TIME, problem=error.strerror or "it cannot be read")
    is_settled = time.time_ns() - status.st_mtime_ns > RACY_NS
    return ImageFile(file.path, status.st_size, status.st_mtime_ns if is_settled else UNKNOWN_TIME, digest.digest())

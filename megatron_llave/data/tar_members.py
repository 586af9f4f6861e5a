"""Finds the samples of a tar file and reads single ones without the others.

Each worker of each rank reads all headers of a shard, and then only the bytes of the samples that it needs.
"""

import io
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN

# WebDataset cuts a member's name at the first dot of its last part; tar's own limit for a name is 100 characters.
KEY = re.compile(r"(?!__)[A-Za-z0-9_-]{1,80}")
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
NOTE = re.compile(r"__[^/]*__($|/)")
END_OF_ARCHIVE = bytes(1024)
BLOCK = 2**20
MAX_MEMBER_BYTES = 2**28
"""The largest member that is read; the bytes of an image file are far fewer."""


@dataclass
class TarSample:
    """The positions of a sample's members in the tar file."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(offset of the first byte, number of bytes) of each member by its suffix."""
    problem: str = ""
    """Why the sample cannot be used; empty if it can."""


def find_samples(file: BinaryIO, path: Path) -> list[TarSample]:
    """Return the samples of an open tar file in order: runs of files whose names are equal up to the first dot.

    Raises:
        DataError: the file is truncated, damaged, or not a tar file.
    """
    samples: list[TarSample] = []
    keys: set[str] = set()
    try:
        _check_end(file, path)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                parts = NAME.fullmatch(member.name)
                if not member.isreg() or parts is None or NOTE.match(member.name):
                    continue  # WebDataset skips folders, links, files without a suffix and its own notes too
                _add_member(samples, keys, parts[1], parts[2], (member.offset_data, member.size))
            end = tar.offset
        file.seek(end)
        # tarfile takes a damaged header for the end of the archive without an error.
        if any(block.strip(b"\0") for block in iter(lambda: file.read(BLOCK), b"")):
            raise DataError(f"{path} is damaged: there is more behind a header that cannot be read; {AGAIN}")
    except OSError as error:
        raise unreadable(path, error) from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as a tar ({error}); {AGAIN}") from error
    return samples


def _add_member(samples: list[TarSample], keys: set[str], key: str, suffix: str, position: tuple[int, int]) -> None:
    if not samples or samples[-1].key != key:
        samples.append(TarSample(key, problem="its key comes twice in the shard" if key in keys else ""))
        keys.add(key)
    sample = samples[-1]
    if not KEY.fullmatch(key):
        sample.problem = f"key {key!r} must be 1 to 80 letters, digits, - or _"
    elif suffix in sample.members:
        sample.problem = f"member {suffix!r} comes twice"
    elif position[1] > MAX_MEMBER_BYTES:
        sample.problem = f"member {suffix!r} has {position[1]} bytes, more than {MAX_MEMBER_BYTES}"
    sample.members[suffix] = position


def read_sample(file: BinaryIO, path: Path, sample: TarSample) -> dict[str, bytes]:
    """Return the raw bytes of each member by its suffix; nothing is decoded by file extension, so nothing is unpickled.

    Raises:
        DataError: the sample cannot be used, or the file ends within it.
    """
    where = f"{path}: sample {sample.key}"
    if sample.problem:
        raise DataError(f"{where}: {sample.problem}; {AGAIN}")
    members = {}
    for suffix, (offset, size) in sample.members.items():
        try:
            members[suffix] = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise unreadable(path, error) from error
        if len(members[suffix]) != size:
            raise DataError(f"{where}: member {suffix!r} is cut short; {AGAIN}")
    return members


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the operating system cannot read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}; {AGAIN}")


def _check_end(file: BinaryIO, path: Path) -> None:
    """Check for the two blocks of zeros at the end, without which a cut file would look like a shorter one."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - len(END_OF_ARCHIVE)))
    if size % 512 or file.read() != END_OF_ARCHIVE:
        raise DataError(f"{path} is truncated or not a tar: its end-of-archive mark is missing ({size} bytes); {AGAIN}")
    file.seek(0)

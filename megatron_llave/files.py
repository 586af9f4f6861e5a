"""Files and folders that are written whole or not at all, JSON files, and locks on folders."""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_llave.errors import CheckpointError, DataError

VERSION = 1


AGAIN = "make it again or copy it again"


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON; the file takes its name only when it is whole, whoever else writes it."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # of a full disk


def read_json(path: str | Path, file_format: str, hint: str) -> dict[str, Any]:
    """Read what `write_json` wrote and check its `format` and `version`.

    Raises:
        DataError: the file is missing (the message ends in `hint`), no JSON, or of another format or version.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; {hint}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(value, dict) or value.get("format") != file_format:
        raise DataError(f"{path} is not a {file_format!r} file; {hint}")
    if value.get("version") != VERSION:
        version = value.get("version")
        raise DataError(f"{path} has version {version!r}, this code reads version {VERSION}; make it again")
    return value


@contextmanager
def lock_folder(directory: str | Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made when missing.

    Raises:
        DataError: it cannot be made or written into, or another process holds it.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"folder {directory} cannot be made: {error.strerror}; choose another") from error
    try:
        _lock(held, directory)
        try:
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise DataError(f"folder {directory} cannot be written into: {error.strerror}; choose another") from error
        yield
    finally:
        os.close(held)


def _lock(held: int, directory: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when this process ends, however it does
    except BlockingIOError as error:
        raise DataError(f"another process is writing into {directory}; wait for it or choose another folder") from error
    except OSError:
        pass  # a file system without locks, as some network ones


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary name that becomes `path` at the end: a reader sees the old file or the new one, never a half.

    Two processes that write the same file have different names; of a failure nothing is left.
    """
    temporary = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: str | Path, what: str) -> Iterator[Path]:
    """A folder that is there whole or not at all: filled under a temporary name, renamed at the end.

    Args:
        final: must not exist yet, or be empty.
        what: names the contents in messages, such as "exported model".

    Yields:
        The temporary folder, beside the final one.

    Raises:
        CheckpointError: the folder is taken, or cannot be written (a full disk); nothing is left of it then.
    """
    final = Path(final).absolute()
    if final.is_dir() and any(final.iterdir()) or final.is_file():
        raise CheckpointError(f"{final} exists already; choose another name for the {what}, or remove it")
    partial = final.with_name(f"{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if final.is_dir():
            final.rmdir()
        os.replace(partial, final)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CheckpointError(f"{final}: the {what} cannot be written: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

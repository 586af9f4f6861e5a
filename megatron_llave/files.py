"""Files and folders that are complete or absent, JSON files, and locks on folders.

Whatever is not complete yet lies beside its final name, under a name that ends in `.partial`, and takes the final name
by one rename. A file is written as `.NAME.HEX.partial`: hidden, so that no pattern for finished files matches it, and
with random digits, because several processes may write the same file at once. The only writer of a file leaves the
digits out, so that the next attempt writes over what a killed process has left. A folder is filled as `NAME.partial`,
without digits, because all ranks that fill it together must know its name; the next attempt empties it first.
Nothing reads a `.partial`, so what a killed process leaves costs space and nothing else.
"""

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

from megatron_llave.errors import CheckpointError, DataError, UserError

VERSION = 1
"""Version of all of the package's own JSON formats."""
AGAIN = "make it again or copy it again"
"""The advice at the end of messages about damaged data."""


@contextmanager
def atomic_write(path: str | Path, only_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary name that is renamed to `path` at the end, so that readers see the old or the new file.

    When the body raises, the temporary file is removed and `path` stays as it was.

    Args:
        path: the file; its folder exists.
        only_writer: no other process writes this file at the same time, so that the temporary name can always be the
            same; for large files, of which a killed process would otherwise leave one copy after another.
    """
    path = Path(path)
    digits = "" if only_writer else f".{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}{digits}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, only_writer: bool = False) -> None:
    """Write a UTF-8 text file by `atomic_write`."""
    with atomic_write(path, only_writer) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, only_writer: bool = False) -> None:
    """Write indented JSON by `atomic_write`. Half a surrogate pair, as in an undecodable file name, is escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path, only_writer) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def read_json(
    path: str | Path, file_format: str | None = None, hint: str = AGAIN, error: type[UserError] = DataError
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        file_format: what the object's `format` must be, with VERSION as its `version`; None: neither is checked.
        hint: the end of the message when the file is missing or is another file.
        error: the kind of error to raise.

    Raises:
        UserError: of kind `error`; the file is missing or cannot be read, is not a JSON object, or is of another format
            or version.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist; {hint}") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}; {hint}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON ({cause}); {AGAIN}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, not one JSON object; {hint}")
    if file_format is None:
        return value
    if value.get("format") != file_format:
        raise error(f"{path} is not a {file_format!r} file; {hint}")
    if value.get("version") != VERSION:
        version = value.get("version")
        raise error(f"{path} is {file_format!r} version {version!r}, this code reads version {VERSION}; make it again")
    return value


@contextmanager
def lock_folder(directory: str | Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made when it is missing.

    Raises:
        DataError: the folder cannot be made or written into, or another process has locked it.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"folder {directory} cannot be made: {error.strerror}; choose another") from error
    try:
        _lock(descriptor, directory)
        try:
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise DataError(f"folder {directory} cannot be written into: {error.strerror}; choose another") from error
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when this process ends, however it ends
    except BlockingIOError as error:
        raise DataError(f"another process is writing into {directory}; wait for it or choose another folder") from error
    except OSError:
        pass  # some network file systems have no locks


@contextmanager
def whole_folder(final: str | Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder beside `final` that is renamed to it at the end: the folder is complete or absent.

    Args:
        final: must not exist yet, or be empty.
        what: names the contents in messages, such as "exported model".

    Raises:
        CheckpointError: `final` is taken, or cannot be written (a full disk); then nothing is left of it.
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

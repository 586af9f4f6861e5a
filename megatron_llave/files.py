"""Files and folders that are complete or absent, and JSON files.

Whatever is not complete yet lies beside its final name, under a name that ends in `.partial`, and takes the final name
by one rename. A file is written as `.NAME.HEX.partial`: hidden, so that no pattern for finished files matches it, and
with random digits, because several processes may write the same file at once. The only writer of a file leaves the
digits out, so that the next attempt writes over what a killed process has left. A folder is filled as `NAME.partial`,
without digits, because all ranks that fill it together must know its name; the next attempt empties it first.
Nothing reads a `.partial`, so what a killed process leaves costs space and nothing else.
"""

import codecs
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_llave.errors import CheckpointError, DataError, UserError

VERSION = 1
"""Version of all of the package's own JSON formats."""
HASH_BYTES = 2**22
"""Bytes of a file that are in memory while it is hashed."""
AGAIN = "make it again or copy it again"
"""The advice at the end of messages about damaged data."""
MAX_JSON_BYTES = 2**30
"""The largest JSON file that is read, and the largest line of a JSONL file."""
MAX_JSON_DEPTH = 100
"""How deeply lists and objects may lie in each other in JSON."""
NO_LENGTH_LIMIT = str(int(1e30))
"""The one integer of more than 64 bits that JSON may have: transformers' model_max_length where there is no limit."""


NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""What a Python string can hold and a text cannot: NUL, and half of a surrogate pair, as of a cut emoji."""


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
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
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
    value = _decode(read_bytes(path, MAX_JSON_BYTES, hint, error), str(path), error, f"; {AGAIN}")
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


def read_bytes(path: str | Path, limit: int, hint: str = AGAIN, error: type[UserError] = DataError) -> bytes:
    """Read a regular file of at most `limit` bytes; a device or a named pipe might never end.

    Args:
        path: the file.
        limit: number of bytes.
        hint: the end of the message when the file is missing or cannot be read.
        error: the kind of error to raise.

    Raises:
        UserError: of kind `error`; the file is missing, cannot be read, is no regular file or is too large.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise error(f"{path} cannot be read: it is not a regular file; {hint}")
        if status.st_size > limit:
            raise error(f"{path} has {status.st_size} bytes, more than the {limit} that are read; {hint}")
        return path.read_bytes()
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist; {hint}") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}; {hint}") from cause
    except ValueError as cause:  # a name with a NUL or with half a surrogate pair
        if isinstance(cause, UserError):
            raise
        raise error(f"{str(path)!r} cannot be the name of a file ({cause}); {hint}") from cause


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes, where: str, error: type[UserError] = DataError) -> Any:
    """Parse JSON that somebody else has written, such as the line of a JSONL file.

    Args:
        text: the JSON, in UTF-8 if it is bytes.
        where: the place that messages begin with, such as FILE:LINE.
        error: the kind of error to raise.

    Raises:
        UserError: of kind `error`; it is not JSON, nests deeper than MAX_JSON_DEPTH, or has an integer of more than 64
            bits, a number that is not finite, or a string with a NUL or with half a surrogate pair (a cut emoji), which
            is no text.
    """
    value = _decode(text, where, error, "")
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text or isinstance(text, str) and not text.isascii():
        for string in _strings(value):
            if NO_CHARACTER.search(string):
                wrong = "a NUL" if "\0" in string else "half a surrogate pair, as of a cut emoji"
                raise error(f"{where}: the text {string!r} holds {wrong}, which is no character; remove it")
    return value


def read_lines(path: str | Path, error: type[UserError] = DataError) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and bytes of each line of a text file that is not blank; a byte order mark is left out.

    Raises:
        UserError: of kind `error`; the file cannot be read, is no regular file, or has a line of MAX_JSON_BYTES.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} cannot be read: it is not a regular file")
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES), b""), start=1):
                if len(line) == MAX_JSON_BYTES:
                    raise error(f"{path}:{number} is longer than {MAX_JSON_BYTES} bytes, so that it is no line of text")
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    except ValueError as cause:
        if isinstance(cause, UserError):
            raise
        raise error(f"{str(path)!r} cannot be the name of a file ({cause})") from cause


def _decode(text: str | bytes, where: str, error: type[UserError], hint: str) -> Any:
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # files that Windows programs have written begin with a mark
        value = json.loads(text, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float)
        if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
            _check_depth(value)
    except UnicodeDecodeError as cause:
        raise error(f"{where} is not UTF-8 text ({cause.reason} at byte {cause.start}){hint}") from cause
    except RecursionError as cause:
        raise error(f"{where} is not valid JSON (nested deeper than {MAX_JSON_DEPTH}){hint}") from cause
    except ValueError as cause:
        raise error(f"{where} is not valid JSON ({cause}){hint}") from cause
    return value


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _parse_int(digits: str) -> int:
    if digits == NO_LENGTH_LIMIT:
        return int(digits)
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"the integer {digits[:20]}... has more than 64 bits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings of a parsed JSON, keys included."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, str):
            yield current
        elif isinstance(current, dict):
            yield from current
        waiting += _inner(current)


@contextmanager
def whole_folder(final: str | Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder beside `final` that is renamed to it at the end: the folder is complete or absent.

    Args:
        final: must not exist yet, or be empty.
        what: names the contents in messages, such as "exported model".

    Raises:
        CheckpointError: `final` is taken, another process is filling it, or it cannot be written (a full disk); then
            nothing is left of it.
    """
    final = Path(final).absolute()
    if final.is_dir() and any(final.iterdir()) or final.is_file():
        raise CheckpointError(f"{final} exists already; choose another name for the {what}, or remove it")
    partial = final.with_name(f"{final.name}.partial")
    try:
        with _emptied(partial):
            yield partial
            if final.is_dir():
                final.rmdir()
            os.replace(partial, final)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise CheckpointError(f"{final}: the {what} cannot be written: {reason}; nothing is left of it") from error


@contextmanager
def _emptied(partial: Path) -> Iterator[None]:
    """Make or empty a temporary folder that no other process is filling, and remove it at the end."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for its end, or choose another name"
            raise CheckpointError(f"another process is filling {partial}; {hint}") from error
        except OSError:  # a file system without locks
            pass
        try:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)

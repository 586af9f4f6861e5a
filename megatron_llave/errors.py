"""Errors that a user can fix: each message is one line that names what is wrong and says what would be right."""

import argparse
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

SECONDS_FOR_FIRST_RANK = 10
EXIT_USER_ERROR = 2
_LOST = re.compile(r"onnection (closed|reset) by peer|onnection refused|Broken pipe|Socket Timeout|Timed out waiting")
"""Errors of torch on a rank that has lost another one."""
LONGEST_WORD = 300
LONGEST_MESSAGE = 2000


class UserError(ValueError):
    """Base class of the errors whose message is written for the person who started the run: one line, never endless."""

    is_worth_a_restart = False
    """Whether the same command may succeed when torchrun --max-restarts starts it again."""

    def __init__(self, message: str) -> None:
        super().__init__(to_one_line(message))


def to_one_line(message: str) -> str:
    """A message as one line that a terminal can show, without the middle of overlong words and of an overlong whole.

    Names and values from files go into messages, and may hold line ends, terminal codes or megabytes.
    """
    line = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", message.strip())
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda code: repr(code[0])[1:-1], line)
    line = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: _shortened(word[0], LONGEST_WORD), line)
    return _shortened(line, LONGEST_MESSAGE)


def _shortened(text: str, length: int) -> str:
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


class ConfigError(UserError):
    """A key, value or combination in the configuration cannot work; this includes the parallel layout."""


class DataError(UserError):
    """A data file is missing, damaged or malformed: a shard, an index, a tokenizer or an evaluation set."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or of another model."""


class DivergedError(UserError):
    """The losses or gradients of a run are no longer finite."""


class BadInputError(DataError):
    """An input of an embedding cannot be read: its image is missing or damaged, or it does not fit the model."""


class NotFiniteError(DataError):
    """The embedding of an input is not finite, so that it has no score."""


class OneLineParser(argparse.ArgumentParser):
    """A command-line parser that reports a wrong argument in one line, as all other errors for users are."""

    def __init__(self, **options: Any) -> None:
        if sys.argv[0] == "llave" and len(sys.argv) > 1:
            options.setdefault("prog", f"llave {sys.argv[1]}")
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        self.exit(2, f"error: {message}; --help explains all arguments\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End with this status; of the ranks of a node the first one does so first, which prints the message."""
        if status:
            _wait_for_first_rank()
        super().exit(status, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others have the same arguments
            super()._print_message(message, file)


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Wrap an entry point so that each end has one line, and torchrun's report names the rank that is the cause.

    - A UserError ends the process with status 2 and its line, without a traceback. If the same command would fail
      again, torchrun --max-restarts is ended too.
    - Ctrl-C ends it with status 130.
    - A file or the memory that the system refuses is named in one line too.
    - A rank that has only lost another one says so, unless torchrun ends it first because of that other rank.
    - Any other error keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        _record(f"error: {error}")
        _wait_for_first_rank()
        if _is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not error.is_worth_a_restart:
            _end_launcher()
        raise SystemExit(EXIT_USER_ERROR) from None
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if is_lost_rank(error):
            _end_after_lost_rank(error)
        refused = _refused_by_system(error)
        if refused:
            _record(f"error: {refused}")
            _wait_for_first_rank()
            print(f"error: {refused}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_USER_ERROR) from None
        _record(f"{type(error).__name__}: {one_line(error)} (its traceback is above)")
        raise


def _refused_by_system(error: Exception) -> str:
    """What the system has refused: a file, as in a folder without permission, or memory on the host; "" if nothing."""
    if isinstance(error, OSError) and error.filename is not None:
        return to_one_line(f"{error.filename} cannot be used: {error.strerror}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return to_one_line(
            f"the memory of this machine is too small ({str(error).rpartition('DefaultCPUAllocator: ')[2]})"
        )
    return ""


def one_line(error: BaseException) -> str:
    """The text of any error in one line, or its type if it has none."""
    return to_one_line(str(error)) or type(error).__name__


def is_lost_rank(error: BaseException) -> bool:
    """Whether torch raised this because another rank has ended."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _wait_for_first_rank() -> None:
    """Let the first rank of this node end before the others.

    Most errors occur on all ranks alike. torchrun ends the other ranks of a node when the first one has failed, which
    keeps them from repeating the message. An error of another rank alone is printed after the wait.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training takes it for a request to save
        time.sleep(SECONDS_FOR_FIRST_RANK)


def _is_first_to_say(message: str) -> bool:
    """Whether no other rank that this torchrun has started has printed the message yet."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return True
    said = Path(file).parents[1] / f"said-{hashlib.sha256(message.encode(errors='replace')).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _record(message: str) -> None:
    """Tell torchrun the message and the time of the error in its file, in the format of torch's ErrorHandler.

    torchrun takes the rank with the earliest time for the cause. It prints `py_callstack` where it has one.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _end_launcher() -> None:
    """Keep torchrun --max-restarts from running into the same error again: it ends when it gets a SIGTERM."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        os.kill(os.getppid(), signal.SIGTERM)


def _end_after_lost_rank(error: Exception) -> NoReturn:
    """End this rank without a traceback, after torchrun has had the time to end it because of the rank that is lost."""
    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training takes it for a request to save
        time.sleep(SECONDS_FOR_FIRST_RANK)
    rank = os.environ.get("RANK", "0")
    print(f"error: rank {rank} lost another rank, which says why itself ({one_line(error)[:200]})", file=sys.stderr)
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # they ignore the SIGTERM of torchrun
        child.kill()
    os._exit(1)  # an orderly end of the process groups would wait for the lost rank


def require(ok: bool, message: str) -> None:
    """Raise ConfigError(message) unless `ok` is true."""
    if not ok:
        raise ConfigError(message)


def at_least(section: Any, prefix: str, lowest: float, names: Sequence[str]) -> None:
    """Raise a ConfigError unless each named value of the section is None or a finite number of at least `lowest`."""
    for name in names:
        value = getattr(section, name)
        ok = value is None or (math.isfinite(value) and value >= lowest)
        require(ok, f"{key_of(prefix, name)}={value} must be a finite number of at least {lowest}")


def key_of(prefix: str, name: str) -> str:
    """How a user writes a value: `section.name` in a configuration, and `--name` where the prefix is `--`."""
    return f"--{name.replace('_', '-')}" if prefix == "--" else f"{prefix}.{name}"


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the key unless its value is one of the allowed ones."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(allowed)}")


def import_optional(
    module: str, needs: str, install: str, package: str | None = None, error: type[UserError] = ConfigError
) -> ModuleType:
    """Import a module of a package that is not always installed.

    Args:
        module: its name.
        needs: the beginning of the message, such as "log.tensorboard=true needs".
        install: what installs the package, for the message.
        package: the name of the package, where it is another one than the first part of `module`.
        error: the kind of error to raise.

    Raises:
        UserError: of kind `error`; the package is not installed, or is installed and cannot be imported, as one that
            lacks a package of its own or was compiled against another version of one.
    """
    package = package or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError, OSError) as cause:
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] == package:
            raise error(f"{needs} {package}: {install}") from cause
        why = f"{type(cause).__name__}: {one_line(cause)}"
        what = f"{needs} {package}, which is installed but cannot be imported ({why}); install it again"
        raise error(what) from cause

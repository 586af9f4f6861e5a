"""Errors that a user can fix: each message is one line that names what is wrong and says what would be right."""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

SECONDS_FOR_FIRST_RANK = 10


LONGEST_WORD = 300
LONGEST_MESSAGE = 2000


class UserError(ValueError):
    """Base class of the errors whose message is written for the person who started the run: one line, never endless."""

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

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        self.exit(2, f"error: {message}; --help explains all arguments\n")


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Wrap an entry point so that a UserError ends the process with status 2 and one line, without a traceback."""
    try:
        yield
    except UserError as error:
        # Most errors occur on all ranks alike. torchrun ends the other ranks of a node when the first one has failed,
        # so a short wait keeps them from repeating the message. An error of another rank alone is printed after it.
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def require(ok: bool, message: str) -> None:
    """Raise ConfigError(message) unless `ok` is true."""
    if not ok:
        raise ConfigError(message)


def at_least(section: Any, prefix: str, lowest: float, names: Sequence[str]) -> None:
    """Raise a ConfigError unless each named value of the section is None or a finite number of at least `lowest`."""
    for name in names:
        value = getattr(section, name)
        ok = value is None or (math.isfinite(value) and value >= lowest)
        require(ok, f"{prefix}.{name}={value} must be a number of at least {lowest}")


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the key unless its value is one of the allowed ones."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(allowed)}")

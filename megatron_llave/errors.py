"""Errors a user can mend: each message is one line that names the culprit and says what would be right."""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SECONDS_FOR_FIRST_RANK = 10


class UserError(ValueError):
    """Base of the errors whose message is written for the person who started the run."""


class ConfigError(UserError):
    """A configuration key, value or combination that cannot work, parallel layouts included."""


class DataError(UserError):
    """A missing, damaged or malformed file among the data: shards, index, tokenizer, evaluation sets."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or of another model."""


class DivergedError(UserError):
    """A run whose losses or gradients are not finite any more."""


class NotFiniteError(DataError):
    """An input whose embedding is not finite: such a model, or such an input, has no score."""


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Wrap an entry point: a UserError ends the process with status 2 and its one line, without a traceback."""
    try:
        yield
    except UserError as error:
        # Most errors meet all ranks alike: torchrun ends the others when the first of a node has failed, before they
        # say the same. What only another rank has met is said a little later.
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(SECONDS_FOR_FIRST_RANK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def require(ok: bool, message: str) -> None:
    """Raise ConfigError(message) unless `ok`."""
    if not ok:
        raise ConfigError(message)


def at_least(section: Any, prefix: str, lowest: float, names: Sequence[str]) -> None:
    """Raise a ConfigError unless each of the section's named values is None or a number of at least `lowest`."""
    for name in names:
        value = getattr(section, name)
        ok = value is None or (math.isfinite(value) and value >= lowest)
        require(ok, f"{prefix}.{name}={value} must be a number of at least {lowest}")


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the key unless its value is among the allowed ones."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(allowed)}")

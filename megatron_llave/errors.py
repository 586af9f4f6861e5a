"""Errors a user can mend: each message is one line that names the culprit and says what would be right."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Base of the errors whose message is written for the person who started the run."""


class ConfigError(UserError):
    """A configuration key, value or combination that cannot work, parallel layouts included."""


class DataError(UserError):
    """A missing, damaged or malformed file among the data: shards, index, tokenizer, evaluation sets."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or of another model."""


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Wrap an entry point: a UserError ends the process with status 2 and its one line, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None

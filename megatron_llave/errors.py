"""Errors a user can mend: each message is one line that names the culprit and says what would be right."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

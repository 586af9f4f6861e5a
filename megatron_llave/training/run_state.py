"""The state of a run, in `state.json` in its output directory, for those who have started it and for scripts.

    {"state": "running", "step": 1200, "reason": "", "host": "node7", "pid": 4242, "time": "2026-11-27 07:00:00"}

`state` is running, stopped (saved before the last step), finished, or failed; `reason` says why it was stopped or has
failed. While a run is running, the file is written at most every STATE_SECONDS. After a `kill -9` of all ranks or the
loss of the machine it stays "running"; then the run no longer holds the lock of its output directory. `read_state`
looks at both.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.errors import DataError, UserError, is_lost_rank, one_line
from megatron_llave.files import read_json, write_json
from megatron_llave.locks import is_locked, lock_folder

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
STATE_SECONDS = 5.0
LOST = "lost"
"""What `read_state` returns as the state of a run that is gone although its file says that it is running."""


class RunState:
    """Writes the state of a run; every rank has one."""

    def __init__(self, output: str | Path, is_first_rank: bool) -> None:
        """Write nothing yet, so that a run that cannot start leaves the state of the one before."""
        self._output, self._is_first_rank = Path(output), is_first_rank
        self._is_over = self._has_warned = False
        self._written = -math.inf
        self.has_started = False
        """Whether the run has reached its loop over the steps."""
        self.step = 0
        """Steps done."""

    def running(self, step: int) -> None:
        """Note that `step` steps are done; the first rank writes it, unless it has written a moment ago."""
        self.step, self.has_started = step, True
        if self._is_first_rank and time.monotonic() - self._written > STATE_SECONDS:
            self._write("running", "")

    def end(self, state: str, step: int, reason: str = "") -> None:
        """Write on the first rank how the run has ended."""
        self.step, self._is_over = step, True
        if self._is_first_rank:
            self._write(state, reason)

    def fail(self, reason: str, is_secondary: bool = False) -> None:
        """Write, on whichever rank, that the run has failed; a start that fails leaves how an earlier one has ended.

        Args:
            reason: one line.
            is_secondary: this rank only suffers from the failure of another one, whose reason is kept if it is there.
        """
        file = self._output / STATE_FILE
        written = _read(file)
        if self._is_over or not self.has_started and written.get("state") not in ("running", "failed"):
            return
        if is_secondary and written.get("state") == "failed":
            return
        if not self.has_started:
            self.step = written.get("step", 0)
        self._is_over = True
        self._write("failed", reason)

    def _write(self, state: str, reason: str) -> None:
        self._written = time.monotonic()
        try:
            write_state(self._output, state, self.step, reason)
        except OSError as error:
            if not self._has_warned:
                file = self._output / STATE_FILE
                logger.warning("%s cannot be written: %s; the run is %s", file, error.strerror or error, state)
            self._has_warned = True


@contextmanager
def held_output(output: str) -> Iterator[RunState]:
    """Hold the lock of the output directory on the first rank, and let the state of the run tell how it ended.

    Raises:
        DataError: another process is writing into the output directory, or it cannot be made.
    """
    with ExitStack() as lock:
        name = f"train.output={output}"
        from_first_rank(lambda: lock.enter_context(lock_folder(output, name)))
        run = RunState(output, dist.get_rank() == 0)
        try:
            yield run
        except BaseException as error:
            if isinstance(error, UserError):
                error.is_worth_a_restart = run.has_started
            reason = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else one_line(error)
            run.fail(reason, is_lost_rank(error))
            raise


def write_state(output: str | Path, state: str, step: int, reason: str = "") -> None:
    """Write the state of a run.

    Args:
        output: output directory of the run.
        state: running, stopped, finished or failed.
        step: steps done.
        reason: why it was stopped or has failed, or "".

    Raises:
        OSError: the file cannot be written.
    """
    value = {"state": state, "step": step, "reason": reason, "host": socket.gethostname(), "pid": os.getpid()}
    write_json(Path(output) / STATE_FILE, {**value, "time": time.strftime("%Y-%m-%d %H:%M:%S")})


def read_state(output: str | Path) -> dict[str, Any]:
    """Read the state of a run; one that is "running" and holds no lock on its output directory is "lost".

    Raises:
        DataError: there is no state, or the file is damaged.
    """
    state = read_json(Path(output) / STATE_FILE, hint="a run writes it when it starts")
    if state.get("state") == "running" and not is_locked(output):
        state["state"] = LOST
    return state


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except DataError:
        return {}

"""How a run handles requests to stop, steps that are not finite, and ranks that hang or disappear.

`train` asks StopRequests and FiniteSteps once per step, and tells the Watchdog what it is doing.
"""

import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.distributed.collectives import from_all_ranks, largest_of_ranks
from megatron_llave.errors import DivergedError
from megatron_llave.loss.contrastive import LossShare
from megatron_llave.processes import SIGNALS, launcher_is_gone

logger = logging.getLogger(__name__)

STOP_FILE = "stop"
"""A file in the output directory that asks the run to save and stop, where signals cannot reach every rank."""
EXIT_STOPPED = 75
"""Exit status of a run that was stopped and saved before its last step (EX_TEMPFAIL: try again later)."""
EXIT_HUNG = 76
"""Exit status of a rank that the watchdog has ended because some rank made no progress."""
SECONDS_BETWEEN_CTRL_C = 2.0
"""Time after which a further SIGINT is one of the user's. In a terminal, a rank gets the first one from the terminal
and from torchrun."""
PAIRS_NAMED = 20
"""Largest number of pairs that a message names."""
BEATS_WATCHED = 3
"""Number of its own heartbeats during which a rank waits for a heartbeat of every other rank."""
GRACE = 1.5
"""Time limits after which a C thread ends a rank in which not even Python threads run."""
STARTED = time.monotonic()
"""Approximate start of this process: most of the time before the first step comes after this import."""


class StopReason(Enum):
    """Why a run is asked to stop; its value is the text for messages. Of several reasons the last one counts."""

    NONE = ""
    SIGTERM = "SIGTERM"
    SIGUSR1 = "SIGUSR1"
    SIGINT = "Ctrl-C"
    LAUNCHER = "torchrun is gone"
    TIME_LIMIT = "train.time_limit_minutes"
    STOP_FILE = f"a file {STOP_FILE!r} in train.output"


class StopRequests:
    """Collects requests to save and stop; all ranks learn of one at the same step."""

    def __init__(self, output: str | Path, time_limit_minutes: float | None) -> None:
        """Handle SIGTERM, SIGUSR1 and SIGINT, and delete the stop file of an earlier run.

        Args:
            output: output directory of the run.
            time_limit_minutes: time after the start of this process at which the run is to stop; None: no limit.
        """
        self._file = Path(output) / STOP_FILE
        self._end = None if time_limit_minutes is None else STARTED + 60 * time_limit_minutes
        self._signal, self._since = StopReason.NONE, 0.0
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        if dist.get_rank() == 0:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: object) -> None:
        """Note a request. A second Ctrl-C ends at once; torchrun repeats the first one within a moment."""
        asked, now = StopReason[signal.Signals(number).name], time.monotonic()
        # Without a call in between, since a further signal may interrupt this function at each.
        before, self._signal = self._signal, asked
        if asked is not StopReason.SIGINT:
            return
        if before is not StopReason.SIGINT:
            self._since = now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, b"Ctrl-C: the run saves after this step and stops; a second Ctrl-C ends it at once\n")
        elif now - self._since > SECONDS_BETWEEN_CTRL_C:
            _kill_child_processes()
            os._exit(128 + number)

    def reason(self) -> str:
        """Why the run is to stop now, the same on all ranks; "" if it is to go on."""
        reasons, reason = list(StopReason), self._signal
        if reason is StopReason.NONE and launcher_is_gone():
            reason = StopReason.LAUNCHER
        if dist.get_rank() == 0 and reason is StopReason.NONE:
            if self._end is not None and time.monotonic() > self._end:
                reason = StopReason.TIME_LIMIT
            elif self._file.exists():
                reason = StopReason.STOP_FILE
        [agreed] = largest_of_ranks(reasons.index(reason))
        return reasons[agreed].value

    def close(self) -> None:
        """Restore the signal handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def read_norms(squared_norms: Tensor, shares: list[LossShare]) -> tuple[list[float], bool]:
    """Wait once for norms of the gradient, and for whether the first and the losses of all ranks are finite.

    Args:
        squared_norms: [n] of the whole gradient first, the same on all ranks (Trainable.squared_norms).
        shares: the results of the loss; an empty list on all pipeline stages but the last.
    """
    is_finite = torch.stack([squared_norms[0].isfinite(), *(loss.isfinite() for loss, _ in shares)]).all()
    values = torch.cat([squared_norms.double(), (~is_finite).double()[None]])  # [n + 1]
    dist.all_reduce(values, dist.ReduceOp.MAX)
    *squares, is_bad = values.tolist()
    return [squared**0.5 for squared in squares], not is_bad


class FiniteSteps:
    """Detects steps whose loss or gradient is not finite, and which must not change the weights."""

    def __init__(self, most_in_a_row: int, groups: ProcessGroupCollection) -> None:
        """Allow at most `most_in_a_row` consecutive ones."""
        self._most, self._groups = most_in_a_row, groups
        self._in_a_row = 0
        self.num_bad = 0
        """Number of such steps so far."""

    def check(self, is_finite: bool, shares: list[LossShare], batches: list[PairBatch], step: int) -> bool:
        """Count the step unless its losses and gradient are finite, and return whether they are.

        Args:
            is_finite: whether they are, of `read_norms`, the same on all ranks.
            shares: the results of the loss; an empty list on all pipeline stages but the last.
            batches: this rank's micro batches.
            step: number of the step from 0, for the message.

        Raises:
            DivergedError: too many consecutive steps are not finite; the message names pairs without finite embedding.
        """
        if is_finite:
            self._in_a_row = 0
            return True
        self.num_bad, self._in_a_row = self.num_bad + 1, self._in_a_row + 1
        offending = self._offending(shares, batches)
        named = ", ".join(offending[:PAIRS_NAMED])
        pairs = f"the embeddings of {named} are not finite" if offending else "no pair stands out"
        if self._in_a_row > self._most:
            hint = "start again from an earlier checkpoint with a lower learning rate, or leave the pairs out"
            raise DivergedError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, more than "
                f"train.max_bad_steps={self._most}; in step {step + 1} {pairs}; {hint}"
            )
        if dist.get_rank() == 0:
            logger.warning("step %d is skipped: its loss or gradient is not finite; %s", step + 1, pairs)
        return False

    def _offending(self, shares: list[LossShare], batches: list[PairBatch]) -> list[str]:
        """Keys of the pairs of all ranks whose positive has a cosine that is not finite."""
        local = []
        if shares:
            keys = [key for batch in batches for key in batch.keys]
            bad = ~torch.cat([statistics.positive for _, statistics in shares]).isfinite()
            local = [f"{batches[0].subset}/{key}" for key, is_bad in zip(keys, bad.tolist()) if is_bad]
        return sorted(set(from_all_ranks(local)))


class Watchdog:
    """Ends the process when the run makes no progress, and names the rank that is the cause.

    A thread on each rank regularly writes a heartbeat, with what its rank is doing, into the store through which the
    processes have joined. When its own rank has done the same thing for too long, the thread looks for a rank without
    heartbeat (its process was stopped, or its machine is gone), or else for the rank that is furthest behind.
    """

    def __init__(self, seconds: float, report: Callable[[str], None] = lambda reason: None) -> None:
        """Start the thread; a rank may do the same thing for at most `seconds`. `report` is told why the run ends."""
        self._seconds, self._report = seconds, report
        self._pause = min(5.0, seconds / 8)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        # A separate connection, because that of the training may be waiting for the rank that hangs.
        self._store = dist.PrefixStore(f"watchdog-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store.clone())
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._beats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self.progress("starting")

    def progress(self, doing: str) -> None:
        """Note that the rank has made progress and is now doing this."""
        self._count, self._doing, self._since = self._count + 1, doing, time.monotonic()
        faulthandler.dump_traceback_later(GRACE * self._seconds, exit=True)

    def announce(self, doing: str) -> None:
        """Note it, and tell the user on the first rank: for what is done before the first step and may take long."""
        self.progress(doing)
        if dist.get_rank() == 0:
            logger.info("%s", doing)

    def close(self) -> None:
        """Stop the thread."""
        faulthandler.cancel_dump_traceback_later()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            with suppress(dist.DistError, RuntimeError):  # the store has disappeared with the rank that held it
                self._write()
            if time.monotonic() - self._since > self._seconds:
                self._end()

    def _write(self) -> None:
        self._beats += 1
        values = [self._beats, self._count, self._doing, socket.gethostname(), os.getpid()]
        self._store.set(str(self._rank), json.dumps(values))

    def _read(self) -> dict[int, list]:
        return {rank: json.loads(self._store.get(str(rank))) for rank in range(self._world)}

    def _end(self) -> None:
        """Find the rank that is the cause, print it, and end the process."""
        faulthandler.dump_traceback_later(GRACE * self._seconds, exit=True)  # anew, because this thread does run
        try:
            before = self._read()
            for _ in range(BEATS_WATCHED):
                time.sleep(self._pause)
                self._write()  # the other ranks wait for this heartbeat
            now = self._read()
            silent = [rank for rank in now if now[rank][0] == before[rank][0] and rank != self._rank]
            behind = min(values[1] for rank, values in now.items() if rank not in silent)
            slowest = silent or [rank for rank, values in now.items() if values[1] == behind]
            is_first = self._store.add("verdict", 1) == 1
        except (dist.DistError, RuntimeError) as error:
            slowest, silent, now, is_first = [self._rank], [], {}, False
            print(f"error: the store of the processes does not answer ({error})", file=sys.stderr)
        if is_first:
            lines = [self._describe(rank, now[rank], rank in silent) for rank in slowest]
            print(*[f"error: {line}" for line in lines], sep="\n", file=sys.stderr, flush=True)
            self._report("; ".join(lines))
        for rank in silent:
            if now[rank][3] == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(now[rank][4], signal.SIGKILL)  # it would not react to torchrun's SIGTERM
        if self._rank in slowest:
            faulthandler.dump_traceback(all_threads=True)
        else:
            time.sleep(self._pause)  # torchrun ends all ranks with the first, so let the slowest one print before
        _kill_child_processes()
        os._exit(EXIT_HUNG)

    def _describe(self, rank: int, values: list, is_silent: bool) -> str:
        _, _, doing, host, pid = values
        state = "does not answer: stopped or lost" if is_silent else "is the furthest behind; its stack follows"
        where = f"rank {rank} (process {pid} on {host})"
        return f"no progress for {self._seconds:g} s: {where} {state}; last heard of: {doing}"


def _kill_child_processes() -> None:
    """Kill the processes that read data or save, which do not react to the SIGTERM of torchrun (async_writer.py)."""
    for child in multiprocessing.active_children():
        child.kill()

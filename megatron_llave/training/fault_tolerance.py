"""What a run does about trouble: requests to stop, steps that are not finite, ranks that hang or vanish.

`train` asks StopRequests and FiniteSteps once a step, and tells the Watchdog what it is doing.
"""

import faulthandler
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.batch import PairBatch
from megatron_llave.distributed.process_groups import device
from megatron_llave.errors import DivergedError
from megatron_llave.files import write_json
from megatron_llave.loss.contrastive import LossShare

logger = logging.getLogger(__name__)

STOP_FILE = "stop"
"""In the run's folder: save and stop. For whoever cannot send a signal to every rank."""
STATE_FILE = "state.json"
EXIT_STOPPED = 75
"""Status of a run that was stopped and saved before its end (EX_TEMPFAIL: try again later)."""
EXIT_HUNG = 76
"""Status of a rank that ended because some rank made no progress."""
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGUSR1: "SIGUSR1"}
REASONS = ("", *SIGNALS.values(), "train.time_limit_minutes", f"a file {STOP_FILE!r} in train.output")
PAIRS_NAMED = 20
"""Most pairs that a message names."""
BEATS_WATCHED = 3
"""For how many of its own beats a rank watches for those of others."""
GRACE = 1.5
"""After this many time limits a rank that cannot even run Python threads is ended by a C thread."""
STARTED = time.monotonic()
"""Of this process, nearly: what it loads next takes most of the time before the first step."""
_LOST = re.compile(r"onnection (closed|reset) by peer|onnection refused|Broken pipe|Socket Timeout|Timed out waiting")


class StopRequests:
    """Whether somebody wants the run to save and stop; all ranks agree on it at the same step."""

    def __init__(self, output: str | Path, time_limit_minutes: float | None) -> None:
        """Take over SIGTERM and SIGUSR1, and forget a stop file that an earlier run has obeyed."""
        self._file = Path(output) / STOP_FILE
        self._end = None if time_limit_minutes is None else STARTED + 60 * time_limit_minutes
        self._signal = ""
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        if dist.get_rank() == 0:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: object) -> None:
        self._signal = SIGNALS[signal.Signals(number)]

    def reason(self) -> str:
        """Why the run is to stop now, the same on all ranks; "" if it is not."""
        own = REASONS.index(self._signal)
        if dist.get_rank() == 0 and not own:
            if self._end is not None and time.monotonic() > self._end:
                own = 3
            elif self._file.exists():
                own = 4
        agreed = torch.tensor([own], device=device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return REASONS[agreed.item()]

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class FiniteSteps:
    """Notices steps whose loss or gradient is not finite, which are not to change the weights."""

    def __init__(self, most_in_a_row: int, groups: ProcessGroupCollection) -> None:
        """Allow `most_in_a_row` of them, one after the other."""
        self._most, self._groups = most_in_a_row, groups
        self._in_a_row = 0
        self.num_bad = 0
        """Of all steps so far."""

    def check(self, gradient_norm: float, shares: list[LossShare], batches: list[PairBatch], step: int) -> bool:
        """Whether the step is finite, the same on all ranks.

        Args:
            gradient_norm: of the whole gradient.
            shares: what the loss saw, on the last pipeline stage.
            batches: this rank's micro batches.
            step: from 0, for the message.

        Raises:
            DivergedError: too many in a row are not; names pairs that have no finite embedding.
        """
        is_finite = math.isfinite(gradient_norm) and all(loss.isfinite().item() for loss, _ in shares)
        is_bad = torch.tensor([int(not is_finite)], device=device())
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        if not is_bad.item():
            self._in_a_row = 0
            return True
        self.num_bad, self._in_a_row = self.num_bad + 1, self._in_a_row + 1
        offending = self._offending(shares, batches)
        pairs = f"no finite embedding have {', '.join(offending[:PAIRS_NAMED])}" if offending else "no pair stands out"
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
        """Keys of all ranks' pairs whose positive has no finite cosine."""
        own = []
        if shares:
            keys = [key for batch in batches for key in batch.keys]
            bad = ~torch.cat([statistics.positive for _, statistics in shares]).isfinite()
            own = [f"{batches[0].subset}/{key}" for key, is_bad in zip(keys, bad.tolist()) if is_bad]
        gathered: list[list[str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return sorted({key for part in gathered for key in part or []})


class Watchdog:
    """Ends the process when the run makes no progress, and says which rank is to blame.

    A thread on each rank writes down, in the store that the processes have joined through, that it is alive and what
    its rank is doing. When the own rank has done the same for too long, the one to blame is a rank that has stopped
    writing (it was stopped, or its machine is gone), or else the one that is furthest behind.
    """

    def __init__(self, seconds: float) -> None:
        """Start watching; a rank may do the same thing for at most `seconds`."""
        self._seconds = seconds
        self._pause = min(5.0, seconds / 8)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own: the training's may be busy waiting for the rank that hangs.
        self._store = dist.PrefixStore(f"watchdog-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store.clone())
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._beats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self.progress("starting")

    def progress(self, doing: str) -> None:
        """The rank has got on, and is now doing this."""
        self._count, self._doing, self._since = self._count + 1, doing, time.monotonic()
        faulthandler.dump_traceback_later(GRACE * self._seconds, exit=True)

    def close(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            with suppress(dist.DistError, RuntimeError):  # the store is gone with the rank that held it
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
        """Find out who is to blame, say so, and end the process."""
        try:
            before = self._read()
            for _ in range(BEATS_WATCHED):
                time.sleep(self._pause)
                self._write()  # the others are looking too
            now = self._read()
            silent = [rank for rank in now if now[rank][0] == before[rank][0] and rank != self._rank]
            behind = min(values[1] for rank, values in now.items() if rank not in silent)
            slowest = silent or [rank for rank, values in now.items() if values[1] == behind]
            is_first = self._store.add("verdict", 1) == 1
        except (dist.DistError, RuntimeError) as error:
            slowest, silent, now, is_first = [self._rank], [], {}, False
            print(f"error: the store of the processes does not answer ({error})", file=sys.stderr)
        if is_first:
            for rank in slowest:
                print(self._describe(rank, now[rank], rank in silent), file=sys.stderr, flush=True)
        for rank in silent:
            if now[rank][3] == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(now[rank][4], signal.SIGKILL)  # it would not hear torchrun's SIGTERM
        if self._rank in slowest:
            faulthandler.dump_traceback(all_threads=True)
        else:
            time.sleep(self._pause)  # torchrun ends all ranks with the first: the slowest is to speak before
        _leave_nobody_behind()
        os._exit(EXIT_HUNG)

    def _describe(self, rank: int, values: list, is_silent: bool) -> str:
        _, _, doing, host, pid = values
        state = "does not answer: stopped or lost" if is_silent else "is the furthest behind; its stack follows"
        where = f"rank {rank} (process {pid} on {host})"
        return f"error: no progress for {self._seconds:g} s: {where} {state}; last heard of: {doing}"


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Say in one line that another rank has gone, where torch says that a connection is closed."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        rank = os.environ.get("RANK", "0")
        print(f"error: rank {rank} lost another rank, which says why itself ({reason})", file=sys.stderr)
        sys.stderr.flush()
        _leave_nobody_behind()
        os._exit(1)  # leaving the process groups in order would wait for the one that is gone


def _leave_nobody_behind() -> None:
    """End the processes that read data or save; these do not hear the SIGTERM of torchrun (async_writer.py)."""
    for child in multiprocessing.active_children():
        child.kill()


def write_state(output: str | Path, state: str, step: int, reason: str = "") -> None:
    """Leave `running`, `stopped`, `finished` or `failed` in the run's folder, for the scripts that have started it."""
    file = Path(output) / STATE_FILE
    try:
        write_json(file, {"state": state, "step": step, "reason": reason}, only_writer=True)
    except OSError as error:
        logger.warning("%s cannot be written: %s; the run is %s", file, error.strerror, state)

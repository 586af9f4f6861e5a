"""Saves a run's checkpoints, asynchronously if the configuration says so, and survives failures of disks and writers.

    writer.save(step, state.to_save(step), position)     starts a save; the tensors may change as soon as it returns
    writer.poll()                                        called once per step; makes a finished save the current one

When a save fails (full disk, killed writer), all ranks learn of it together, training continues, and the previous
checkpoint stays current.
"""

import inspect
import logging
import math
import os
import pickle
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.state import state_metadata
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.refreshed_negatives import unmined
from megatron_llave.distributed.collectives import largest_of_ranks
from megatron_llave.errors import one_line
from megatron_llave.processes import SIGNALS

logger = logging.getLogger(__name__)

RESERVE = "reserve"
RESERVE_BYTES = 16 << 20
"""Bytes reserved on the disk for the metadata. The first rank writes it last, when the other ranks could no longer
learn that the disk is full."""
POLL_SECONDS = 0.05
LOOK_SECONDS = 1.0
"""Seconds between two looks at the sizes of the files, which on a cluster are requests to a file server."""


@dataclass
class _Save:
    """A save that has started and is not finished."""

    step: int
    partial: Path
    request: AsyncRequest
    caller: TemporalAsyncCaller
    started: float


class CheckpointWriter:
    """Saves the checkpoints of a run, one at a time. Every rank calls the same methods at the same steps."""

    def __init__(
        self, cfg: RunConfig, groups: ProcessGroupCollection, progress: Callable[[str], None] = lambda doing: None
    ) -> None:
        """`progress` is called with a line of text whenever a checkpoint that is waited for has grown."""
        self._cfg, self._groups, self._progress = cfg, groups, progress
        self._current: _Save | None = None
        self.last: Path | None = None
        """Folder of the last checkpoint that became current."""

    @property
    def saving(self) -> int | None:
        """Steps done in the checkpoint that is being written; None: no checkpoint is."""
        return self._current and self._current.step

    def save(self, step: int, state: dict, position: dict | None) -> bool:
        """Start to save a checkpoint, after waiting for one that is still being written.

        Args:
            step: steps done.
            state: the sharded state dict (TrainingState.to_save).
            position: where the data stands after these steps (data/pipeline.py).

        Returns:
            Whether the save has started. If not, the first rank has logged the reason.
        """
        self.poll(wait=True)
        started = time.perf_counter()
        partial = folders.step_folder(self._cfg.train.output, step).with_suffix(".partial")
        if not self._agree(self._begin(partial, position), partial):
            return False
        metadata = state_metadata(self._groups)
        metadata.pop("dp_cp_group")
        strategy = get_default_save_sharded_strategy("torch_dist")
        if self._groups.dp_cp.size() > 1:  # each data-parallel rank writes a part, instead of the first one everything
            strategy = FullyParallelSaveStrategyWrapper(strategy, self._groups.dp_cp, False)
        options = {"async_sharded_save": True, "content_metadata": metadata, **_own_writer()}
        filesystem_async._results_queue = _Reports()
        with _block_stop_signals():
            request = dist_checkpointing.save(state, str(partial), strategy, **options)
        caller = TemporalAsyncCaller()
        with _block_stop_signals():
            caller.schedule_async_call(_copied_to_pageable_memory(request)._replace(finalize_fns=[]))
        self._current = _Save(step, partial, request, caller, started)
        if not self._cfg.checkpoint.asynchronous:
            self.poll(wait=True)
        return True

    def poll(self, wait: bool = False) -> bool:
        """Make the checkpoint that is being saved the current one, if all ranks have written their part.

        Args:
            wait: wait until they have.

        Returns:
            Whether a checkpoint became current in this call.
        """
        current = self._current
        if current is None:
            return False
        process, size, looked = current.caller.process, -1, -math.inf
        while True:
            is_busy = process is not None and process.is_alive()
            has_failed = process is not None and not is_busy and process.exitcode != 0
            is_busy, has_failed = largest_of_ranks(is_busy, has_failed)
            if not is_busy:
                break
            if not wait:
                return False
            if time.monotonic() - looked > LOOK_SECONDS:
                looked, before, size = time.monotonic(), size, _bytes_in(current.partial)
                if size != before:
                    self._progress(f"waiting for the checkpoint of step {current.step}")
            time.sleep(POLL_SECONDS)
        self._current = None
        current.caller.close()
        failure = "a process that wrote it was killed" if has_failed else ""
        if not failure and dist.get_rank() == 0 and not current.partial.is_dir():
            failure = "somebody has removed it"
        if not self._agree(failure, current.partial):
            return False
        if not self._agree(self._finalize(current), current.partial):
            return False
        if not self._agree(self._finish(current), current.partial):
            return False
        self.last = folders.step_folder(self._cfg.train.output, current.step)
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - current.started
            logger.info("checkpoint %s is current, %.1f s after its save began", self.last, seconds)
        return True

    def _begin(self, partial: Path, position: dict | None) -> str:
        if dist.get_rank() > 0:
            return ""
        try:
            folders.begin(partial, self._cfg, position)
            with open(partial / RESERVE, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            return str(error.strerror or error)
        return ""

    def _finalize(self, current: _Save) -> str:
        """Run megatron-core's own last steps, which tell all ranks when a part could not be written."""
        if dist.get_rank() == 0:
            (current.partial / RESERVE).unlink(missing_ok=True)
        try:
            for finalize in current.request.finalize_fns:
                finalize()
        except CheckpointException as error:
            return _reason(folders.failure(error), current.partial) if error.failures else "another rank says why"
        return ""

    def _finish(self, current: _Save) -> str:
        if dist.get_rank() > 0:
            return ""
        output, kept = self._cfg.train.output, self._cfg.checkpoint
        try:
            final = folders.step_folder(output, current.step)
            folders.finish(current.partial, final, current.step, layout(self._groups, self._cfg))
        except OSError as error:
            return str(error.strerror or error)
        try:
            # Also what only a resumed run with more train.steps mines, which could not begin without it.
            to_mine = unmined(output, self._cfg.mining.interval, current.step)
            folders.remove_old(output, kept.keep_last, kept.keep_every, to_mine)
        except OSError as error:
            logger.warning("old checkpoints in %s cannot be removed: %s", output, error)
        return ""

    def _agree(self, failure: str, partial: Path) -> bool:
        """Whether no rank has failed. The rank that knows of a failure logs it; the first removes the folder."""
        [has_failed] = largest_of_ranks(bool(failure))
        if not has_failed:
            return True
        if failure and (dist.get_rank() == 0 or "another rank" not in failure):
            logger.error("checkpoint %s could not be saved: %s; the one before stays current", partial, failure)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return False


def _bytes_in(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):  # somebody has removed the folder: the save will fail
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # renamed meanwhile
                total += entry.stat().st_size
    return total


def _reason(error: BaseException, folder: Path) -> str:
    """Why a part could not be written. torch's zip writer hides the reason of the system, so try to write again."""
    text = one_line(error)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, 4 * RESERVE_BYTES)  # beyond the reserve, which is free again
    except OSError as cause:
        return f"{cause.strerror} ({text})"
    return text


def layout(groups: ProcessGroupCollection, cfg: RunConfig) -> dict[str, int]:
    """The parallel layout, for the manifest."""
    names = {"tensor": groups.tp, "context": groups.cp, "pipeline": groups.pp, "data": groups.dp}
    return {name: group.size() for name, group in names.items()} | {"chunks": cfg.parallel.virtual_pipeline}


@contextmanager
def _block_stop_signals() -> Iterator[None]:
    """Block stop signals in processes that are started inside: torchrun sends them there too and would end the save."""
    resource_tracker.ensure_running()  # starting it would unblock SIGTERM again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


class _Reports:
    """What the writers report to the process that has forked them, in a file in memory that they share.

    It replaces megatron-core's queue, which a process of its own keeps (dist_checkpointing/strategies/
    filesystem_async.py): starting that one delays the first checkpoint, it takes 20 to 300 MB per rank, and it outlives
    a killed rank. Only this run's own writers fill the file, so nothing from elsewhere is unpickled.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("reports"), "w+b", buffering=0)

    def put(self, report: object) -> None:
        self._file.write(pickle.dumps(report))

    def get_nowait(self) -> object:
        self._file.seek(0)  # a fork shares the position
        report = self._file.read()
        if not report:
            raise queue.Empty
        return pickle.loads(report)


def _copied_to_pageable_memory(request: AsyncRequest) -> AsyncRequest:
    """Copy tensors of a GPU to memory that ends with the save and that the writers, as forks, have to themselves.

    megatron-core copies them to pinned memory. torch rounds its blocks up to powers of two and never gives them back,
    and 0.16.1 frees them while the writers still read them, so that the next pinned batch could overwrite them.
    """
    if request.preload_fn is None:  # this rank writes nothing
        return request
    buckets = request.async_fn_args[1]
    return request._replace(preload_fn=partial(FileSystemWriterAsync.preload_tensors, buckets, non_blocking=False))


def _own_writer() -> dict[str, str]:
    """Choose megatron-core's own writer: 0.19 prefers that of another package, and 0.16.1 has no such argument."""
    knows = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if knows else {}

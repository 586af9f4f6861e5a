"""Worker processes that end with their parent, for the sources that write many shards at a time."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

MOST_WORKERS = 1024
"""The largest number of processes that a source may be given."""


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """Yield an executor with worker processes, or None if `workers` is 1 and this process is to do the work."""
    if workers == 1:
        yield None
        return
    # The workers are forks of one process that loads the package once; each would take four seconds for that.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(__package__)])
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when its parent ends; it could otherwise write into a folder that a new run is filling.

    Ctrl-C is for the parent, which ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_in_order(
    executor: Executor | None, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int
) -> Iterator[Result]:
    """Yield the results in the order of the jobs, of which at most `ahead` are submitted before their turn.

    `executor.map` would take all jobs first, and these need not fit into memory.

    Raises:
        BrokenProcessPool: a worker was killed.
    """
    if executor is None:
        yield from map(function, jobs)
        return
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(executor.submit(function, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

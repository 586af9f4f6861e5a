"""What is asked of processes: that they start fast, that those of a run end together and give freed memory back.

Ranks end after their launcher, and forks with the rank that has made them: nothing of a run may go on alone after a
`kill -9`. A rank cannot be told of the end of torchrun, so it looks for it. A fork (a process that reads data or saves)
is killed by the kernel when its parent ends.
"""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask a run to save and stop."""
SECONDS_TO_SAVE = 45
"""How long a rank may take to save after the end of its launcher."""
EXIT_ALONE = 79
"""Exit status of a rank that could not save in this time."""
LOOK_SECONDS = 1.0
RETURNED_BYTES = 2**17  # with which glibc begins, before it goes up by itself
"""The smallest block of memory that `return_freed_tensors` is about."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@cache
def end_forks_with_parent() -> None:
    """Let the kernel kill each process that is forked from now on when the process that has forked it ends.

    It is for forks that are made by the main thread, since the kernel looks at the thread. It does nothing where there
    is no Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    libc, parents = ctypes.CDLL(None), [0]

    def note_parent() -> None:
        parents[0] = os.getpid()

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parents[0]:  # it has ended meanwhile
            os._exit(EXIT_ALONE)

    os.register_at_fork(before=note_parent, after_in_child=tie)


@cache
def _launcher() -> int:
    return os.getppid()


def launcher_is_gone() -> bool:
    """Whether torchrun has ended since `end_with_launcher` was called; False without torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _launcher()


@cache
def end_with_launcher(seconds_to_save: int = 0) -> None:
    """Start a thread that ends this rank `seconds_to_save` after torchrun has ended, if it has not ended by itself."""
    launcher = _launcher()

    def watch() -> None:
        while not launcher_is_gone():
            time.sleep(LOOK_SECONDS)
        if os.environ.get("LOCAL_RANK") == "0":
            end = f"the run saves and ends within {seconds_to_save} s" if seconds_to_save else "its ranks end"
            print(f"error: torchrun (process {launcher}) is gone; {end}", file=sys.stderr, flush=True)
        time.sleep(seconds_to_save)
        os._exit(EXIT_ALONE)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, name="launcher", daemon=True).start()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause Python's garbage collector while modules are imported: they leave no garbage, but millions of objects.

    Of the 2.8 s of CPU for the import of megatron_llave.embedding, the collector took 0.9 s.
    """
    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()  # makes all objects old ones; as new ones they would all be looked at now
            if frozen == 0:
                gc.unfreeze()
            gc.enable()


def return_freed_tensors() -> None:
    """Let malloc give every block of at least RETURNED_BYTES back to the system when it is freed, here and in forks.

    Otherwise glibc keeps blocks up to the size of the largest one that was ever freed, and tensors of many sizes leave
    gaps between them, so that a process grows with the number of micro batches. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, RETURNED_BYTES)

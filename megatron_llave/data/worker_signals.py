"""Which signals reach the worker processes that read data ahead (pipeline.py), and which of theirs reach training."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from torch.utils.data import DataLoader

from megatron_llave.processes import SIGNALS


def ignore_torchrun_signals(worker: int) -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGINT from anybody but the parent; the `worker_init_fn` of a DataLoader.

    torchrun or the terminal sends these signals to all processes, but the training still needs the steps that it has
    asked for. The parent's SIGTERM ends the worker, as before.
    """
    signals = set(SIGNALS)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads that are started from now on inherit it

    def obey_parent() -> None:
        parent = multiprocessing.parent_process().pid
        while signal.sigwaitinfo(signals).si_pid != parent:
            continue
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=obey_parent, daemon=True).start()


def start_workers(loader: DataLoader) -> Iterator:
    """Start the loader's workers so that a killed worker is only reported when its next step is asked for.

    torch would otherwise raise from a handler of SIGCHLD, in the middle of whatever the training is doing.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    steps = iter(loader)
    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler, torch included
        signal.signal(signal.SIGCHLD, handler)
    return steps

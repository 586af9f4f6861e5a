"""Locks on folders, so that two processes never write into the same one: a run's output directory, shards, reports.

The process that writes into a folder holds the file `.writer.json` in it, which names its machine, process and job, and
touches the file every HEARTBEAT_SECONDS. Two things tell whether that process lives:

- `flock` on the file. The kernel releases it when the process and its forks have ended, however they end. On one
  machine that is the truth, and nobody has to wait.
- The time of the last touch. On network file systems `flock` may be missing or may hold on one machine alone (NFS with
  `nolock` or `local_lock`, Lustre with `localflock`). So a writer on another machine counts as alive until its file has
  not been touched for STALE_SECONDS, by the clock of the file server.

The file is made by a hard link, which is atomic on network file systems too, and is removed when the writer ends in
order. A process number alone would not do: containers on one machine have numbers of their own.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from megatron_llave.errors import DataError
from megatron_llave.files import read_json

logger = logging.getLogger(__name__)

WRITER_FILE = ".writer.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
REQUEUE_SECONDS = 600.0
"""How long a job that its scheduler has requeued waits for its earlier start, which may still be saving."""
POLL_SECONDS = 0.5
EXIT_TAKEN_OVER = 78
"""Exit status of a process whose folder another one has taken over."""
JOBS = {"SLURM_JOB_ID": "SLURM_RESTART_COUNT", "PBS_JOBID": "", "LSB_JOBID": ""}
"""Variables with the number of a job -> with how often its scheduler has started it again."""


@contextmanager
def lock_folder(directory: str | Path, name: str = "") -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made when it is missing.

    Args:
        directory: the folder. One that was made, and in which nothing was written, is removed at the end.
        name: what messages call it; default: "folder DIRECTORY".

    Raises:
        DataError: the folder cannot be made or written into, or another process is writing into it; the message names
            that process, its machine, its job and when it started.
    """
    directory, name = Path(directory), name or f"folder {directory}"
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{name} cannot be made: {error.strerror}; choose another") from error
    try:
        descriptor, record = _acquire(directory, name)
    except OSError as error:
        raise DataError(f"{name} cannot be written into: {error.strerror}; choose another") from error
    ended = threading.Event()
    beat = threading.Thread(target=_keep, args=(directory, record, ended), name="folder lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with suppress(OSError):  # the folder has been removed meanwhile
            if _read(directory) == record:
                (directory / WRITER_FILE).unlink()
            if is_new:
                directory.rmdir()  # fails unless it is empty
        os.close(descriptor)


def is_locked(directory: str | Path) -> bool:
    """Whether a live process is writing into the folder; one on another machine is if it has touched it lately."""
    directory = Path(directory)
    try:
        descriptor = os.open(directory / WRITER_FILE, os.O_RDONLY)  # for who may not write there
    except OSError:
        return False
    try:
        return _look(directory, descriptor, _read(directory)) is not _Holder.GONE
    finally:
        os.close(descriptor)


class _Holder(Enum):
    """What is known about the process that holds a lock."""

    LIVES = "lives"
    ENDING = "is gone, but its forks still hold the lock"
    SILENT = "is on another machine and may live"
    GONE = "is gone"


def _acquire(directory: Path, name: str) -> tuple[int, dict[str, Any]]:
    """Take the lock; returns the descriptor that holds it, and the record that says whose it is."""
    record, path = _describe(), directory / WRITER_FILE
    deadline, touched = None, 0
    while True:
        descriptor = _create(directory, record)
        if descriptor is not None:
            return descriptor, record
        with suppress(FileNotFoundError):  # removed just now
            descriptor = os.open(path, os.O_RDWR)
            holder, last_touch = _read(directory), os.fstat(descriptor).st_mtime_ns
            state = _look(directory, descriptor, holder)
            if state is _Holder.GONE and _take_over(descriptor, directory, record):
                logger.warning("%s: taking over from %s, which is gone", name, _named(holder))
                return descriptor, record
            os.close(descriptor)
            is_earlier_start = _is_earlier_start(holder, record)
            if deadline is None and state is not _Holder.GONE:
                deadline = time.monotonic() + (REQUEUE_SECONDS if is_earlier_start else STALE_SECONDS)
                touched = last_touch
                if is_earlier_start or state is not _Holder.LIVES:
                    logger.warning("%s: waiting for the end of %s", name, _named(holder))
            lives = state is _Holder.LIVES or state is _Holder.SILENT and last_touch != touched
            # A file that nobody touches decides by its age alone, by the file server's clock: its writer is gone then.
            is_late = deadline is not None and time.monotonic() > deadline and (lives or state is _Holder.ENDING)
            if is_late or lives and not is_earlier_start:
                hint = "wait for its end, or choose another folder"
                raise DataError(f"another process is writing into {directory}: {_named(holder)}; {hint}")
        time.sleep(POLL_SECONDS)


def _look(directory: Path, descriptor: int, holder: dict[str, Any]) -> _Holder:
    """Find out whether the holder lives. If it is gone, `descriptor` has the lock afterwards, where there are locks."""
    is_here = holder.get("boot") == _boot()
    can_be_seen = is_here and holder.get("space") == _space()
    has_locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Holder.ENDING if can_be_seen and not _runs(holder) else _Holder.LIVES
    except OSError:
        has_locks = False
    if is_here and has_locks:
        return _Holder.GONE
    if can_be_seen:
        return _Holder.LIVES if _runs(holder) else _Holder.GONE
    age = _now(directory) - os.fstat(descriptor).st_mtime
    return _Holder.GONE if age > STALE_SECONDS else _Holder.SILENT


def _now(directory: Path) -> float:
    """The time by the clock of the file server, or by one's own where one may not write."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _create(directory: Path, record: dict[str, Any]) -> int | None:
    """Make the file, with its content and locked from its first moment on; None if there is one."""
    path = directory / WRITER_FILE
    temporary = path.with_name(f"{path.name}.{record['token']}.partial")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _fill(descriptor, record)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            os.link(temporary, path)
            return descriptor
        except FileExistsError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without hard links
            if path.exists():
                os.close(descriptor)
                return None
            os.rename(temporary, path)
            return descriptor
    finally:
        temporary.unlink(missing_ok=True)


def _take_over(descriptor: int, directory: Path, record: dict[str, Any]) -> bool:
    """Put the own record into the file of a process that is gone; False if another process was faster."""
    if os.fstat(descriptor).st_ino != (directory / WRITER_FILE).stat().st_ino:
        return False
    is_here = _read(directory).get("boot") == record["boot"]
    _fill(descriptor, record)
    if not is_here:  # locks may hold on one machine alone, so another one may be taking over at the same time
        time.sleep(2 * POLL_SECONDS)
    return _read(directory) == record


def _fill(descriptor: int, record: dict[str, Any]) -> None:
    content = json.dumps(record).encode()
    os.ftruncate(descriptor, 0)
    if os.pwrite(descriptor, content, 0) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(directory: Path) -> dict[str, Any]:
    """The record of the writer; an empty one if it is damaged or missing."""
    try:
        return read_json(directory / WRITER_FILE)
    except DataError:
        return {}


def _keep(directory: Path, record: dict[str, Any], ended: threading.Event) -> None:
    """Touch the file until `ended`; end this process if another one has taken over, as after a long suspension."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # the folder has been removed, or the file server does not answer
            now = _read(directory)
            if now == record:
                os.utime(directory / WRITER_FILE)
            elif not now:  # somebody has removed the folder, and it has been made again
                _create(directory, record)
            else:
                print(f"error: {directory}: {_named(now)} has taken over; this process ends", file=sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_TAKEN_OVER)


def _describe() -> dict[str, Any]:
    [job] = [name for name in JOBS if name in os.environ][:1] or [""]
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "boot": _boot(),
        "space": _space(),
        "job": os.environ.get(job, ""),
        "start": os.environ.get(JOBS.get(job, ""), "0"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": secrets.token_hex(8),
    }


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    job = f", job {holder.get('job')}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, started {holder.get('since')}"


def _boot() -> str:
    """What tells machines apart, also those with the same name; it changes when a machine is started again."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else socket.gethostname()


def _space() -> str:
    """What tells containers on one machine apart, each of which has process numbers of its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _runs(holder: dict[str, Any]) -> bool:
    """Whether the process of this machine runs; another process may have its number by now."""
    try:
        process = psutil.Process(holder["pid"])
        return abs(process.create_time() - holder["born"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _is_earlier_start(holder: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the holder is an earlier start of this job, which the scheduler has put into its queue again."""
    return bool(record["job"]) and holder.get("job") == record["job"] and holder.get("start") != record["start"]

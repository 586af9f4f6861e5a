"""Fetches shards from where `data.path` says they are; shards on the network are copied to the local disk once.

`data.path` is a folder, `http(s)://host/folder`, or `pipe:COMMAND` in which `{file}` stands for the name of the shard,
such as `pipe:aws s3 cp s3://bucket/pairs/{file} -`. These are the URLs that webdataset can open. The shell runs the
command, which comes from the run's configuration alone. The index may only name plain files.

Copies are in a folder that belongs to this user alone: whoever could write there could put other pairs into a training,
or links that make this process overwrite another file. Links are not followed, and each process compares the SHA-256 of
a copy with the index before it reads it for the first time.
"""

import fcntl
import hashlib
import logging
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from webdataset.gopen import gopen

from megatron_llave.config.data import REMOTE, DataConfig
from megatron_llave.data.index import FILE_NAME, INDEX_FILE, Index, Shard, check_size, parse_index, read_index
from megatron_llave.errors import ConfigError, DataError, UserError
from megatron_llave.files import AGAIN, atomic_write

logger = logging.getLogger(__name__)
Contents = TypeVar("Contents")

CHUNK = 1 << 20
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each further attempt waits twice as long."""


class Unreachable(UserError):
    """The network failed at every attempt. The data are not at fault, so no pairs are dropped because of it."""


@dataclass(frozen=True)
class Storage:
    """A folder, or a place on the network, with shards and their index."""

    path: str
    cache: Path | None
    """Folder for copies of shards; None: `path` is a folder, and shards are not copied."""
    cache_bytes: int = 0
    """The least recently used copies are removed while all copies together have more bytes than this."""
    retries: int = 0
    """Number of further attempts after a network failure."""
    wait: Callable[[float], None] = time.sleep

    def read_index(self) -> Index:
        """Read the index; `check` compares the sizes of shards in a folder with it.

        Raises:
            DataError: the index is missing or malformed.
            Unreachable: the index cannot be fetched.
        """
        if self.cache is None:
            return read_index(self.path, check_shards=False)
        return self.read(INDEX_FILE, parse_index)

    def read(self, name: str, parse: Callable[[Path, str], Contents]) -> Contents:
        """Return what `parse` makes of a small file, which is fetched for it; it gets the file and where it came from.

        Raises:
            DataError: the file is missing or malformed.
            Unreachable: the file cannot be fetched.
        """
        if self.cache is None:
            return parse(Path(self.path) / name, str(Path(self.path) / name))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            self._attempt(name, lambda: _download(self._url(name), file))
            return parse(file, self._url(name))

    def check(self, shard: Shard) -> None:
        """Check that a shard in a folder exists and has the right size; a shard on the network is checked by `fetch`.

        Raises:
            DataError: the shard is missing or has another size.
        """
        if self.cache is None:
            check_size(Path(self.path), shard)

    def fetch(self, shard: Shard) -> Path:
        """Return the shard as a local file, after copying it from the network once for all processes of the cache.

        Raises:
            DataError: the copy is not what the index says.
            Unreachable: the shard cannot be fetched.
        """
        if self.cache is None:
            return Path(self.path) / shard.file
        self._url(shard.file)  # refuses a name that is not plain
        target = self._folder() / shard.file
        with _locked(target.with_name(f"{shard.file}.lock")):
            if not _is_copy(target, shard):
                target.unlink(missing_ok=True)
                self._attempt(shard.file, lambda: self._copy(shard, target))
                self._make_room(target)
        now = time.time_ns()
        os.utime(target, ns=(now, now))  # finer than the file system's own clock
        return target

    def _folder(self) -> Path:
        folder = self.cache / hashlib.sha256(self.path.encode()).hexdigest()[:16]
        try:
            self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.cache == _default_cache():
                _require_private(self.cache)
            folder.mkdir(mode=0o700, exist_ok=True)
            _require_private(folder)
        except OSError as error:
            raise ConfigError(f"data.cache={self.cache} cannot be made: {error.strerror}; choose another") from error
        return folder

    def _url(self, file: str) -> str:
        if not FILE_NAME.fullmatch(file):
            raise DataError(f"{self.path}: the index names {file!r}, which is no plain file name")
        if self.path.startswith("pipe:"):
            return self.path.replace("{file}", file)
        return f"{self.path.rstrip('/')}/{file}"

    def _copy(self, shard: Shard, target: Path) -> None:
        url = self._url(shard.file)
        with atomic_write(target, only_writer=True) as temporary:
            if _download(url, temporary) != shard.sha256:
                size = temporary.stat().st_size
                raise DataError(f"{url}: {size} bytes came, not the {shard.bytes} of the index; {AGAIN}")

    def _attempt(self, file: str, fetch: Callable[[], object]) -> None:
        for attempt in range(self.retries + 1):
            try:
                fetch()
                return
            except (OSError, DataError, subprocess.SubprocessError) as error:
                reason = error
            if attempt < self.retries:
                self.wait(FIRST_WAIT * 2**attempt)
        kind = DataError if isinstance(reason, DataError) else Unreachable
        raise kind(f"{self._url(file)} cannot be fetched, after {self.retries + 1} attempts: {reason}") from reason

    def _make_room(self, newest: Path) -> None:
        copies = []
        for file in newest.parent.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process is removing copies too
                copies.append((file.lstat().st_mtime, file.lstat().st_size, file))
        excess = sum(size for _, size, _ in copies) - self.cache_bytes
        for _, size, file in sorted(copies):
            if excess > 0 and file != newest:
                file.unlink(missing_ok=True)  # a process that reads it keeps it open
                excess -= size


def _download(url: str, target: Path) -> str:
    """Write the contents of `url` to a new file `target` and return their SHA-256.

    Raises:
        OSError: `url` cannot be read, or the disk is full.
    """
    digest = hashlib.sha256()
    target.unlink(missing_ok=True)  # what a killed process has left, or a link
    with gopen(url, bufsize=CHUNK) as source, open(target, "xb") as file:
        while block := source.read(CHUNK):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def open_storage(cfg: DataConfig, path: str | None = None, key: str = "data.path") -> Storage:
    """Return the storage that `data.path` names, or that `path` does, the value of another key.

    Raises:
        ConfigError: it is a command without {file}.
    """
    path = cfg.path if path is None else path
    if not REMOTE.match(path):
        return Storage(path, None)
    if path.startswith("pipe:") and "{file}" not in path:
        raise ConfigError(f"{key}={path} must say where the name of the shard goes: {{file}}")
    if not cfg.cache and os.path.lexists(_default_cache()):
        _require_private(_default_cache())
    cache = Path(cfg.cache) if cfg.cache else _default_cache()
    return Storage(path, cache, int(cfg.cache_gb * 1e9), cfg.retries)


def _default_cache() -> Path:
    """Return a folder in the system's temporary folder, where every user may have made it, so that it is checked."""
    return Path(tempfile.gettempdir()) / f"megatron_llave-{os.getuid()}"


def _require_private(folder: Path) -> None:
    """Refuse a folder for copies that is a link or belongs to somebody else; take its permissions from all others.

    Raises:
        ConfigError: names the folder.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        what = (
            f"belongs to user {status.st_uid}" if stat.S_ISDIR(status.st_mode) else "is not a folder but a link or file"
        )
        raise ConfigError(f"{folder} {what}: copies of shards need a folder of your own; set data.cache to one")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock a file, which is made if it is missing; a link is not followed.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{file} cannot be opened: {error.strerror}; set data.cache to another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when this process ends, however it ends
        yield
    finally:
        os.close(descriptor)


_compared: set[tuple[int, int, int, str]] = set()
"""Device, inode, size and SHA-256 of the copies that this process has compared with the index."""


def _is_copy(file: Path, shard: Shard) -> bool:
    """Whether a file is a complete copy of a shard. Its SHA-256 is computed once in each process."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as copy:
            status = os.fstat(copy.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size != shard.bytes:
                return False
            key = (status.st_dev, status.st_ino, status.st_size, shard.sha256)
            if key not in _compared:
                digest = hashlib.sha256()
                while block := copy.read(CHUNK):
                    digest.update(block)
                if digest.hexdigest() != shard.sha256:
                    logger.warning("%s is not what the index says; it is fetched again", file)
                    return False
                _compared.add(key)
            return True
    except OSError:  # it is missing, or a link
        return False

"""Fetches shards from where `data.path` says they are; shards on the network are copied to the local disk once.

`data.path` is a folder, `http(s)://host/folder`, or `pipe:COMMAND` in which `{file}` stands for the name of the shard,
such as `pipe:aws s3 cp s3://bucket/pairs/{file} -`. These are the URLs that webdataset can open. The shell runs the
command, which comes from the run's configuration alone. The index may only name plain files.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from webdataset.gopen import gopen

from megatron_llave.config.schema import DataConfig
from megatron_llave.data.index import INDEX_FILE, Index, Shard, check_size, parse_index, read_index
from megatron_llave.errors import ConfigError, DataError, UserError
from megatron_llave.files import AGAIN, atomic_write

REMOTE = re.compile(r"(https?://|pipe:)")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
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
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / INDEX_FILE
            self._attempt(INDEX_FILE, lambda: _download(self._url(INDEX_FILE), file))
            return parse_index(file, self._url(INDEX_FILE))

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
        with open(target.with_name(f"{shard.file}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when this process ends, however it ends
            if not target.is_file():
                self._attempt(shard.file, lambda: self._copy(shard, target))
                self._make_room(target)
        now = time.time_ns()
        os.utime(target, ns=(now, now))  # finer than the file system's own clock
        return target

    def _folder(self) -> Path:
        folder = self.cache / hashlib.sha256(self.path.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
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
                copies.append((file.stat().st_mtime, file.stat().st_size, file))
        excess = sum(size for _, size, _ in copies) - self.cache_bytes
        for _, size, file in sorted(copies):
            if excess > 0 and file != newest:
                file.unlink(missing_ok=True)  # a process that reads it keeps it open
                excess -= size


def _download(url: str, target: Path) -> str:
    """Write the contents of `url` to `target` and return their SHA-256.

    Raises:
        OSError: `url` cannot be read, or the disk is full.
    """
    digest = hashlib.sha256()
    with gopen(url, bufsize=CHUNK) as source, open(target, "wb") as file:
        while block := source.read(CHUNK):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def open_storage(cfg: DataConfig) -> Storage:
    """Return the storage that `data.path` names.

    Raises:
        ConfigError: `data.path` is a command without {file}.
    """
    if not REMOTE.match(cfg.path):
        return Storage(cfg.path, None)
    if cfg.path.startswith("pipe:") and "{file}" not in cfg.path:
        raise ConfigError(f"data.path={cfg.path} must say where the name of the shard goes: {{file}}")
    cache = Path(cfg.cache) if cfg.cache else Path(tempfile.gettempdir()) / f"megatron_llave-{os.getuid()}"
    return Storage(cfg.path, cache, int(cfg.cache_gb * 1e9), cfg.retries)

"""Where shards are: a folder, or a place on the network of which each shard is copied to the local disk once.

`data.path` is a folder, `http(s)://host/folder`, or `pipe:COMMAND` in which `{file}` stands for the name of the shard,
such as `pipe:aws s3 cp s3://bucket/pairs/{file} -`: webdataset's own ways to open a URL. A command is run by the shell
and is taken from the run's configuration alone; names of files come from the index and are plain names.
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
"""Seconds before the second attempt; each further one waits twice as long."""


class Unreachable(UserError):
    """The network failed, however often it was tried: no fault of the data, so nothing to be left out and counted."""


@dataclass(frozen=True)
class Storage:
    """A place with shards and their index."""

    path: str
    cache: Path | None
    """Folder for copies of shards; None: `path` is a folder, which needs none."""
    cache_bytes: int = 0
    """Copies are removed, the least recently used first, while they are more than this."""
    retries: int = 0
    """Further attempts when the network fails."""
    wait: Callable[[float], None] = time.sleep

    def read_index(self) -> Index:
        """The index; the sizes of shards in a folder are left to `check`.

        Raises:
            DataError: it is missing or malformed.
            Unreachable: it cannot be fetched.
        """
        if self.cache is None:
            return read_index(self.path, check_shards=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / INDEX_FILE
            self._attempt(INDEX_FILE, lambda: _download(self._url(INDEX_FILE), file))
            return parse_index(file, self._url(INDEX_FILE))

    def check(self, shard: Shard) -> None:
        """What can be known about a shard before it is read: in a folder, that it is there and of the right size.

        Raises:
            DataError: it is not.
        """
        if self.cache is None:
            check_size(Path(self.path), shard)

    def fetch(self, shard: Shard) -> Path:
        """The shard as a local file, copied first where it is not: once for all processes that share the cache.

        Raises:
            DataError: what comes is not what the index says.
            Unreachable: nothing comes.
        """
        if self.cache is None:
            return Path(self.path) / shard.file
        self._url(shard.file)  # refuses what is no plain name
        target = self._folder() / shard.file
        with open(target.with_name(f"{shard.file}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when this process ends, however it does
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
        held = []
        for file in newest.parent.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process makes room too
                held.append((file.stat().st_mtime, file.stat().st_size, file))
        excess = sum(size for _, size, _ in held) - self.cache_bytes
        for _, size, file in sorted(held):
            if excess > 0 and file != newest:
                file.unlink(missing_ok=True)  # whoever reads it keeps it open
                excess -= size


def _download(url: str, target: Path) -> str:
    """Write what comes from `url` and return its SHA-256.

    Raises:
        OSError: nothing comes, or the disk is full.
    """
    digest = hashlib.sha256()
    with gopen(url, bufsize=CHUNK) as source, open(target, "wb") as file:
        while block := source.read(CHUNK):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def open_storage(cfg: DataConfig) -> Storage:
    """The storage that `data.path` names.

    Raises:
        ConfigError: a command without {file}.
    """
    if not REMOTE.match(cfg.path):
        return Storage(cfg.path, None)
    if cfg.path.startswith("pipe:") and "{file}" not in cfg.path:
        raise ConfigError(f"data.path={cfg.path} must say where the name of the shard goes: {{file}}")
    cache = Path(cfg.cache) if cfg.cache else Path(tempfile.gettempdir()) / f"megatron_llave-{os.getuid()}"
    return Storage(cfg.path, cache, int(cfg.cache_gb * 1e9), cfg.retries)

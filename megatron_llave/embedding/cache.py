"""Embeddings of a data set's inputs, in parts: on disk, where a stopped evaluation finds them again, or in memory.

A folder holds manifest.json (which model, which inputs, and the state of each part's files) and part-00000.npy ...,
float32 [inputs of the part, d] with a checksum behind it, so that a part that was changed is embedded again. Folders of
earlier versions have no checksums, which their manifest shows: their parts are read if they have the right shape and
are finite. A part is complete or absent. How inputs are cut into parts does not depend on the number of ranks, so that
an evaluation resumes at any parallel layout.
"""

import hashlib
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import Side
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed.collectives import from_all_ranks, from_first_rank
from megatron_llave.embedding.embedder import require_finite
from megatron_llave.embedding.inputs import Inputs
from megatron_llave.errors import DataError
from megatron_llave.files import VERSION, atomic_write, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT = "megatron_llave embeddings"
MANIFEST = "manifest.json"
PART_COST = 512
"""Cost of a part's inputs together (Input.cost): about 56 inputs with an image, or 512 short texts."""

OPEN_PARTS = 256
"""Number of parts of a folder that are open at a time; each takes a file descriptor."""
CHECKSUMS = "checksums"
"""Key of a manifest whose parts all have checksums."""
WAITS = (0, 1, 2, 4, 8, 16, 32)
"""Seconds before each look for a part that should exist; NFS may report a file as missing for up to a minute."""

Identity = dict[str, str]
"""What decides a model's embeddings (weights, tokenizer, precision, ...); compared key by key."""


class EmbeddingCache:
    """The embeddings of one data set, part by part, in a folder or in memory."""

    def __init__(self, folder: str | Path | None, inputs: Inputs) -> None:
        """Cache the embeddings of `inputs` in `folder`, or without one in memory; nothing is read or written yet."""
        self.folder, self.inputs = None if folder is None else Path(folder), inputs
        self.bounds = inputs.cut(PART_COST)
        """[parts + 1] numbers of the inputs at which parts begin and end."""
        self.claimed_files: str | None = None
        """`digest_of_files` at the time of `claim`; None on ranks that did not claim."""
        self.num_embedded = 0
        """Number of inputs that CachedEmbedder.embed embedded for this cache, over all ranks."""
        self._opened: dict[int, np.ndarray] = {}
        self._verified: set[int] = set()
        self._requires_checksums = False

    @property
    def num_parts(self) -> int:
        """Number of parts that the inputs are cut into."""
        return len(self.bounds) - 1

    def inputs_of(self, part: int) -> Inputs:
        """The inputs of a part."""
        first = self.inputs.first
        return self.inputs.part(range(first + self.bounds[part], first + self.bounds[part + 1]))

    def without_inputs(self) -> "EmbeddingCache":
        """The embeddings of a folder alone, which hold no inputs, whose images may be in memory, and no open file."""
        alone = copy(self)
        alone.inputs, alone._opened = self.inputs.part(range(self.inputs.first, self.inputs.first)), {}
        return alone

    def claim(self, identity: Identity, requires_files: bool = True) -> None:
        """Make the folder this model's, or check that it is; one rank calls it before any other uses the folder.

        Parts whose images or videos have changed since are removed, so that they are embedded again.

        Args:
            identity: of the model.
            requires_files: whether a missing image or video is an error.

        Raises:
            DataError: the folder holds embeddings of another model or of other inputs (the message names what
                differs), or parts without a manifest; it cannot be written; or an image or video is missing.
        """
        states = self.inputs.require_files() if requires_files else self.inputs.file_states()
        if self.folder is None:
            return
        path = self.folder / MANIFEST
        manifest = {"format": FORMAT, "version": VERSION, "model": identity, "inputs": self.inputs.digest}
        before = self._read_manifest(path)
        if before is None or CHECKSUMS in before:
            manifest[CHECKSUMS] = "sha256"
        if before is not None:
            require_same_model(path, before.get("model"), identity)
            if before.get("inputs") != manifest["inputs"]:
                raise DataError(
                    f"{self.folder} holds embeddings of other inputs than those of data set {self.inputs.name} now; "
                    f"choose another --out, or delete {self.folder} to embed again"
                )
        states = self._part_states(states)
        try:
            if before is None:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self._remove_changed(before.get("files"), states)
            if before is None or before.get("files") != states:  # after changed parts are gone
                write_json(path, {**manifest, "files": states})
        except OSError as error:
            raise DataError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error
        self.claimed_files = _digest(states)

    def digest_of_files(self) -> str:
        """SHA-256 of sizes and modification times of all images and videos as they are now."""
        return _digest(self._part_states(self.inputs.file_states()))

    def _read_manifest(self, path: Path) -> dict[str, Any] | None:
        if path.is_file():
            try:
                return read_json(path, FORMAT, "it is another file")
            except DataError as error:
                raise DataError(f"{error}; or delete {self.folder} to embed again") from error
        if any(self.folder.glob("part-*.npy")):
            raise DataError(
                f"{self.folder} holds embeddings but no {MANIFEST}, which says of which model they are; choose another "
                f"--out, or delete {self.folder} to embed again"
            )
        return None

    def _part_states(self, states: Mapping[str, str]) -> list[str]:
        """For each part, a digest of its files' states."""
        parts = (self.inputs_of(part).entries for part in range(self.num_parts))
        return [_digest([states[file] for entry in part for file in entry.files]) for part in parts]

    def _remove_changed(self, before: object, now: list[str]) -> None:
        """Remove the parts whose files have changed, or whose former state is unknown."""
        before = before if isinstance(before, list) and len(before) == len(now) else [""] * len(now)
        changed = [self._path(part) for part, (old, new) in enumerate(zip(before, now)) if old != new]
        removed = [path for path in changed if path.is_file()]
        for path in removed:
            path.unlink()
        if removed:
            what = f"{len(removed)} of {self.num_parts} parts of {self.folder} are embedded again"
            logger.warning("%s: their images or videos have changed", what)

    def missing(self) -> list[int]:
        """Numbers of the parts that are absent or damaged, or of another width than most."""
        if self.folder is not None and (self.folder / MANIFEST).is_file():
            self._requires_checksums = CHECKSUMS in read_json(self.folder / MANIFEST)
        widths = {part: None if (rows := self._open(part)) is None else rows.shape[1] for part in range(self.num_parts)}
        most_common = Counter(width for width in widths.values() if width is not None).most_common(1)
        missing = [part for part, width in widths.items() if width is None or width != most_common[0][0]]
        damaged = [] if self.folder is None else [part for part in missing if self._path(part).is_file()]
        if damaged:
            names = f"{len(damaged)} of {self.num_parts} parts of {self.folder}"
            logger.warning("%s are damaged or changed and are embedded again; %d is the first", names, damaged[0])
        return missing

    def write(self, part: int, rows: np.ndarray) -> None:
        """Keep a part's embeddings, [inputs of the part, d] float32.

        Raises:
            DataError: the disk is full or not writable; no file of the part remains then.
        """
        rows = rows.astype(np.float32, copy=False)
        if self.folder is None:
            self._opened[part] = rows
            return
        self._verified.discard(part)
        path, content = self._path(part), io.BytesIO()
        np.save(content, rows, allow_pickle=False)
        try:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                file.write(content.getbuffer())
                file.write(hashlib.sha256(content.getbuffer()).digest())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from error

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Embeddings [n, d] float32 of the inputs with these numbers [n]; reads only what is asked for.

        Raises:
            DataError: a part is missing. On several nodes this means that they do not share the folder.
        """
        of_part = np.searchsorted(self.bounds, indices, side="right") - 1  # [n]
        rows = None
        for part in np.unique(of_part).tolist() or [0]:  # without indices the first part tells d
            if part not in self._opened:
                self._opened[part] = self._await(part)
            stored = self._opened[part]
            if self.folder is not None and len(self._opened) > OPEN_PARTS:
                del self._opened[next(iter(self._opened))]
            if rows is None:
                rows = np.empty((len(indices), stored.shape[1]), np.float32)
            if stored.shape[1] != rows.shape[1]:
                widths = f"{stored.shape[1]} numbers and not {rows.shape[1]} as others do"
                raise DataError(f"the embeddings of {self._path(part)} have {widths}; delete {self.folder}")
            chosen = of_part == part
            rows[chosen] = stored[indices[chosen] - self.bounds[part]]
        return rows

    def _await(self, part: int) -> np.ndarray:
        """Open a part that another rank has just written, which a network file system may not show at once."""
        for seconds in WAITS:
            time.sleep(seconds)
            stored = self._open(part)
            if stored is not None:
                return stored
        raise DataError(f"{self._path(part)} is missing; all nodes must share the folder of --out")

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npy"

    def _open(self, part: int) -> np.ndarray | None:
        """The part's embeddings, mapped into memory; None where the part is absent or damaged."""
        if self.folder is None:
            return self._opened.get(part)
        path = self._path(part)
        try:
            stored = np.lib.format.open_memmap(path, mode="r")
            length = self.bounds[part + 1] - self.bounds[part]
            is_right = stored.dtype == np.float32 and stored.ndim == 2 and len(stored) == length
            if not is_right or part not in self._verified and not self._is_unchanged(path, stored):
                return None
        except (OSError, ValueError, EOFError, SyntaxError, TokenError):  # all of which a damaged header can raise
            return None
        self._verified.add(part)
        return stored

    def _is_unchanged(self, path: Path, stored: np.ndarray) -> bool:
        """Whether a file ends with the SHA-256 of what stands before it; older files have none, but must be finite."""
        content = np.memmap(path, np.uint8, "r")
        end = stored.offset + stored.nbytes
        if len(content) == end:
            return not self._requires_checksums and bool(np.isfinite(stored).all())
        return hashlib.sha256(content[:end]).digest() == content[end:].tobytes()


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def require_same_model(path: Path, recorded: object, identity: Identity, hint: str = "") -> None:
    """Compare the model recorded in a file with this one; `hint` ends the message, unless it is that of an --out.

    Raises:
        DataError: they differ; the message names the keys in which they do.
    """
    if recorded == identity:
        return
    recorded = recorded if isinstance(recorded, dict) else {}
    keys = [key for key in {**identity, **recorded} if recorded.get(key) != identity.get(key)]
    apart = [f"{key} {recorded.get(key)!r} there, {identity.get(key)!r} here" for key in keys]
    hint = hint or f"choose another --out, or delete {path.parent} to begin again"
    raise DataError(f"{path} is of another model ({'; '.join(apart)}); {hint}")


EmbedParts = Callable[[Iterable[Mapping[str, Side]]], Iterator[Tensor | None]]
"""embedder.embed_parts, bound to this rank's model."""
Progress = Callable[[str, int, int], None]
"""Called with (what is done, number done, total) of this rank's parts."""
TURNS_TOGETHER = 8
"""Parts after which ranks wait for each other, so that the delay of a slow rank never reaches the groups' timeout."""


@dataclass(frozen=True)
class CachedEmbedder:
    """Embeds the inputs of data sets with a model, and keeps their embeddings in a folder or in memory."""

    embed_parts: EmbedParts
    """Embeds with this rank's replica of the model."""
    folder: str | Path | None
    """Gets embeddings/<name of the inputs>/; all ranks share it. None: embeddings are kept in memory, on every rank."""
    identity: Identity
    """Identity of the model; only the first rank's is used, and only with a folder."""
    replicas: dist.ProcessGroup
    """Data-parallel group that the parts are dealt to."""
    progress: Progress = lambda what, done, total: None
    """Called after each part of this rank."""
    requires_files: bool = True
    """Whether a missing image or video is an error before any work is done, and not when it is read."""
    cfg: RunConfig | None = None
    """Configuration of the model, for benchmarks that depend on it."""

    def cache(self, inputs: Inputs) -> EmbeddingCache:
        """The embeddings of `inputs`, as far as they exist."""
        return EmbeddingCache(self.folder and Path(self.folder) / "embeddings" / inputs.name.replace("/", "-"), inputs)

    def embed(self, data_sets: Sequence[Inputs]) -> list[EmbeddingCache]:
        """Embed the parts that are missing; the ranks of `replicas` take them in turn. A collective over all ranks.

        Returns:
            The complete embeddings of each data set.

        Raises:
            DataError: an image is missing or damaged, the folder holds another model's embeddings, or the disk is full.
            NotFiniteError: an embedding is not finite; nothing of its part is kept. Raised on all ranks in memory.
        """
        caches = [self.cache(inputs) for inputs in data_sets]
        if dist.get_rank() == 0:
            for cache in caches:
                cache.claim(self.identity, self.requires_files)
        missing = _find_missing(caches)
        parts = [cache.inputs_of(part) for cache, part in missing]
        size = self.replicas.size()
        mine = range(self.replicas.rank(), len(missing), size)
        for number in mine if self.requires_files else ():
            parts[number].require_files()
        dist.barrier()  # a missing image ends the run before any work is done
        embedded = self.embed_parts(parts[number] for number in mine)
        for turn in range(-(-len(missing) // size)):
            finished = []
            if turn < len(mine):
                rows = next(embedded)
                finished = [] if rows is None else [(mine[turn], rows.cpu())]
                self.progress(f"embedding {parts[mine[turn]].name}", turn + 1, len(mine))
            for number, rows in from_all_ranks(finished) if self.folder is None else finished:
                require_finite(rows, parts[number])
                cache, part = missing[number]
                cache.write(part, rows.numpy())
            if turn % TURNS_TOGETHER == 0:
                dist.barrier()
        for (cache, _), inputs in zip(missing, parts):
            cache.num_embedded += len(inputs)
        dist.barrier()
        return caches


def _find_missing(caches: Sequence[EmbeddingCache]) -> list[tuple[EmbeddingCache, int]]:
    """The missing parts as the first rank sees them; a network folder may look different from other ranks."""
    missing = from_first_rank(lambda: [cache.missing() for cache in caches])
    return [(cache, part) for cache, numbers in zip(caches, missing) for part in numbers]

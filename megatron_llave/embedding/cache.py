"""Embeddings of a data set's inputs on disk, in parts: what makes an evaluation resumable, at another layout too.

A folder holds manifest.json (of which model, of which inputs, of which state of each part's files) and part-00000.npy
..., float32 [inputs of the part, d], each there whole or not at all. How inputs are cut into parts does not depend on
the number of ranks.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import Side
from megatron_llave.distributed.process_groups import device
from megatron_llave.embedding.embedder import require_finite
from megatron_llave.embedding.inputs import FileInputs
from megatron_llave.errors import DataError
from megatron_llave.files import VERSION, atomic_write, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT = "megatron_llave embeddings"
MANIFEST = "manifest.json"
PART_COST = 512
"""Of the inputs of a part (FileInput.cost): some 56 with pictures, or 512 short texts."""

WAITS = (0, 1, 2, 4, 8, 16, 32)
"""Seconds before each look for a part that should be there; NFS may believe for a minute that a file is missing."""

Identity = dict[str, str]
"""What decides a model's embeddings (its weights, how inputs become tokens): compared, and shown where it differs."""


class EmbeddingCache:
    """The parts of one data set's embeddings in a folder."""

    def __init__(self, folder: str | Path, inputs: FileInputs) -> None:
        """For `inputs`; nothing is read or written yet."""
        self.folder, self.inputs = Path(folder), inputs
        self.bounds = inputs.cut(PART_COST)
        """[parts + 1] of the inputs of each part."""
        self.claimed_files: str | None = None
        """`digest_of_files` when the folder was claimed: what the embeddings are of. None on the ranks that did not."""
        self._opened: dict[int, np.ndarray] = {}

    @property
    def num_parts(self) -> int:
        """That the inputs are cut into."""
        return len(self.bounds) - 1

    def inputs_of(self, part: int) -> FileInputs:
        """A part's inputs."""
        return self.inputs.part(range(self.bounds[part], self.bounds[part + 1]))

    def claim(self, identity: Identity) -> None:
        """Make the folder this model's, or check that it is; one rank does it before any other uses the folder.

        Parts whose pictures or videos have changed since are removed, to be embedded again.

        Raises:
            DataError: it holds embeddings of another model or of other inputs (names what differs), parts that nothing
                tells the model of, or it cannot be written; or a picture or video is not there.
        """
        path = self.folder / MANIFEST
        own = {"format": FORMAT, "version": VERSION, "model": identity, "inputs": self.inputs.digest}
        found = self._read_manifest(path)
        if found is not None:
            require_same_model(path, found.get("model"), identity)
            if found.get("inputs") != own["inputs"]:
                raise DataError(
                    f"{self.folder} holds embeddings of other inputs than those of data set {self.inputs.name} now; "
                    f"choose another --out, or delete {self.folder} to embed again"
                )
        states = self._part_states(self.inputs.require_files())
        try:
            if found is None:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                self._remove_changed(found.get("files"), states)
            if found is None or found.get("files") != states:  # the parts first: a killed run must not keep an old one
                write_json(path, {**own, "files": states})
        except OSError as error:
            raise DataError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error
        self.claimed_files = _digest(states)

    def digest_of_files(self) -> str:
        """Of sizes and times of the last change of all pictures and videos, as they are now."""
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
        parts = (self.inputs_of(part).inputs for part in range(self.num_parts))
        return [_digest([states[file] for one in part for file in one.files]) for part in parts]

    def _remove_changed(self, before: object, now: list[str]) -> None:
        """Remove the parts whose files have changed, or of which that is not known."""
        before = before if isinstance(before, list) and len(before) == len(now) else [""] * len(now)
        changed = [part for part, (old, new) in enumerate(zip(before, now)) if old != new]
        there = [part for part in changed if self._path(part).is_file()]
        for part in there:
            self._path(part).unlink()
        if there:
            what = f"{len(there)} of {self.num_parts} parts of {self.folder} are embedded again"
            logger.warning("%s: their pictures or videos have changed", what)

    def missing(self) -> list[int]:
        """Parts that are not there, or damaged."""
        return [part for part in range(self.num_parts) if self._open(part) is None]

    def write(self, part: int, rows: np.ndarray) -> None:
        """Store a part's embeddings, [inputs of the part, d] float32.

        Raises:
            DataError: the disk is full or not writable; nothing is left of the part then.
        """
        path = self._path(part)
        try:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, rows.astype(np.float32, copy=False), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Embeddings [n, d] float32 of inputs by their index [n]; only what is asked for is read.

        Raises:
            DataError: a part is not there, which on several nodes means a folder that they do not share.
        """
        of_part = np.searchsorted(self.bounds, indices, side="right") - 1  # [n]
        rows = None
        for part in np.unique(of_part).tolist():
            if part not in self._opened:
                self._opened[part] = self._await(part)
            stored = self._opened[part]
            if rows is None:
                rows = np.empty((len(indices), stored.shape[1]), np.float32)
            chosen = of_part == part
            rows[chosen] = stored[indices[chosen] - self.bounds[part]]
        return rows

    def _await(self, part: int) -> np.ndarray:
        """A part that another rank has just written: a network file system may not show it at once."""
        for seconds in WAITS:
            time.sleep(seconds)
            stored = self._open(part)
            if stored is not None:
                return stored
        raise DataError(f"{self._path(part)} is missing; all nodes must share the folder of --out")

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npy"

    def _open(self, part: int) -> np.ndarray | None:
        """The part, not yet read; None where it is not there as it should be."""
        try:
            stored = np.load(self._path(part), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        is_right = stored.dtype == np.float32 and stored.ndim == 2 and len(stored) == len(self.inputs_of(part))
        return stored if is_right else None


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def require_same_model(path: Path, found: object, identity: Identity) -> None:
    """Check what a file says of the model that it was made with.

    Raises:
        DataError: it is not this one; names what differs.
    """
    if found == identity:
        return
    found = found if isinstance(found, dict) else {}
    keys = [key for key in {**identity, **found} if found.get(key) != identity.get(key)]
    apart = [f"{key} {found.get(key)!r} there, {identity.get(key)!r} here" for key in keys]
    hint = f"choose another --out, or delete {path.parent} to begin again"
    raise DataError(f"{path} is of another model ({'; '.join(apart)}); {hint}")


EmbedParts = Callable[[Iterable[Mapping[str, Side]]], Iterator[Tensor | None]]
"""embedding.embed_parts of this rank's replica."""


Progress = Callable[[str, int, int], None]
"""Told (what, done, total) of this rank's parts."""


TURNS_TOGETHER = 8
"""Parts after which the ranks wait for each other: what a slow one is behind must not add up to the groups' timeout."""


def embed_missing(
    embed_parts: EmbedParts,
    stores: Sequence[EmbeddingCache],
    identity: Identity,
    replicas: dist.ProcessGroup,
    progress: Progress = lambda what, done, total: None,
) -> int:
    """Embed the parts that are not there, dealt out in turn; returns the number of inputs in them, of all ranks.

    Args:
        embed_parts: of this rank's replica.
        stores: in folders that all ranks share.
        identity: of the model; only the first rank's counts.
        replicas: data-parallel ranks that the parts are dealt to.
        progress: told of each part.

    Raises:
        DataError: a picture is missing or damaged, a store has another model's embeddings, an embedding is not finite
            (nothing of its part is stored), or the disk is full.
    """
    if dist.get_rank() == 0:
        for store in stores:
            store.claim(identity)
    missing = _find_missing(stores)
    mine = missing[replicas.rank() :: replicas.size()]
    for store, part in mine:
        store.inputs_of(part).require_files()
    dist.barrier()  # a missing picture ends the run before any work is done
    embedded = embed_parts(store.inputs_of(part) for store, part in mine)
    for turn in range(-(-len(missing) // replicas.size())):
        if turn < len(mine):
            store, part = mine[turn]
            rows = next(embedded)
            if rows is not None:
                require_finite(rows, store.inputs_of(part))
                store.write(part, rows.cpu().numpy())
            progress(f"embedding {store.inputs.name}", turn + 1, len(mine))
        if turn % TURNS_TOGETHER == 0:
            dist.barrier()
    dist.barrier()
    return sum(len(store.inputs_of(part)) for store, part in missing)


def _find_missing(stores: Sequence[EmbeddingCache]) -> list[tuple[EmbeddingCache, int]]:
    """The parts that are not there, as the first rank sees it: folders on a network may look different elsewhere."""
    parts = [(store, part) for store in stores for part in range(store.num_parts)]
    is_missing = torch.zeros(len(parts), dtype=torch.int64)
    if dist.get_rank() == 0:
        found = {(store, part) for store in stores for part in store.missing()}
        is_missing = torch.tensor([int(one in found) for one in parts], dtype=torch.int64)
    is_missing = is_missing.to(device())
    if parts:
        dist.broadcast(is_missing, 0)
    return [one for one, flag in zip(parts, is_missing.tolist()) if flag]

"""Embed what embedding stores lack, spread over the data-parallel ranks: the long part of an evaluation, resumable."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import Side
from megatron_llave.embedding import require_finite
from megatron_llave.embedding_store import EmbeddingStore, Identity
from megatron_llave.parallel import device

EmbedParts = Callable[[Iterable[Mapping[str, Side]]], Iterator[Tensor | None]]
"""embedding.embed_parts of this rank's replica."""
Progress = Callable[[str, int, int], None]
"""Told (what, done, total) of this rank's parts."""

TURNS_TOGETHER = 8
"""Parts after which the ranks wait for each other: what a slow one is behind must not add up to the groups' timeout."""


def embed_missing(
    embed_parts: EmbedParts,
    stores: Sequence[EmbeddingStore],
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


def _find_missing(stores: Sequence[EmbeddingStore]) -> list[tuple[EmbeddingStore, int]]:
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

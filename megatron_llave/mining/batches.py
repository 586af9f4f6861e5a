"""Mines an order of the pairs of a folder of shards in which batches are hard, from embedding to the written file."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from scipy.sparse import csr_array

from megatron_llave.config.mining import Grouping, Search
from megatron_llave.data.index import Index
from megatron_llave.data.order import FORMAT, ORDER_FILE, BatchOrder, SubsetOrder
from megatron_llave.data.stored_vectors import StoredVectors, open_vectors
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.embedding.embedder import LoadedModel
from megatron_llave.errors import DataError
from megatron_llave.files import VERSION, read_json, write_json
from megatron_llave.locks import lock_folder
from megatron_llave.mining.approximate import require_faiss
from megatron_llave.mining.clusters import find_clusters, require_metis
from megatron_llave.mining.graph import rank_graph
from megatron_llave.mining.hardness import compare_hardness
from megatron_llave.mining.inputs import SubsetInputs, read_subsets
from megatron_llave.mining.neighbours import NearestTargets
from megatron_llave.mining.run import Say, label, recall_of
from megatron_llave.mining.store import data_digest, stored_embeddings


@dataclass(frozen=True)
class Ordering:
    """What is to be ordered and where the order goes."""

    folder: Path
    """The local folder of shards."""
    index: Index
    """Its index."""
    subsets: Sequence[str]
    """The subsets that get an order."""
    out: Path
    """Folder for the order."""
    store: Path
    """Folder for embeddings, which are kept; all ranks share both folders."""
    checkpoint: str
    """The model, as the user names it."""
    grouping: Grouping
    search: Search = Search()
    """How the nearest targets are found."""
    overwrite: bool = False
    """Whether an order that was mined otherwise is replaced."""


def mine_batches(
    ordering: Ordering, load: Callable[[], LoadedModel], say: Say = lambda doing: None
) -> dict[str, Any] | None:
    """Mine and write an order; a collective over all ranks, with the same result at every layout.

    The ranks embed and search together; the first one clusters, and the file is written at the end and at once.

    Args:
        ordering: what is ordered.
        load: loads ordering.checkpoint.
        say: called with what is being done.

    Returns:
        The contents of order.json, on the first rank; None on the others.

    Raises:
        DataError: the folder has an order that was mined otherwise, which `overwrite` does not allow to replace; or as
            store.stored_embeddings and inputs.read_subsets.
        ConfigError: METIS or FAISS is asked for and cannot be imported.
    """
    data = {"sha256": data_digest(ordering.index), "subsets": list(ordering.subsets)}
    plan = {"rules": asdict(ordering.grouping), "search": ordering.search.plan, "data": data}
    if ordering.grouping.clustering == "metis":
        require_metis()  # before hours of embedding
    if ordering.search.kind == "faiss":
        require_faiss()
    model = load()  # which joins the ranks
    is_first = dist.get_rank() == 0
    with lock_folder(ordering.out) if is_first else nullcontext():
        from_first_rank(lambda: _finished(ordering, plan))  # before hours of embedding
        plan = {"models": [from_first_rank(model.identity)], **plan}
        if from_first_rank(lambda: _finished(ordering, plan) is not None):
            say("nothing: the order is complete already")
            return _finished(ordering, plan) if is_first else None
        say("embedding")
        vectors = open_vectors(stored_embeddings(model, ordering.folder, ordering.index, ordering.store))
        graphs = []
        for inputs in read_subsets(ordering.folder, ordering.index, ordering.subsets, [vectors]):
            say(f"searching for the neighbours of subset {inputs.name}")
            depth = ordering.grouping.skip + ordering.grouping.take
            found = NearestTargets(inputs, vectors, depth, ordering.search)
            if is_first:
                graphs.append((inputs, rank_graph(inputs, found, ordering.grouping), recall_of([found])))
            else:
                for _ in found:
                    pass
        if not is_first:
            return None
        names = [label(ordering.checkpoint, model.source.place)]
        head = {"format": FORMAT, "version": VERSION, "cluster_size": ordering.grouping.cluster_size}
        head |= {"checkpoints": names, **plan}
        subsets = {one.name: recall | _order(ordering, vectors, one, graph, say) for one, graph, recall in graphs}
        value = {**head, "subsets": subsets}
        try:
            write_json(ordering.out / ORDER_FILE, value)
        except OSError as error:
            raise DataError(f"{ordering.out / ORDER_FILE} cannot be written: {error.strerror or error}") from error
        return value


def _order(
    ordering: Ordering, vectors: StoredVectors, inputs: SubsetInputs, graph: csr_array, say: Say
) -> dict[str, Any]:
    """What order.json says of a subset."""
    say(f"clustering subset {inputs.name}")
    grouping = ordering.grouping
    pairs = find_clusters(graph, grouping.cluster_size, grouping.clustering, grouping.seed)
    shards = [(shard.file, shard.sha256) for shard in inputs.shards]
    order = BatchOrder(grouping.cluster_size, {inputs.name: SubsetOrder(shards, pairs)})
    cluster = np.empty(len(pairs), np.int64)
    cluster[pairs] = np.arange(len(pairs)) // grouping.cluster_size
    row = np.repeat(np.arange(len(pairs)), np.diff(graph.indptr))
    inside = graph.data[cluster[row] == cluster[graph.indices]].sum()
    return {
        "pairs": len(pairs),
        "clusters": len(pairs) // grouping.cluster_size,
        "left_over": len(pairs) % grouping.cluster_size,
        "pairs_not_embedded": len(pairs) - len(np.unique(inputs.members[:, 0])),
        "pairs_unconnected": int((np.diff(graph.indptr) == 0).sum()),
        "connections": int(graph.data.sum()) // 2,
        "connections_inside": int(inside) // 2,
        "hardest": compare_hardness(inputs, vectors, order),
        "shards": [{"file": file, "sha256": digest} for file, digest in shards],
        "order": pairs.tolist(),
    }


def _finished(ordering: Ordering, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The order that the folder has, if it is that of a plan, of which some keys may be missing; None: there is none.

    Raises:
        DataError: it was mined otherwise, and may not be replaced; or the folder has another file in its place.
    """
    path = ordering.out / ORDER_FILE
    if not path.is_file():
        return None
    before = read_json(path, FORMAT, "choose another --out")
    apart = [key for key in plan if before.get(key) != plan[key]]
    if apart and not ordering.overwrite:
        raise DataError(
            f"{ordering.out} holds an order of other {', '.join(apart)}; choose another --out or pass --overwrite"
        )
    return None if apart else before

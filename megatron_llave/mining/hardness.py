"""How hard the batches of an order are, compared with batches at random: how similar a query's hardest target is."""

from typing import Any

import numpy as np

from megatron_llave.data.order import BatchOrder
from megatron_llave.data.stored_vectors import StoredVectors, query_name, target_name
from megatron_llave.mining.inputs import SubsetInputs
from megatron_llave.mining.neighbours import StoredRows

CLUSTERS_PER_BATCH = (1, 4, 16)
MOST_BATCHES = 32
"""Batches of each size that are looked at."""


def compare_hardness(inputs: SubsetInputs, vectors: StoredVectors, order: BatchOrder) -> list[dict[str, Any]]:
    """Compare the first epoch of seed 0 with pairs at random, for batches of each of CLUSTERS_PER_BATCH.

    Returns:
        For each size that the subset fills a batch of, `batch_size`, and the mean hardest similarity within a batch
        `ordered` and `random`.
    """
    num_pairs = len(order.subsets[inputs.name].pairs)
    numbers = {
        "ordered": order.take(inputs.name, 0, 0, num_pairs),
        "random": np.random.default_rng(0).permutation(num_pairs),
    }
    found = []
    for clusters in CLUSTERS_PER_BATCH:
        size = clusters * order.cluster_size
        count = num_pairs // size
        chosen = np.unique(np.linspace(0, count - 1, MOST_BATCHES).astype(int)) if count else []
        means = {
            way: [hardest_in_batch(inputs, vectors, pairs[i * size : (i + 1) * size]) for i in chosen]
            for way, pairs in numbers.items()
        }
        if count:
            found.append({"batch_size": size, **{way: _mean(np.concatenate(of)) for way, of in means.items()}})
    return found


def _mean(similarity: np.ndarray) -> float | None:
    return round(float(similarity.mean()), 4) if len(similarity) else None


def hardest_in_batch(inputs: SubsetInputs, vectors: StoredVectors, pairs: np.ndarray) -> np.ndarray:
    """The similarity of each query of a batch and the most similar target of the batch that it may have as a negative.

    Args:
        inputs: the subset.
        vectors: embeddings of its queries and targets.
        pairs: [n] int64 numbers of the pairs of the batch.

    Returns:
        [m] float64, one for each different query that has such a target.
    """
    members = inputs.members[np.isin(inputs.members[:, 0], pairs)]
    queries, targets = np.unique(members[:, 1]), np.unique(members[:, 2])
    of_queries = StoredRows(vectors, [query_name(inputs.name, inputs.query_ids[i]) for i in queries])[:]
    of_targets = StoredRows(vectors, [target_name(inputs.name, inputs.target_ids[i]) for i in targets])[:]
    similarity = (of_queries.double() @ of_targets.double().T).cpu().numpy()
    labels = inputs.labels[targets]
    hidden = np.stack([np.isin(labels, inputs.hidden_labels[query]) for query in queries]) if len(queries) else None
    if hidden is None:
        return np.zeros(0)
    similarity[hidden] = -np.inf
    hardest = similarity.max(1)
    return hardest[hardest > -np.inf]

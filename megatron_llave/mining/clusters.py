"""Divides a graph of pairs into clusters of exactly one size, of pairs that are well connected with each other.

METIS, through pymetis, looks for the division that cuts the fewest connections. The greedy one fills one cluster after
the other, and is for where pymetis cannot be installed.
"""

import importlib.util
from types import ModuleType

import numpy as np
from scipy.sparse import csr_array

from megatron_llave.errors import import_optional

TAKEN = -(2**40)
"""Connection of a pair that is in a cluster already, below that of every other."""


def has_metis() -> bool:
    """Whether pymetis is installed."""
    return importlib.util.find_spec("pymetis") is not None


def require_metis() -> ModuleType:
    """Return the module pymetis.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    return import_optional("pymetis", "--clustering metis needs", "pip install pymetis (the extra mine)")


def find_clusters(graph: csr_array, size: int, clustering: str, seed: int) -> np.ndarray:
    """Order the nodes of a graph so that each `size` of them are a cluster; those that are left over come last.

    The nodes are numbered anew at random first, so that pairs without connections are in clusters at random and not
    beside their neighbours in the shards.

    Args:
        graph: [N, N] int symmetric.
        size: nodes of a cluster.
        clustering: one of config.mining.CLUSTERINGS.
        seed: the result depends on it and the graph alone, with METIS also on its version.

    Returns:
        [N] int64, each node once.

    Raises:
        ConfigError: METIS is asked for and pymetis is not installed.
    """
    nodes = np.random.default_rng(seed).permutation(graph.shape[0])
    shuffled = graph[nodes][:, nodes].tocsr()
    shuffled.sort_indices()
    if clustering == "greedy" or graph.shape[0] < 2 * size:
        return nodes[_greedy(shuffled, size)]
    return nodes[_of_one_size(shuffled, _metis(shuffled, -(-graph.shape[0] // size), seed), size)]


def _metis(graph: csr_array, parts: int, seed: int) -> np.ndarray:
    """[N] int64 part of each node; the parts have nearly the same size."""
    pymetis = require_metis()
    turned = graph.T.tocsr()  # with sorted indices, as those of `graph` are
    is_symmetric = np.array_equal(graph.indices, turned.indices) and np.array_equal(graph.data, turned.data)
    assert is_symmetric, "METIS never ends on a graph in which a connection lacks its other direction"
    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices)
    options = pymetis.Options(seed=seed)
    # Recursive bisection is the better and faster one of METIS's two methods for as many and small parts as these.
    _, part = pymetis.part_graph(parts, adjacency, eweights=graph.data, recursive=True, options=options)
    return np.asarray(part, np.int64)


def _of_one_size(graph: csr_array, part: np.ndarray, size: int) -> np.ndarray:
    """Make the largest parts clusters of exactly `size` nodes, and return the order of the nodes.

    The least connected nodes of too large parts and all nodes of the smallest parts go where they are connected best
    among the parts that lack nodes, and the last ones are left over.
    """
    num_nodes = len(part)
    edge_rows = np.repeat(np.arange(num_nodes), np.diff(graph.indptr))
    inside = np.where(part[edge_rows] == part[graph.indices], graph.data, 0)
    inside = np.bincount(edge_rows, inside, num_nodes)
    counts = np.bincount(part)
    largest = np.argsort(-counts, kind="stable")[: num_nodes // size]
    cluster_of_part = np.full(len(counts), -1)
    cluster_of_part[largest] = np.arange(len(largest))
    cluster = cluster_of_part[part]
    by_cluster = np.lexsort((-inside, cluster))
    rank = np.arange(num_nodes) - np.searchsorted(cluster[by_cluster], cluster[by_cluster])
    cluster[by_cluster[rank >= size]] = -1
    lacking = size - np.bincount(cluster[cluster >= 0], minlength=len(largest))
    loose = (cluster < 0).nonzero()[0].tolist()
    unconnected = []
    for node in loose:
        edges = slice(graph.indptr[node], graph.indptr[node + 1])
        near, weights = cluster[graph.indices[edges]], graph.data[edges]
        fits = (near >= 0) & (lacking[near] > 0)
        if not fits.any():
            unconnected.append(node)
            continue
        best = int(np.bincount(near[fits], weights[fits]).argmax())
        cluster[node], lacking[best] = best, lacking[best] - 1
    places = np.repeat(np.arange(len(largest)), lacking)
    cluster[unconnected[: len(places)]] = places
    cluster[unconnected[len(places) :]] = len(largest)
    return np.argsort(cluster, kind="stable")


def _greedy(graph: csr_array, size: int) -> np.ndarray:
    """Fill clusters one after the other with the free node that is connected most with those that are in it already.

    A cluster begins with the first free node, and gets the next one too where none is connected. Of equal ones, the
    first that was found is taken.
    """
    num_nodes = graph.shape[0]
    connection = np.zeros(num_nodes, np.int64)  # of each node with the cluster that is being filled
    order, next_free = [], 0
    touched: list[np.ndarray] = []
    for place in range(num_nodes):
        if place % size == 0:
            for nodes in touched:
                connection[nodes] = np.where(connection[nodes] < 0, TAKEN, 0)
            touched = []
        candidates = np.concatenate(touched) if touched else np.zeros(0, np.int64)
        best = int(candidates[connection[candidates].argmax()]) if len(candidates) else -1
        if best < 0 or connection[best] <= 0:
            while connection[next_free] < 0:
                next_free += 1
            best = next_free
        order.append(best)
        connection[best] = TAKEN
        edges = slice(graph.indptr[best], graph.indptr[best + 1])
        touched.append(graph.indices[edges])
        connection[graph.indices[edges]] += graph.data[edges]
    return np.array(order, np.int64)

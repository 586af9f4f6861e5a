"""Clusters of pairs that are hard for each other: the graph against a plain reference, exact sizes, harder batches."""

import sys

import numpy as np
import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from reference_mining import exact, ranked
from scipy.sparse import csr_array

from megatron_llave.config.mining import Grouping
from megatron_llave.data.index import Shard
from megatron_llave.data.order import BatchOrder, SubsetOrder
from megatron_llave.data.stored_vectors import StoredVectors, open_vectors, query_name, target_name
from megatron_llave.errors import ConfigError
from megatron_llave.mining.clusters import find_clusters
from megatron_llave.mining.graph import rank_graph
from megatron_llave.mining.hardness import compare_hardness, hardest_in_batch
from megatron_llave.mining.inputs import Content, PairContents, SubsetInputs, collect
from megatron_llave.mining.neighbours import NearestTargets

WAYS = ("metis", "greedy")
N, GROUPS, SIZE = 500, 25, 16


def content(name: str) -> Content:
    return Content(name, name.encode(), name.encode())


def pairs() -> list[PairContents]:
    """Every 50th pair cannot be read, every 10th has the query of the one before, every 7th the target of another."""
    found = []
    for i in range(N):
        if i % 50 == 49:
            continue
        query, target = i - (i % 10 == 9), i if i % 7 else i // 70 * 70
        found.append(PairContents(f"p{i}", i % 100, content(f"q{query}"), [content(f"t{target}")], []))
    return found


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory, groups: ProcessGroupCollection) -> tuple:
    """A subset of GROUPS groups of pairs that are alike, shuffled, and its embeddings."""
    of_shards = [[pair for pair in pairs() if int(pair.key[1:]) // 100 == shard] for shard in range(5)]
    inputs = collect("x", [Shard(f"x-{i}.tar", 100, 0, f"{i}") for i in range(5)], of_shards)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((GROUPS, 16))[rng.permutation(N) % GROUPS]
    targets = centres + 0.5 * rng.standard_normal((N, 16))
    queries = targets + 0.3 * rng.standard_normal((N, 16))
    rows = np.concatenate([queries, targets]).astype(np.float32)
    file = tmp_path_factory.mktemp("vectors") / "x.npy"
    np.save(file, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    names = [query_name("x", f"q{i}") for i in range(N)] + [target_name("x", f"t{i}") for i in range(N)]
    file.with_suffix(".ids").write_text("".join(f"{name}\n" for name in names))
    return inputs, open_vectors(file)


def graph_of(made_up: tuple[SubsetInputs, StoredVectors], grouping: Grouping) -> csr_array:
    inputs, vectors = made_up
    return rank_graph(inputs, NearestTargets(inputs, vectors, grouping.skip + grouping.take), grouping)


def test_the_graph_is_that_of_the_ranks(made_up: tuple[SubsetInputs, StoredVectors]) -> None:
    inputs, vectors = made_up
    usable = [(int(pair.key[1:]), pair.query.id, pair.targets[0].id) for pair in pairs()]
    queries, targets = (list(dict.fromkeys(names)) for names in zip(*((q, t) for _, q, t in usable)))
    rows = [
        vectors.rows([f"x/{kind}/{name}" for name in names]).numpy()
        for kind, names in (("query", queries), ("target", targets))
    ]
    similarity = exact(*rows)
    expected = np.zeros((N, N), int)
    for pair, query, _ in usable:
        own = {targets.index(t) for _, q, t in usable if q == query}
        for target in ranked(similarity[queries.index(query)], own, 12)[3:]:
            of_target = [number for number, _, t in usable if t == targets[target]]
            expected[pair, of_target[(pair + target) % len(of_target)]] += 1
    graph = graph_of(made_up, Grouping(SIZE, 3, 9))
    np.testing.assert_array_equal(graph.toarray(), expected + expected.T)
    assert expected.sum() == 9 * len(usable) and (graph.toarray()[49::50] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_clusters_have_one_size_and_batches_get_harder(made_up: tuple, way: str) -> None:
    if way == "metis":
        pytest.importorskip("pymetis")
    inputs, vectors = made_up
    graph = graph_of(made_up, Grouping(SIZE, 2, 20))
    order = find_clusters(graph, SIZE, way, 0)
    assert sorted(order) == list(range(N)) and order.tolist() == find_clusters(graph, SIZE, way, 0).tolist()
    assert order.tolist() != find_clusters(graph, SIZE, way, 1).tolist()
    compared = compare_hardness(inputs, vectors, BatchOrder(SIZE, {"x": SubsetOrder([], order)}))
    assert [sizes["batch_size"] for sizes in compared] == [16, 64, 256]
    gains = [sizes["ordered"] - sizes["random"] for sizes in compared]
    assert gains[0] > 0.2 and gains[1] > 0.03 and gains[2] > -0.01, compared  # 0.71 and 0.41, 0.75 and 0.70


def test_hardest_in_batch_is_that_of_a_plain_loop(made_up: tuple) -> None:
    inputs, vectors = made_up
    batch = np.array([8, 9, 20, 70, 77, 300])
    usable = {int(pair.key[1:]): (pair.query.id, pair.targets[0].id) for pair in pairs()}
    expected = []
    for query in sorted({usable[i][0] for i in batch}, key=inputs.query_ids.index):
        own = {t for q, t in usable.values() if q == query}
        others = [t for t in {usable[i][1] for i in batch} if t not in own]
        row = vectors.rows([f"x/query/{query}"]).double()
        expected.append(max(float(row @ vectors.rows([f"x/target/{t}"]).double().T) for t in others))
    np.testing.assert_allclose(hardest_in_batch(inputs, vectors, batch), expected, rtol=1e-6)
    assert len(expected) == 5 and len(hardest_in_batch(inputs, vectors, np.array([49, 99]))) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("nodes", "size"), [(3, 4), (4, 4), (9, 4), (40, 4), (103, 8)])
def test_sizes_are_exact_in_every_graph(way: str, nodes: int, size: int) -> None:
    """Without connections, with one node that is connected with all, and with complete groups, which are found."""
    if way == "metis":
        pytest.importorskip("pymetis")
    star = np.zeros((nodes, nodes), np.int32)
    star[0, 1:] = star[1:, 0] = 1
    group = np.random.default_rng(1).permutation(nodes) // size
    complete = (group[:, None] == group) & ~np.eye(nodes, dtype=bool)
    for dense in (np.zeros_like(star), star, complete.astype(np.int32)):
        order = find_clusters(csr_array(dense), size, way, 0)
        assert sorted(order) == list(range(nodes))
    if nodes % size == 0:
        assert all(len(set(group[cluster])) == 1 for cluster in order.reshape(-1, size))


def test_a_graph_with_a_missing_direction_is_an_error_and_no_endless_loop() -> None:
    pytest.importorskip("pymetis")
    one_way = np.zeros((40, 40), np.int32)
    one_way[0, 1:] = 1
    with pytest.raises(AssertionError, match="a connection lacks its other direction"):
        find_clusters(csr_array(one_way), 4, "metis", 0)


def test_without_pymetis_metis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(ConfigError, match=r"--clustering metis needs pymetis: pip install pymetis"):
        find_clusters(csr_array((40, 40), dtype=np.int32), 4, "metis", 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cluster_size": 1}, "--cluster-size=1 must be a finite number of at least 2"),
        ({"take": 0}, "--take=0 must be"),
        ({"skip": -1}, "--skip=-1 must be"),
        ({"clustering": "best"}, "--clustering='best' is not one of metis, greedy"),
    ],
)
def test_impossible_clusters_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grouping(**values)

"""The exact search against numpy in float64, and small vectors against the exact search."""

import numpy as np
import pytest

from megatron_llave.search import vectors as module
from megatron_llave.search.vectors import best_rows, recall, search, shorten


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("block_bytes", [4, 4 * 16 * 7, module.BLOCK_BYTES])
@pytest.mark.parametrize("k", [1, 5, 99, 100, 1000])
def test_all_images_are_compared(monkeypatch, block_bytes: int, k: int) -> None:
    """Float64 is the reference; neighbours in the ranking lie at least 1e-6 apart here, products within 3e-7."""
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    rows, queries = unit_rows(100, 16), unit_rows(4, 16, seed=1)
    exact = queries.astype(np.float64) @ rows.astype(np.float64).T
    assert -np.diff(-np.sort(-exact, axis=1), axis=1).max() > 1e-6
    numbers, similar = best_rows(queries, rows, k)
    expected = np.argsort(-exact, axis=1)[:, :k]
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_allclose(similar, np.take_along_axis(exact, expected, axis=1), atol=3e-7)


@pytest.mark.parametrize("block_bytes", [4, 16, module.BLOCK_BYTES])
def test_equal_similarities_keep_their_order(monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    rows = np.eye(4, dtype=np.float32)[[1, 0, 0, 2, 0, 3]]
    for k, expected in ((2, [1, 2]), (4, [1, 2, 4, 0]), (6, [1, 2, 4, 0, 3, 5])):
        assert best_rows(np.eye(4, dtype=np.float32)[:1], rows, k)[0].tolist() == [expected]


def test_no_images() -> None:
    numbers, similar = best_rows(unit_rows(2, 8), np.empty((0, 8), np.float32), 10)
    assert numbers.shape == similar.shape == (2, 0)
    assert search(unit_rows(2, 8), np.empty((0, 8), np.float32), shorten(np.empty((0, 8)), 4, "int8"), 10)[0].size == 0
    assert recall(unit_rows(1, 8), shorten(unit_rows(1, 8), 4, "int8")) == {"recall@1": 1.0, "recall@10": 1.0}


def test_int8_is_within_half_a_step_and_depends_on_no_other_row() -> None:
    rows = unit_rows(50, 32)
    small = shorten(rows, 32, "int8")
    assert small.rows.dtype == np.int8 and np.abs(small.rows).max(axis=1).tolist() == [127] * 50
    error = np.abs(small.rows * small.scales[:, None] - rows)
    assert (error <= small.scales[:, None] / 2 + 1e-7).all()
    np.testing.assert_array_equal(shorten(rows[7:9], 32, "int8").rows, small.rows[7:9])
    cut = shorten(rows, 8, "float32").rows
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut / cut[:, :1], rows[:, :8] / rows[:, :1], rtol=1e-4)


@pytest.mark.parametrize(("dims", "kind"), [(32, "int8"), (8, "float32"), (2, "int8")])
def test_small_vectors_find_what_the_recall_says(monkeypatch, dims: int, kind: str) -> None:
    """The similarities are those of the exact vectors, and the recall is that of a plain count."""
    monkeypatch.setattr(module, "LEAST_FOUND", 1)
    rows = unit_rows(300, 32)
    small = shorten(rows, dims, kind)
    numbers, similar = search(rows[:40], rows, small, 11)
    full = rows[:40] @ rows.T
    np.testing.assert_allclose(similar, np.take_along_axis(full, numbers, axis=1), atol=3e-7)
    assert (np.diff(similar, axis=1) <= 0).all()
    monkeypatch.setattr(module, "RECALL_QUERIES", 300)
    measured = recall(rows, small)
    found, right = search(rows, rows, small, 11)[0], np.argsort(-(rows @ rows.T - 2 * np.eye(300)), axis=1)[:, :10]
    shares = [len(set(right[i]) & set(found[i][found[i] != i][:10])) / 10 for i in range(300)]
    assert measured["recall@10"] == pytest.approx(np.mean(shares), abs=1e-9)
    assert (measured["recall@10"] > 0.99) == (dims == 32), measured
    assert 0 < measured["recall@10"] < 1 or dims == 32

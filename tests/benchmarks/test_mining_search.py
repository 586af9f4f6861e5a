"""The benchmark of the search of mining: its vectors are what it says, and it measures and plans."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.mining_search import make_vectors, measure, plan, write_vectors
from megatron_llave.config.mining import Search


def test_clustered_vectors_have_the_cosines_that_are_named() -> None:
    queries, targets = make_vectors("clustered", 1000, 256)
    assert (queries * targets).sum(1).mean() == pytest.approx(0.9, abs=0.01)
    near = np.sort(targets @ targets.T, axis=1)[:, -50:-1]
    assert near.mean() == pytest.approx(0.49, abs=0.05)  # two with a cosine of 0.7 to their centre
    assert abs(make_vectors("random", 1000, 256)[1].mean()) < 0.001


def test_both_searches_are_measured(tmp_path: Path, groups: ProcessGroupCollection) -> None:
    pytest.importorskip("faiss")
    write_vectors(tmp_path / "x.npy", "clustered", 300, 16)
    exact, faiss = (measure(tmp_path / "x.npy", 20, how) for how in (Search(), Search("faiss", 10**6)))
    assert exact["pairs"] == 300 and exact["recall"] is None and exact["checksum"] == faiss["checksum"]
    assert faiss["recall"] == 1 and exact["ranks"][0]["peak"] >= exact["ranks"][0]["peak_before"] > 1e8


def test_the_plan_divides_the_comparisons_by_the_ranks() -> None:
    one, many = plan(256, 100, 1, 3.6), plan(256, 100, 64, 3.6)
    assert one["hours"] == pytest.approx(1) and many["hours"] == pytest.approx(1 / 64)
    assert one["products_TFLOP"] == 512 and many["targets_GB"] == 0.016 and one["gathered_GB"] == 0

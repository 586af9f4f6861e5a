"""The lists of FAISS: what is hidden stays out, similarities are exact, what is refused. Of ranks: test_mined.py."""

import sys

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.config.mining import Search
from megatron_llave.errors import ConfigError
from megatron_llave.evaluation.ranking import rank_found, search, similarities
from megatron_llave.mining.approximate import MARGIN, ListIndex, require_faiss


def unit(count: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("targets", [1, 30, 500])
def test_with_all_lists_it_is_the_exact_search(targets: int, groups: ProcessGroupCollection) -> None:
    pytest.importorskip("faiss")
    rows, queries = unit(targets, 0), unit(9, 1)
    rows[3::50] = rows[0]  # of equal ones the first comes first
    hidden = np.random.default_rng(0).random((9, targets)) < 0.03
    hidden[2, : targets // 2] = True
    hidden[3] = False
    hidden[3, (queries[3] @ rows.T).argsort(descending=True)[:20]] = True  # its nearest ones: others take their places
    index = ListIndex(rows, 0, targets, 10**6)
    found, similarity = index.find(queries, 10, hidden.nonzero())
    assert found.shape[1] <= 10 + MARGIN + 10
    row, column = (found >= 0).nonzero(as_tuple=True)
    assert not hidden[row, found[row, column]].any()
    assert torch.equal(similarity[row, column], similarities(queries, rows)[row, found[row, column]])
    exactly = search(queries, rows, 10, left_out=tuple(torch.from_numpy(hidden).nonzero().T.contiguous()))
    enough = hidden.sum(1) <= 10 + MARGIN
    for one, other in zip(rank_found(found, similarity, 10), exactly):
        assert torch.equal(one[enough], other[enough])


def test_a_rank_without_targets_finds_none(groups: ProcessGroupCollection) -> None:
    pytest.importorskip("faiss")
    found, similarity = ListIndex(unit(3, 0), 3, 3, 1).find(unit(2, 1), 5, (np.zeros(0, int),) * 2)
    assert found.shape == similarity.shape == (2, 0)
    assert rank_found(found, similarity, 5)[0].tolist() == [[-1] * 5] * 2


def test_without_faiss_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"--search faiss needs faiss: pip install faiss-cpu \(the extra mine\)"):
        require_faiss()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "hnsw"}, "--search='hnsw' is not one of exact, faiss"),
        ({"probes": 0}, "--probes=0 must be a finite number of at least 1"),
        ({"probes": 8}, "--probes=8 has no effect without --search faiss; give that too, or leave it out"),
    ],
)
def test_impossible_searches_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Search(**values)

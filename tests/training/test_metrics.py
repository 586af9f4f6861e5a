"""The step's record from what the loss saw."""

import pytest
import torch
from logical_gpu import LogicalGpu

from megatron_llave.batch import PackedSequences, PairBatch
from megatron_llave.loss.contrastive import SimilarityStatistics
from megatron_llave.loss.similarities import HISTOGRAM_BINS
from megatron_llave.training.metrics import histograms, step_metrics


def batch(pairs: int, tokens: int, skipped: int) -> PairBatch:
    ids = torch.arange(pairs)
    lengths = [0] * (2 * pairs - 1) + [tokens, 3]  # the last is padding
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    empty = torch.zeros(0, dtype=torch.int64)
    row = PackedSequences(empty, boundaries, lengths, 2 * pairs, empty, 0, empty, empty, empty)
    return PairBatch(row, ids, ids, torch.arange(3), "birds", [str(i) for i in range(pairs)], skipped)


def seen(loss: float, positive: list[float], hardest: list[float]):
    values = (torch.tensor(x, dtype=torch.float64) for x in (positive, hardest, [3.0, 5.0], [0.5, 0.25]))
    return torch.tensor(loss), SimilarityStatistics(*values)


def test_means_overlap_and_counts(groups) -> None:
    two = [seen(1.0, [0.9, 0.7], [0.1, 0.3]), seen(2.0, [0.5, 0.3], [0.2, 0.0])]
    record = step_metrics(two, [batch(2, 40, 1), batch(2, 60, 0)], groups.dp)
    assert record["loss"] == pytest.approx(1.5)
    assert (record["pairs"], record["tokens"], record["skipped"], record["hard_negatives"]) == (4, 100, 1, 6)
    assert record["positive_similarity"] == pytest.approx(0.6)
    assert record["hardest_negative_similarity"] == pytest.approx(0.15)
    assert record["effective_negatives"] == pytest.approx(4.0)
    assert record["hardest_share"] == pytest.approx(0.375)
    # One positive of four and one hardest negative of four share the bin at 0.3.
    assert record["similarity_overlap"] == pytest.approx(0.25)
    assert record["similarity_margin"] == pytest.approx(0.45)
    assert record["similarity_auc"] == pytest.approx(15.5 / 16)  # of 16 pairs, one of equal ones


def test_soft_labels_are_logged_apart_where_there_are_some(groups) -> None:
    without, some = seen(1.0, [0.9, 0.7], [0.1, 0.3]), seen(1.0, [0.9, 0.7], [0.1, 0.3])
    some[1].soft_label = torch.tensor([torch.nan, 0.5])
    record = step_metrics([without, some], [batch(2, 40, 0)] * 2, groups.dp)
    assert record["soft_label_loss"] == 0.5 and record["targets"] == 4
    assert "soft_label_loss" not in step_metrics([without], [batch(2, 40, 0)], groups.dp)


def test_nothing_seen_before_the_last_stage(groups) -> None:
    record = step_metrics([], [batch(2, 40, 0)], groups.dp)
    assert record["pairs"] == 2 and record["loss"] == 0 and record["similarity_overlap"] == 0


def test_histograms_hold_every_query(groups) -> None:
    counted = histograms([seen(1.0, [1.0, 0.99], [-1.0, 0.01])], [batch(2, 40, 0)], groups.dp)
    assert [len(x) for x in counted.values()] == [HISTOGRAM_BINS] * 3
    assert counted["positive_histogram"][-1] == 2 and sum(counted["positive_histogram"]) == 2
    assert counted["hardest_negative_histogram"][0] == 1 and counted["hardest_negative_histogram"][25] == 1
    # 0.5 and 0.25 of 1.
    of_shares = counted["hardest_share_histogram"]
    assert of_shares[25] == 1 and of_shares[12] == 1 and sum(of_shares) == 2


def test_a_step_with_histograms_waits_once_more_for_the_device(groups) -> None:
    with LogicalGpu() as gpu:
        loss, statistics = seen(1.0, [1.0, 0.99], [-1.0, 0.01])
        for name, value in vars(statistics).items():
            setattr(statistics, name, value if value is None else value.to("cuda"))
        row = batch(2, 40, 0)
        row.query_ids = row.query_ids.to("cuda")
        shares, before = [(loss.to("cuda"), statistics)], gpu.waits.total()
        counted = histograms(shares, [row], groups.dp)
        assert gpu.waits.total() == before + 1, gpu.waits
    assert sum(counted["hardest_share_histogram"]) == 2


def test_query_without_a_negative_counts_only_where_it_can(groups) -> None:
    lonely = [seen(1.0, [0.5, 0.7], [-torch.inf, 0.25])]
    record = step_metrics(lonely, [batch(2, 40, 0)], groups.dp)
    assert record["positive_similarity"] == pytest.approx(0.6)
    assert record["hardest_negative_similarity"] == pytest.approx(0.25)
    counted = histograms(lonely, [batch(2, 40, 0)], groups.dp)
    assert [sum(x) for x in counted.values()] == [2, 1, 2]
    lonely[0][1].hardest_share = torch.tensor([torch.nan, 1.0])
    assert histograms(lonely, [batch(2, 40, 0)], groups.dp)["hardest_share_histogram"] == [0] * 49 + [1]

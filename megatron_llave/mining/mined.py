"""Mines the negatives of a subset from the neighbours that models find, and counts what each rule has left out."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_llave.config.mining import Rules
from megatron_llave.mining.inputs import SubsetInputs
from megatron_llave.mining.neighbours import Neighbours
from megatron_llave.mining.rules import choose, elect, has_positive, judge, shuffled

BINS = 40
"""Bins of a histogram of similarities, from -1 to 1."""


@dataclass
class Mined:
    """The negatives of a subset's q queries; K is rules.negatives."""

    negatives: np.ndarray
    """[q, K] int64 numbers of targets, best first; -1 behind the last."""
    similarity: np.ndarray
    """[q, K] float32, of the first model that keeps the negative; -inf behind the last."""
    dropped: np.ndarray
    """[q] bool: too few models find a positive of the query above rules.min_positive, so that it has no negatives."""
    positives: np.ndarray
    """[q, 3] float64 similarity of the least similar, the mean and the most similar positive, of the first model."""
    report: dict[str, Any] = field(default_factory=dict)
    """Counts and histograms, for the manifest."""


def mine_subset(inputs: SubsetInputs, models: Sequence[Iterable[Neighbours]], rules: Rules) -> Mined:
    """Apply the rules to the neighbours that each model finds (neighbours.NearestTargets), block by block.

    The similarities in the histograms, and those that are written, are of the first model (that keeps the negative).
    """
    counts, emptied, of_models = Counter(), Counter(), [Counter() for _ in models]
    histograms = {name: np.zeros(BINS, np.int64) for name in ("positives", "candidates", "negatives")}
    uses = np.zeros(len(inputs.target_ids), np.int64)
    parts = []
    for found in zip(*models):
        kept, left_out_of_models = [], []
        for one, counted in zip(found, of_models):
            exists = one.targets >= 0
            keep, left_out = judge(one.similarity, exists, one.positives, rules)
            kept.append(keep)
            left_out_of_models.append(left_out)
            totals = {name: int(numbers.sum()) for name, numbers in left_out.items()}
            counted.update(totals, candidates=int(exists.sum()), kept=int(keep.sum()))
        targets = [one.targets for one in found]
        elected = elect(targets, kept, rules.votes)
        if rules.pick == "random":
            elected = shuffled(elected, found[0].rows.start, rules.seed)
        negatives, used_up = choose(elected, rules.negatives, rules.max_uses, uses)
        similarity = _similarity(negatives, found, kept)
        some = (negatives >= 0).sum(1)
        counts.update(
            votes=int((elect(targets, kept, 1) >= 0).sum() - (elected >= 0).sum()) if rules.votes > 1 else 0,
            max_uses=used_up,
            negatives=int((elected >= 0).sum()) - used_up - int(some.sum()),
            kept=int(some.sum()),
            without=int((some == 0).sum()),
        )
        first, dropped = found[0], _dropped(found, rules)
        passed = [(elect(targets, kept, 1) >= 0).any(1), (elected >= 0).any(1)]
        emptied.update(_emptied(left_out_of_models[0], *passed)[(some == 0) & ~dropped].tolist())
        histograms["positives"] += histogram(first.positives.least)
        histograms["candidates"] += histogram(first.similarity[first.targets >= 0])
        histograms["negatives"] += histogram(similarity[negatives >= 0])
        positives = np.stack([first.positives.least, first.positives.mean, first.positives.most], 1)
        parts.append((negatives, similarity, dropped, positives))
    mined = Mined(*(np.concatenate(arrays) for arrays in zip(*parts)))
    mined.report = _report(inputs, mined, counts, of_models, histograms)
    mined.report["emptied_by"] = dict(sorted(emptied.items()))
    return mined


def histogram(similarity: np.ndarray) -> np.ndarray:
    """[BINS] int64 numbers of similarities in bins of equal width from -1 to 1; those beyond count with the ends."""
    return np.histogram(similarity.clip(-1, 1), BINS, (-1, 1))[0]


def _dropped(found: Sequence[Neighbours], rules: Rules) -> np.ndarray:
    if rules.min_positive is None:
        return np.zeros(len(found[0].targets), bool)
    return sum(has_positive(one.positives, rules.min_positive).astype(int) for one in found) < rules.votes


def _emptied(left_out: dict[str, np.ndarray], passed: np.ndarray, elected: np.ndarray) -> np.ndarray:
    """[n] the rule after which no candidate of a query was left, for queries without negatives.

    Args:
        left_out: [n] numbers of candidates that each rule of the first model has left out, in their order.
        passed: [n] whether a model keeps a candidate of the query.
        elected: [n] whether enough models do.
    """
    by = np.full(len(passed), "no_candidates", dtype=object)
    for name, numbers in left_out.items():
        by[numbers > 0] = name
    by[passed] = "votes"
    by[elected] = "max_uses"
    return by


def _similarity(negatives: np.ndarray, found: Sequence[Neighbours], kept: Sequence[np.ndarray]) -> np.ndarray:
    """[n, K] float32 similarity of each negative by the first model that keeps it."""
    similarity = np.full(negatives.shape, -np.inf, np.float32)
    for one, keep in zip(reversed(found), reversed(kept)):
        for column, target in enumerate(negatives.T):
            same = (one.targets == target[:, None]) & keep & (target >= 0)[:, None]
            row, place = same.nonzero()
            similarity[row, column] = one.similarity[row, place]
    return similarity


def _report(
    inputs: SubsetInputs,
    mined: Mined,
    counts: Counter[str],
    of_models: Sequence[Counter[str]],
    histograms: dict[str, np.ndarray],
) -> dict[str, Any]:
    some = (mined.negatives >= 0).any(1)
    of_pairs = inputs.queries_of_pairs
    return {
        "pairs": len(of_pairs),
        "pairs_not_embedded": int((of_pairs < 0).sum()),
        "queries": len(inputs.query_ids),
        "targets": len(inputs.target_ids),
        "pairs_with_negatives": int(some[of_pairs[of_pairs >= 0]].sum()),
        "queries_dropped": int(mined.dropped.sum()),
        "queries_without_negatives": counts.pop("without") - int(mined.dropped.sum()),
        "models": [dict(counted) for counted in of_models],
        "left_out_together": {name: counts[name] for name in ("votes", "max_uses", "negatives")},
        "kept": counts["kept"],
        "similarity": {name: numbers.tolist() for name, numbers in histograms.items()},
    }

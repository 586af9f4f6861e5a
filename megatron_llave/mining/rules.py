"""The rules by which candidates become a query's hard negatives: pure functions of similarities and ranks.

Shapes: n queries, k candidates of each, best first, V models. A similarity is a float32 cosine, and thresholds are
computed in float64, so that a rule gives the same answer everywhere. Ranks are counted from 1, after the targets that a
query must not be given are taken out (inputs.SubsetInputs.hidden). docs/mining.md has the rules as formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_llave.config.mining import Rules


@dataclass(frozen=True)
class Positives:
    """Similarities of n queries to their positives, float64 [n] each."""

    least: np.ndarray
    mean: np.ndarray
    most: np.ndarray


def has_positive(positives: Positives, threshold: float) -> np.ndarray:
    """[n] whether a query's most similar positive is above the threshold."""
    return positives.most > threshold


def beyond_rank(ranks: np.ndarray, skip: int) -> np.ndarray:
    """Whether a candidate is not among the first `skip` ones; [n, k] as `ranks`."""
    return ranks > skip


def below_ratio(similarity: np.ndarray, positives: Positives, ratio: float) -> np.ndarray:
    """[n, k] whether s < p - (1 - ratio) |p|, with p the least similar positive; of p >= 0 that is s < ratio p.

    The form with |p| keeps a negative below the positive where p < 0, as ratio p would be above it.
    """
    return similarity < (positives.least - (1 - ratio) * np.abs(positives.least))[:, None]


def below_margin(similarity: np.ndarray, positives: Positives, margin: float) -> np.ndarray:
    """[n, k] whether s < p - margin, with p the least similar positive."""
    return similarity < (positives.least - margin)[:, None]


def below_mean(similarity: np.ndarray, positives: Positives, margin: float) -> np.ndarray:
    """[n, k] whether s < mean of the positives - margin."""
    return similarity < (positives.mean - margin)[:, None]


def judge(
    similarity: np.ndarray, exists: np.ndarray, positives: Positives, rules: Rules
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Apply the rules of one model to candidates, best first.

    Args:
        similarity: [n, k] float32.
        exists: [n, k] bool, False in the places behind the last candidate.
        positives: of the n queries.
        rules: those of one model: all but negatives, max_uses, votes, pick and seed.

    Returns:
        [n, k] bool, which of them may become negatives; and how many of each query's a rule has left out that those
        before it have not, [n] int64 for each rule in their order.
    """
    similarity = similarity.astype(np.float64)
    ranks = np.broadcast_to(np.arange(1, similarity.shape[1] + 1), similarity.shape)
    passed = {
        "min_positive": lambda value: has_positive(positives, value)[:, None],
        "skip": lambda value: beyond_rank(ranks, value),
        "ceiling": lambda value: similarity <= value,
        "floor": lambda value: similarity >= value,
        "ratio": lambda value: below_ratio(similarity, positives, value),
        "margin": lambda value: below_margin(similarity, positives, value),
        "mean_margin": lambda value: below_mean(similarity, positives, value),
    }
    kept, left_out = exists & (ranks <= rules.depth), {}
    for name, passes in passed.items():
        value = getattr(rules, name)
        after = kept & passes(value) if value is not None else kept
        left_out[name] = kept.sum(1) - after.sum(1)
        kept = after
    return kept, left_out


def elect(candidates: Sequence[np.ndarray], kept: Sequence[np.ndarray], votes: int) -> np.ndarray:
    """Order the candidates that at least `votes` models keep: by votes, then by the sum of their ranks, then by number.

    Votes and ranks are those of the models that keep a candidate. With one model this is the order of its ranks.

    Args:
        candidates: [n, k] int64 candidates of each model, best first.
        kept: [n, k] bool of each model.
        votes: number of models.

    Returns:
        [n, V * k] int64, best first, -1 behind the last.
    """
    num_models, width = len(candidates), candidates[0].shape[1]
    nobody = np.iinfo(np.int64).max
    named = np.concatenate([np.where(keep, found, nobody) for found, keep in zip(candidates, kept)], axis=1)
    ranks = np.tile(np.arange(1, width + 1), num_models)[None].repeat(len(named), 0)
    order = np.argsort(named, axis=1, kind="stable")
    named, ranks = np.take_along_axis(named, order, 1), np.take_along_axis(ranks, order, 1)
    count, total = np.ones_like(named), ranks.copy()
    for apart in range(1, num_models):  # a candidate comes at most once for each model
        same = named[:, apart:] == named[:, :-apart]
        count[:, :-apart] += same
        total[:, :-apart] += np.where(same, ranks[:, apart:], 0)
    is_first = np.ones(named.shape, bool)
    is_first[:, 1:] = named[:, 1:] != named[:, :-1]
    elected = is_first & (named != nobody) & (count >= votes)
    worst = num_models * width + 1
    # Equal places keep the order of the candidates' numbers, in which they are.
    place = np.where(elected, (num_models - count) * worst + total, nobody)
    best = np.argsort(place, axis=1, kind="stable")
    return np.take_along_axis(np.where(elected, named, -1), best, 1)


def shuffled(elected: np.ndarray, first: int, seed: int) -> np.ndarray:
    """Put the candidates of each query into a random order, which depends on seed and number of the query alone.

    Args:
        elected: [n, w] int64 of `elect`.
        first: number of the first of the n queries.
        seed: rules.seed.

    Returns:
        [n, w] int64, -1 behind the last.
    """
    mixed = elected.copy()
    for row, number in zip(mixed, (elected >= 0).sum(1)):
        row[:number] = np.random.default_rng((seed, first)).permutation(row[:number])
        first += 1
    return mixed


def choose(elected: np.ndarray, most: int, max_uses: int | None, uses: np.ndarray) -> tuple[np.ndarray, int]:
    """Choose the first `most` candidates of each query, query after query, of those that have uses left.

    Args:
        elected: [n, w] int64 of `elect`.
        most: rules.negatives.
        max_uses: rules.max_uses.
        uses: [c] int64 number of queries that each target is a negative of so far; those of these queries are added.

    Returns:
        [n, most] int64, -1 behind the last; and how many elected candidates had no use left.
    """
    chosen, used_up = np.full((len(elected), most), -1, np.int64), 0
    if max_uses is None:
        width = min(most, elected.shape[1])
        chosen[:, :width] = elected[:, :width]
        np.add.at(uses, chosen[chosen >= 0], 1)
        return chosen, used_up
    for row, candidates in enumerate(elected):
        candidates = candidates[candidates >= 0]
        free = candidates[uses[candidates] < max_uses]
        used_up += len(candidates) - len(free)
        taken = free[:most]
        uses[taken] += 1
        chosen[row, : len(taken)] = taken
    return chosen, used_up

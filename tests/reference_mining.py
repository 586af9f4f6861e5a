"""Mining written down plainly in numpy, query by query: what the blocked, sharded code is compared with."""

import numpy as np

from megatron_llave.config.mining import Rules


def exact(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Similarities [q, c] float32 of unit rows, of products that are free of rounding (multiples of 2^-26)."""
    queries, targets = (np.round(rows.astype(np.float64) * 2**26) / 2**26 for rows in (queries, targets))
    return (queries @ targets.T).astype(np.float32) + np.float32(0)


def ranked(row: np.ndarray, hidden: set[int], depth: int) -> np.ndarray:
    """The `depth` best candidates of a query, ties by number, without hidden ones."""
    enough = min(depth + len(hidden), len(row))
    threshold = np.partition(row, -enough)[-enough]
    candidates = np.flatnonzero(row >= threshold)
    order = candidates[np.lexsort((candidates, -row[candidates]))]
    return np.array([c for c in order if c not in hidden][:depth], np.int64)


def allowed(row: np.ndarray, candidates: np.ndarray, positives: list[int], rules: Rules) -> list[int]:
    """Those of the ranked candidates that the rules of one model let pass."""
    of_positives = [float(row[p]) for p in positives]
    least, mean = min(of_positives), sum(of_positives) / len(of_positives)
    if rules.min_positive is not None and not max(of_positives) > rules.min_positive:
        return []
    kept = []
    for rank, candidate in enumerate(candidates.tolist(), start=1):
        s = float(row[candidate])
        ok = rank > rules.skip
        ok &= rules.ratio is None or s < least - (1 - rules.ratio) * abs(least)
        ok &= rules.margin is None or s < least - rules.margin
        ok &= rules.mean_margin is None or s < mean - rules.mean_margin
        ok &= rules.floor is None or s >= rules.floor
        ok &= rules.ceiling is None or s <= rules.ceiling
        if ok:
            kept.append(candidate)
    return kept


def mine(similarities: list[np.ndarray], positives: list[list[int]], hidden: list[set[int]], rules: Rules) -> list:
    """The negatives of each query, by the similarities [q, c] of each model."""
    uses: dict[int, int] = {}
    mined = []
    for query, own in enumerate(positives):
        votes: dict[int, list[int]] = {}
        for of_model in similarities:
            candidates = ranked(of_model[query], hidden[query], rules.depth)
            rank = {c: number for number, c in enumerate(candidates.tolist(), start=1)}
            for candidate in allowed(of_model[query], candidates, own, rules):
                votes.setdefault(candidate, []).append(rank[candidate])
        elected = [c for c, ranks in votes.items() if len(ranks) >= rules.votes]
        elected.sort(key=lambda c: (-len(votes[c]), sum(votes[c]), c))
        if rules.pick == "random":
            elected = np.random.default_rng((rules.seed, query)).permutation(elected).tolist()
        free = [c for c in elected if rules.max_uses is None or uses.get(c, 0) < rules.max_uses][: rules.negatives]
        for candidate in free:
            uses[candidate] = uses.get(candidate, 0) + 1
        mined.append(free)
    return mined

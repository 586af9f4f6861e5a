"""The records of an evaluation: a task to be scored, and the result of scoring it.

A benchmark (evaluation/benchmarks/) reads its files into tasks, evaluate.py embeds their inputs, scoring.py ranks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_llave.embedding.inputs import Input, Inputs


@dataclass(frozen=True)
class Task:
    """Queries, the candidates that each is ranked against, and which candidates are right.

    Each query has candidates of its own, or all queries share one array of them. Tasks may share their inputs, which
    are then embedded once.
    """

    name: str
    meta_task: str
    """classification, vqa, retrieval or grounding."""
    split: str
    """ind (in distribution), ood (out of it) or seen (trained on)."""
    inputs: Inputs
    """Each different input once."""
    queries: np.ndarray
    """[q] int64, numbers of inputs."""
    candidates: np.ndarray
    """[n] int64, numbers of inputs: the shared ones, or those of the first query, then those of the second, ..."""
    right: np.ndarray
    """[q] int64, number of the input that is each query's right candidate."""
    bounds: np.ndarray | None = None
    """[q + 1] int64: query i has the candidates[bounds[i] : bounds[i + 1]], the right one first. None: shared."""
    further: np.ndarray | None = None
    """[q, r] int64, numbers of further inputs that are right too, repeated or filled with `right`. None: none are."""

    @property
    def all_right(self) -> np.ndarray:
        """[q, 1 + r] numbers of all inputs that are right; a row may have one several times."""
        first = self.right[:, None]
        return first if self.further is None else np.concatenate([first, self.further], axis=1)

    def candidates_of(self, query: int) -> np.ndarray:
        """Candidates of a query, [c] int64, numbers of inputs."""
        return self.candidates if self.bounds is None else self.candidates[self.bounds[query] : self.bounds[query + 1]]

    @property
    def num_candidates(self) -> int:
        """Number of different candidates of all queries."""
        return len(self.candidates) if self.bounds is None else len(np.unique(self.candidates))

    @property
    def chance(self) -> float:
        """Expected Precision@1 of guessing, in percent."""
        counts = len(self.candidates) if self.bounds is None else np.diff(self.bounds)
        is_another = np.diff(np.sort(self.all_right, axis=1), axis=1) > 0
        num_right = 1 if self.further is None else 1 + is_another.sum(axis=1)
        return float(np.mean(100.0 * num_right / counts))

    @property
    def num_meeting_themselves(self) -> int:
        """Number of queries that are among their own candidates without being right: they find themselves first."""
        if self.bounds is None:
            is_there = np.isin(self.queries, self.candidates)
        else:
            same = np.repeat(self.queries, np.diff(self.bounds)) == self.candidates
            is_there = np.logical_or.reduceat(same, self.bounds[:-1])
        return int((is_there & (self.queries[:, None] != self.all_right).all(axis=1)).sum())

    @property
    def digest(self) -> str:
        """SHA-256 of the inputs, and of the order of queries and candidates; a result belongs to one digest."""
        digest = hashlib.sha256(self.inputs.digest.encode())
        further = () if self.further is None else (self.further.reshape(-1),)
        for indices in (self.queries, self.candidates, self.right if self.bounds is None else self.bounds, *further):
            digest.update(f"{len(indices)} ".encode() + indices.astype("<i8").tobytes())
        return digest.hexdigest()


def build_task(
    name: str,
    meta_task: str,
    split: str,
    rows: Sequence[tuple[Input, list[Input]]],
    image_folder: str | Path,
    hint: str = "",
) -> Task:
    """Build a task of queries with candidates of their own.

    Args:
        name: of the data set.
        meta_task: see Task.
        split: see Task.
        rows: each query with its candidates, the right one first.
        image_folder: folder that the inputs' files are relative to.
        hint: end of the message about a missing file (Inputs).
    """
    unique = {item for query, candidates in rows for item in (query, *candidates)}
    entries = sorted(unique, key=lambda item: (item.cost, len(item.text), item.text, item.images))
    number_of = {item: number for number, item in enumerate(entries)}
    bounds = np.cumsum([0, *(len(candidates) for _, candidates in rows)], dtype=np.int64)
    candidates = np.array([number_of[item] for _, candidates in rows for item in candidates], np.int64)
    return Task(
        name=name,
        meta_task=meta_task,
        split=split,
        inputs=Inputs(name, entries, image_folder, hint=hint),
        queries=np.array([number_of[query] for query, _ in rows], np.int64),
        candidates=candidates,
        right=candidates[bounds[:-1]],
        bounds=bounds,
    )


@dataclass
class SetResult:
    """The scores of one task, and the best candidates of each query."""

    name: str
    meta_task: str
    """classification, vqa, retrieval or grounding."""
    split: str
    """ind, ood or seen; a seen set tests memory and is left out of every mean."""
    precision_at_1: float
    """Percentage of queries whose best candidate is a right one."""
    chance: float
    """Expected Precision@1 of guessing, in percent."""
    num_queries: int
    num_candidates: int
    overlap: float
    """Overlap coefficient of `positive` and `hardest_negative`, 0 to 1."""
    margin: float | None
    """Mean of `positive` minus `hardest_negative` of the same query; None if no query has a wrong candidate."""
    auc: float | None
    """Probability that a random query's `positive` is above a random query's `hardest_negative`; None as for margin."""
    alignment: float
    """Mean squared distance of queries and their most similar right candidates."""
    uniformity: float | None
    """Log of the mean of exp(-2 squared distance) between candidates; None if there is only one candidate."""
    hub_share: float
    """Percentage of queries won by the most frequent best candidate."""
    num_ties: int
    """Queries in which the most similar wrong candidate is exactly as similar as the most similar right one."""
    positive: list[float]
    """Similarity of each query and its right candidate, the most similar one of several."""
    hardest_negative: list[float]
    """Similarity of each query and its most similar wrong candidate; -inf where it has none."""
    top: list[list[int]]
    """Each query's best candidates, best first, as indices into `candidates`; -1 where there are no more."""
    positives: list[int]
    """Each query's right candidate, as an index into `candidates`."""
    queries: list[str]
    """Keys of the queries' inputs."""
    candidates: list[str]
    """Keys of the inputs of all candidates that `top`, `positives` and `further` name."""
    further: list[list[int]] = field(default_factory=list)
    """Each query's further right candidates, likewise; an empty list: every query has one right candidate."""
    before_training: float | None = None
    """Precision@1 in percent of the weights that the training started from; None if it is not known."""

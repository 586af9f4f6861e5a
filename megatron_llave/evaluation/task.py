"""A ranking task: queries with candidates of their own, the first of them right.

Read from a benchmark by a source (evaluation/benchmarks/mmeb.py), embedded into a store and scored by
scoring.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_llave.embedding.inputs import FileInput, FileInputs


@dataclass(frozen=True)
class RankingTask:
    """One data set of a benchmark: q queries, n candidates over all of them."""

    name: str
    meta_task: str
    """classification, vqa, retrieval or grounding."""
    split: str
    """ind or ood."""
    inputs: FileInputs
    """Each once, those that cost alike side by side."""
    queries: np.ndarray
    """[q] int64, into `inputs`."""
    candidates: np.ndarray
    """[n] int64, into `inputs`: those of the first query in their order, the right one first, then the next query's."""
    bounds: np.ndarray
    """[q + 1] int64: those of query i are candidates[bounds[i] : bounds[i + 1]]."""

    def candidates_of(self, query: int) -> np.ndarray:
        """[c] int64, into `inputs`."""
        return self.candidates[self.bounds[query] : self.bounds[query + 1]]

    @property
    def digest(self) -> str:
        """Of inputs, queries and candidates with their order: what a score belongs to."""
        digest = hashlib.sha256(self.inputs.digest.encode())
        for indices in (self.queries, self.candidates, self.bounds):
            digest.update(f"{len(indices)} ".encode() + indices.astype("<i8").tobytes())
        return digest.hexdigest()


def build_task(
    name: str,
    meta_task: str,
    split: str,
    rows: Sequence[tuple[FileInput, list[FileInput]]],
    image_folder: str | Path,
    hint: str = "",
) -> RankingTask:
    """Collect the unique inputs of rows (query, its candidates with the right one first); `hint`: see FileInputs."""
    unique = {one for query, candidates in rows for one in (query, *candidates)}
    inputs = sorted(unique, key=lambda one: (one.cost, len(one.text), one.text, one.images))
    place = {one: index for index, one in enumerate(inputs)}
    counts = [len(candidates) for _, candidates in rows]
    return RankingTask(
        name=name,
        meta_task=meta_task,
        split=split,
        inputs=FileInputs(name, inputs, image_folder, hint=hint),
        queries=np.array([place[query] for query, _ in rows], np.int64),
        candidates=np.array([place[one] for _, candidates in rows for one in candidates], np.int64),
        bounds=np.cumsum([0, *counts], dtype=np.int64),
    )


@dataclass
class SetResult:
    """One evaluation set, scored."""

    name: str
    meta_task: str
    """classification, vqa, retrieval or grounding."""
    split: str
    """ind, ood or seen; a seen set is a test of memory and is left out of every mean."""
    precision_at_1: float
    """Percent."""
    chance: float
    """Precision@1 of guessing, percent."""
    num_queries: int
    num_candidates: int
    overlap: float
    """Overlap coefficient of `positive` and `hardest_negative`, 0 to 1."""
    alignment: float
    """Mean squared distance of queries and their right candidates."""
    uniformity: float | None
    """Log of the mean of exp(-2 squared distance) between candidates; None: there is only one."""
    hub_share: float
    """Queries that the most frequent best candidate wins, percent."""
    num_ties: int
    """Queries in which another candidate is as similar as the right one, and none more."""
    positive: list[float]
    """Per query, similarity of its right candidate."""
    hardest_negative: list[float]
    """Per query, largest similarity of another candidate."""
    top: list[list[int]]
    """Per query, the best candidates, best first: indices into `candidates`, negative ones stand for nothing."""
    positives: list[int]
    """Per query, index of its right candidate."""
    queries: list[str]
    """Input keys."""
    candidates: list[str]
    """Input keys."""

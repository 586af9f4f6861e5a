"""A ranking task: queries with candidates of their own, the first of them right.

Read from a benchmark by a source (sources/mmeb_evaluation.py), embedded into a store and scored by
ranking_evaluation.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_llave.data.file_inputs import FileInput, FileInputs


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

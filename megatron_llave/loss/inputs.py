"""What a loss takes: the embeddings of pairs, and what the data says about the pairs beside their content.

Shapes: b pairs, a targets, m hard negatives, d width of the embedding.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_llave.batch import PairBatch, RowsOfRanks, rows_of_ranks, rows_of_targets
from megatron_llave.loss.ragged import mean_of_rows, pad_rows


@dataclass
class PairEmbeddings:
    """Embeddings of the pairs of one or more PairBatches."""

    query: Tensor
    """[b, d] of unit length."""
    target: Tensor
    """[a, d] of unit length, in the order of the queries that they are the positives of."""
    hard_negatives: Tensor
    """[m, d] of unit length; m may be 0."""
    target_rows: Tensor | None = None
    """[a] int64: the row of `query` that each target belongs to, not falling; None: target i is that of query i."""
    hard_rows: Tensor | None = None
    """[m] int64: the row of `query` that each hard negative belongs to, not falling; None: not known."""
    most_targets: int | None = None
    """Largest number of targets of a query, which the host knows without waiting for the device; None: not known."""
    most_hard_negatives: int | None = None
    """Largest number of hard negatives of a query, as above."""

    @staticmethod
    def of(outputs: list[Tensor], batches: list[PairBatch]) -> "PairEmbeddings":
        """Split the model's output [b + a + m, d] of each batch, and concatenate the parts over the batches."""
        sizes = [[batch.num_pairs, batch.num_targets, batch.num_hard_negatives] for batch in batches]
        parts = zip(*(output.split(size) for output, size in zip(outputs, sizes)))
        most = (_largest(getattr(batch, name) for batch in batches) for name in ("most_targets", "most_hard_negatives"))
        return PairEmbeddings(*map(torch.cat, parts), *_rows_of(batches), *most)

    @property
    def rows_of_targets(self) -> Tensor:
        """[a] row of each target, also where every query has one."""
        return rows_of_targets(self.target_rows, len(self.query), self.query.device)

    @property
    def rows_of_hard(self) -> Tensor:
        """[m] row of each hard negative.

        Raises:
            ValueError: there are hard negatives, and it is not known whose they are.
        """
        if self.hard_rows is not None:
            return self.hard_rows
        if len(self.hard_negatives):
            raise ValueError("hard_rows is missing, which says whose the hard negatives are")
        return self.query.new_zeros(0, dtype=torch.int64)

    def pad_targets(self, values: Tensor, fill: float) -> Tensor:
        """[b, k] values [a] of each query's targets; see `pad_rows`."""
        return pad_rows(values, self.rows_of_targets, len(self.query), fill, self._most_targets)

    def pad_hard(self, values: Tensor, fill: float) -> Tensor:
        """[b, k] values [m] of each query's hard negatives; see `pad_rows`."""
        return pad_rows(values, self.rows_of_hard, len(self.query), fill, self.most_hard_negatives)

    def mean_of_targets(self, values: Tensor) -> Tensor:
        """[b] mean of the values [a] of each query's targets."""
        return mean_of_rows(values, self.rows_of_targets, len(self.query), self._most_targets)

    @property
    def _most_targets(self) -> int | None:
        return 1 if self.target_rows is None else self.most_targets

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairEmbeddings":
        """Apply a function to the embeddings of queries, targets and hard negatives."""
        names = ("query", "target", "hard_negatives")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def _rows_of(batches: list[PairBatch]) -> tuple[Tensor | None, Tensor | None]:
    """Return target_rows and hard_rows of several batches together."""
    firsts = [0, *itertools.accumulate(batch.num_pairs for batch in batches)]
    targets = hard = None
    if any(batch.target_rows is not None for batch in batches):
        targets = torch.cat([batch.rows_of_targets + first for batch, first in zip(batches, firsts)])
    if all(batch.hard_rows is not None for batch in batches):
        hard = torch.cat([batch.hard_rows + first for batch, first in zip(batches, firsts)])
    return targets, hard


def _largest(numbers: Iterable[int | None]) -> int | None:
    """The largest number; None if one of them is not known."""
    numbers = list(numbers)
    return None if None in numbers else max(numbers)


@dataclass
class PairIds:
    """What the data says about the pairs of one or more PairBatches, beside their content."""

    query: Tensor
    """[b] int64 hashed ids, by which equal queries and targets are found."""
    target: Tensor
    """[a] int64."""
    hard_negatives: Tensor
    """[m] int64."""
    of_ranks: RowsOfRanks | None = None
    """Rows of each data-parallel rank; None: the ranks have not exchanged them."""
    scores: Tensor | None = None
    """[a + m] float32 scores of targets and hard negatives, NaN where there is none; None: no pair has scores."""

    @staticmethod
    def of(batches: list[PairBatch]) -> "PairIds":
        """Concatenate the ids and scores of several batches."""
        names = ("query_ids", "target_ids", "hard_negative_ids")
        tensors = (torch.cat([getattr(batch, name) for batch in batches]) for name in names)
        return PairIds(*tensors, rows_of_ranks(batches), _scores_of(batches))


def _scores_of(batches: list[PairBatch]) -> Tensor | None:
    """Return the scores of several batches together: of all targets, then of all hard negatives."""
    if all(batch.scores is None for batch in batches):
        return None
    parts = []
    for batch in batches:
        sizes = [batch.num_targets, batch.num_hard_negatives]
        unknown = torch.full((sum(sizes),), torch.nan, device=batch.target_ids.device)
        parts.append((unknown if batch.scores is None else batch.scores).split(sizes))
    return torch.cat([part for kind in zip(*parts) for part in kind])

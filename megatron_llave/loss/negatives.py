"""Which targets and hard negatives the loss compares each query with, and which of them are masked.

The shapes are those of contrastive.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave.batch import RowsOfRanks
from megatron_llave.config.loss import LossConfig
from megatron_llave.distributed.collectives import all_gather_rows, row_counts
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.loss.ragged import mean_of_rows, pad_rows, row_starts

Number = TypeVar("Number", float, Tensor)


def rows_of_group(embeddings: PairEmbeddings, ids: PairIds | None, group: dist.ProcessGroup | None) -> RowsOfRanks:
    """Rows of each rank of a group, which the ranks exchange if `ids` do not know them."""
    if group is not None and ids is not None and ids.of_ranks is not None:
        return ids.of_ranks
    return RowsOfRanks(*row_counts(group, embeddings.query, embeddings.target, embeddings.hard_negatives))


def share_of_mean(total: Number, counts: list[int]) -> Number:
    """Scale the sum over a rank's rows so that the mean over the ranks is the mean over all rows, `counts` per rank."""
    return total * len(counts) / max(1, sum(counts))


@dataclass
class Several:
    """Which targets belong to which query, where some query of any rank has several."""

    rows: Tensor
    """[a] row of this rank that each of its targets belongs to."""
    starts: list[int]
    """b + 1 boundaries: this rank's row i has its targets starts[i] to starts[i + 1] - 1."""
    most: int
    """Largest number of targets of a row of this rank."""
    owners: Tensor
    """[A] row of all ranks that each target belongs to."""
    is_one_of_several: Tensor
    """[A] whether the query that a target belongs to has several."""
    log_weights: Tensor
    """[A] logarithm of a target's weight in the loss of its query, 1 / (number of its targets)."""

    def to_rows(self, values: Tensor, fill: float) -> Tensor:
        """[b, most targets of a query] values [a] of this rank's targets, filled up."""
        return pad_rows(values, self.rows, len(self.starts) - 1, fill, self.most)


def find_several(rows: Tensor, query: Tensor, context: "Context") -> Several:
    """Whose the targets of all ranks are; `rows` [a] are those of this rank. The host waits once for the device."""
    owners = all_gather_rows(rows + context.first_row, context.target_counts, context.group)
    numbers = row_starts(owners, context.num_rows).diff()[owners]  # [A]
    starts = row_starts(rows, len(query)).tolist()
    most = max((end - start for start, end in pairwise(starts)), default=0)
    return Several(rows, starts, most, owners, numbers > 1, -numbers.to(query.dtype).log())


@dataclass
class Context:
    """Everything that the computation needs besides the embeddings."""

    config: LossConfig
    group: dist.ProcessGroup | None
    chunk: int
    counts: list[int]
    """Rows of each rank."""
    target_counts: list[int]
    """Targets of each rank."""
    hard_counts: list[int]
    """Hard negatives of each rank."""
    ids: PairIds | None = None
    """Ids of the pairs and hard negatives of all ranks, [B], [A] and [M]; None where nothing is masked by them."""
    several: Several | None = None
    """None: every query of all ranks has one target."""
    reward_query: Tensor | None = None
    """[b, d] by the reward model; None: the model judges hardness itself."""
    reward_columns: Tensor | None = None
    """[C, d] by the reward model."""

    @property
    def num_rows(self) -> int:
        """B, the number of rows of all ranks."""
        return sum(self.counts)

    @property
    def num_targets(self) -> int:
        """A, the number of targets of all ranks."""
        return sum(self.target_counts)

    @property
    def has_several(self) -> bool:
        """Whether some query of any rank has several targets."""
        return self.num_targets > self.num_rows

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""
        return 0 if self.group is None else self.group.rank()

    @property
    def first_row(self) -> int:
        """Row of all ranks that this rank's first row is."""
        return sum(self.counts[: self.rank])

    @property
    def first(self) -> int:
        """Column of this rank's first target."""
        return sum(self.target_counts[: self.rank])

    @property
    def local(self) -> slice:
        """Columns of this rank's targets."""
        return slice(self.first, self.first + self.target_counts[self.rank])

    @property
    def is_symmetric(self) -> bool:
        """Whether targets are compared with queries too."""
        return self.config.directions == "symmetric"

    @property
    def scale(self) -> float:
        """Factor of the sum over this rank's rows that makes the mean over ranks the mean over rows and directions."""
        return share_of_mean(1.0, self.counts) / (2 if self.is_symmetric else 1)


def gather_ids(embeddings: PairEmbeddings, ids: PairIds | None, context: Context) -> PairIds:
    """Ids of all ranks; a ValueError without those of all of this rank's rows."""
    numbers = [len(embeddings.query), len(embeddings.target), len(embeddings.hard_negatives)]
    if ids is None or [len(ids.query), len(ids.target), len(ids.hard_negatives)] != numbers:
        rule = "mask_same_target" if context.config.mask_same_target else "a query with several targets"
        raise ValueError(f"{rule} needs the ids of all queries, targets and hard negatives")
    return PairIds(
        all_gather_rows(ids.query, context.counts, context.group),
        all_gather_rows(ids.target, context.target_counts, context.group),
        all_gather_rows(ids.hard_negatives, context.hard_counts, context.group),
    )


@dataclass
class Chunk:
    """A part of this rank's rows."""

    rows: slice
    targets: slice
    """The targets of these rows."""
    own: tuple[Tensor, Tensor]
    """[q] and [q]: the row of the chunk and the column of each of its targets."""


def chunks_of(query: Tensor, context: Context) -> Iterator[Chunk]:
    """Yield the chunks of this rank's rows."""
    several, num_rows = context.several, len(query)
    for start in range(0, num_rows, context.chunk):
        rows = slice(start, min(start + context.chunk, num_rows))
        targets = rows if several is None else slice(several.starts[rows.start], several.starts[rows.stop])
        column = torch.arange(targets.start, targets.stop, device=query.device)
        row = (column if several is None else several.rows[targets]) - start
        yield Chunk(rows, targets, (row, column + context.first))


@dataclass
class Masks:
    """Which columns are masked, that is, are not negatives of the rows of a chunk."""

    to_target: Tensor | None
    """[n, C] True where the column is masked for the row's query; False at its targets. None: no column is masked."""
    to_query: Tensor | None
    """[n, A] True where the row's query is masked for the column's target; False at its targets. None as above."""


def find_masks(cosines: Tensor, chunk: Chunk, positives: Tensor, context: Context) -> Masks:
    """Masks of a chunk's cosines [n, C]; `positives` [A] are the cosines of all targets with their queries."""
    config = context.config
    if context.ids is None and config.mask_margin is None:
        return Masks(None, None)
    to_target = torch.zeros_like(cosines, dtype=torch.bool)
    if context.ids is not None:
        _mask_equal_ids(to_target, chunk, context)
    to_query = to_target[:, : context.num_targets].clone()
    if config.mask_margin is not None:
        # Compare with the positive of the row's query, and in the other direction with that of the column's target.
        of_rows = mean_of_targets(positives[context.local], context)[chunk.rows, None]
        to_target |= is_above(cosines, of_rows, config.mask_margin)
        to_query |= is_above(cosines[:, : context.num_targets], positives, config.mask_margin)
    to_target[chunk.own] = to_query[chunk.own] = False
    return Masks(to_target, to_query)


def is_above(cosines: Tensor, positives: Tensor, margin: float) -> Tensor:
    """Whether cosines are above those of the positives, to which they are broadcast, by more than a margin.

    A few roundings are tolerated, or chance would decide whether a copy of the positive is above it.
    """
    return cosines > positives + (margin + 8 * torch.finfo(cosines.dtype).eps)


def _mask_equal_ids(masked: Tensor, chunk: Chunk, context: Context) -> None:
    """Set `masked` [n, C] where a query and a column have an equal id, so far as a rule says so."""
    ids, several, num_targets = context.ids, context.several, context.num_targets
    row, column = chunk.own
    if context.config.mask_same_target:
        first = slice(context.first_row + chunk.rows.start, context.first_row + chunk.rows.stop)
        of_columns = ids.query if several is None else ids.query[several.owners]
        masked[:, :num_targets] = ids.query[first, None] == of_columns
    same = ids.target[column, None] == torch.cat([ids.target, ids.hard_negatives])  # [q, C]
    if several is None:
        masked |= same
        return
    if not context.config.mask_same_target:
        has_several = several.is_one_of_several[column, None]  # [q, 1]
        same[:, :num_targets] &= has_several | several.is_one_of_several
        same[:, num_targets:] &= has_several
    masked |= torch.zeros_like(masked, dtype=torch.int32).index_add_(0, row, same.int()) > 0


def mean_of_targets(values: Tensor, context: Context) -> Tensor:
    """[b] mean over each row's targets of values [a] of this rank's targets."""
    several = context.several
    return values if several is None else mean_of_rows(values, several.rows, len(several.starts) - 1, several.most)

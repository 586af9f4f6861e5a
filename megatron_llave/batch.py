"""The records that cross data -> model -> loss.

Shapes: n sequences, t tokens of the packed row, k tiles, p patches per tile, v visual tokens, u blended rows,
b pairs, m hard negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_llave.errors import DataError


@dataclass
class Side:
    """One half of a pair, or one input of an evaluation: text, pictures, or both."""

    text: str
    images: list[bytes]
    """Encoded image files (PNG, JPEG, ...), byte for byte as stored in the shard."""
    frames: np.ndarray | None = None
    """[frames, height, width, 3] uint8 RGB, of a video, which then is all there is besides the text."""

    @staticmethod
    def read(text: str, *images: str | Path) -> "Side":
        """A text with the picture files that go with it.

        Raises:
            DataError: names a file that cannot be read.
        """
        try:
            return Side(text, [Path(image).read_bytes() for image in images])
        except OSError as error:
            raise DataError(f"picture {error.filename} cannot be read: {error.strerror}") from error


@dataclass
class Pair:
    """A query and its target as they come out of a shard, not yet decoded."""

    key: str
    """Shard key: unique in its subset, named in error messages."""
    subset: str
    query: Side
    target: Side
    query_id: str
    """Two queries with equal ids are the same query."""
    target_id: str
    """Two targets with equal ids are the same target: not a negative when `loss.mask_same_target` is on."""
    hard_negatives: list[Side] = field(default_factory=list)
    """Further targets, wrong for this query and nobody's positive."""
    hard_negative_ids: list[str] = field(default_factory=list)
    """One per hard negative; equal to a target_id where they are the same thing."""


@dataclass
class PackedSequences:
    """n sequences laid end to end in one row of t tokens, padded only at its end."""

    tokens: Tensor
    """[t] int64 token ids; 0 where a visual token or padding stands."""
    cu_seqlens: Tensor
    """[n + 1] int32 boundaries of the sequences; one entry more when the row ends in padding."""
    max_seqlen: int
    """Length in tokens of the longest sequence, padding counted as one."""
    num_sequences: int
    """n, without the padding."""
    num_tokens: int
    """t, without the padding."""
    tiles: Tensor
    """[k, 3, height, width] uint8 pixels of all tiles, in the order of the sequences; k may be 0."""
    visual_source: Tensor
    """[v] int64: visual token i is row visual_source[i] of the tiles' features [k * p]; row k * p is image_newline,
    row k * p + 1 + j is blended row j."""
    visual_position: Tensor
    """[v] int64: where visual token i stands in the packed row."""
    blank: Tensor | None = None
    """[k] bool: tiles whose normalised pixels are zeros, which no uint8 level gives; None: there are none."""
    blend_source: Tensor | None = None
    """[u, 4] int64: rows of the tiles' features that a blended row is the weighted sum of (an interpolated feature
    map is made of such rows); None: there are none."""
    blend_weights: Tensor | None = None
    """[u, 4] float32 weights, with blend_source."""
    features: Tensor | None = None
    """[k, p, vision hidden] what a frozen tower made of the tiles in the first pass over them, kept for the second."""

    @property
    def last_token(self) -> Tensor:
        """[n] int64 position of each sequence's last token, the one that is pooled."""
        return self.cu_seqlens[1 : self.num_sequences + 1].long() - 1

    def to(self, device: torch.device | str) -> "PackedSequences":
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})


@dataclass
class PairBatch:
    """A micro batch: b queries, then their b targets, then m hard negatives, packed into one row."""

    sequences: PackedSequences
    """2 * b + m sequences; b may be 0 when every pair of the micro batch was unreadable."""
    query_ids: Tensor
    """[b] int64 hash of each query_id."""
    target_ids: Tensor
    """[b] int64 hash of each target_id."""
    hard_negative_ids: Tensor
    """[m] int64 hash of each hard negative's id; pairs may have different numbers of them, or none."""
    subset: str
    keys: list[str]
    """b shard keys."""
    num_skipped: int = 0
    """Pairs left out because they could not be read; over the micro batches of a step they sum up to all of them."""
    num_cut: int = 0
    """Sequences whose text was cut to data.max_length."""

    @property
    def num_pairs(self) -> int:
        """b."""
        return len(self.keys)

    @property
    def num_hard_negatives(self) -> int:
        """m."""
        return len(self.hard_negative_ids)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch with every tensor on `device`."""
        return replace(
            self,
            sequences=self.sequences.to(device),
            query_ids=self.query_ids.to(device),
            target_ids=self.target_ids.to(device),
            hard_negative_ids=self.hard_negative_ids.to(device),
        )


@dataclass
class StepBatches:
    """What one data-parallel rank gets for an optimizer step."""

    batches: list[PairBatch]
    """Its micro batches."""
    position: dict[str, Any]
    """Where the data stands after the step (data/pipeline.py), to be saved with the model."""


@dataclass
class PairEmbeddings:
    """Embeddings of the pairs of one or more PairBatches."""

    query: Tensor
    """[b, d] of unit length."""
    target: Tensor
    """[b, d] of unit length; row i is the positive of query row i."""
    hard_negatives: Tensor
    """[m, d] of unit length; m may be 0."""

    @staticmethod
    def of(outputs: list[Tensor], batches: list[PairBatch]) -> "PairEmbeddings":
        """Split the model's output [2 * b + m, d] of each batch, and concatenate the parts over the batches."""
        sizes = [[batch.num_pairs, batch.num_pairs, batch.num_hard_negatives] for batch in batches]
        parts = zip(*(output.split(size) for output, size in zip(outputs, sizes)))
        return PairEmbeddings(*map(torch.cat, parts))

    def map(self, function: Callable[[Tensor], Tensor]) -> "PairEmbeddings":
        """Apply a function to the embeddings of queries, targets and hard negatives."""
        return PairEmbeddings(function(self.query), function(self.target), function(self.hard_negatives))


@dataclass
class PairIds:
    """Hashed ids of the pairs of one or more PairBatches, by which `loss.mask_same_target` finds equal ones."""

    query: Tensor
    """[b] int64."""
    target: Tensor
    """[b] int64."""
    hard_negatives: Tensor
    """[m] int64."""

    @staticmethod
    def of(batches: list[PairBatch]) -> "PairIds":
        """Concatenate the ids of several batches."""
        names = ("query_ids", "target_ids", "hard_negative_ids")
        return PairIds(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))

"""The records that cross data -> model -> loss.

Shapes: n sequences, t tokens of the packed row, k tiles, p patches per tile, v visual tokens, b pairs.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Side:
    """One half of a pair, or one input of an evaluation: text, pictures, or both."""

    text: str
    images: list[bytes]
    """Encoded image files (PNG, JPEG, ...), byte for byte as stored in the shard."""


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
    tiles: Tensor
    """[k, 3, height, width] uint8 pixels of all tiles, in the order of the sequences; k may be 0."""
    visual_source: Tensor
    """[v] int64: visual token i is row visual_source[i] of the tiles' features [k * p]; row k * p is image_newline."""
    visual_position: Tensor
    """[v] int64: where visual token i stands in the packed row."""
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
    """A micro batch: b queries, then their b targets, packed into one row."""

    sequences: PackedSequences
    """2 * b sequences; b may be 0 when every pair of the micro batch was unreadable."""
    query_ids: Tensor
    """[b] int64 hash of each query_id."""
    target_ids: Tensor
    """[b] int64 hash of each target_id."""
    subset: str
    keys: list[str]
    """b shard keys."""
    num_skipped: int = 0
    """Pairs left out of this micro batch because they could not be read."""

    @property
    def num_pairs(self) -> int:
        """b."""
        return len(self.keys)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch with every tensor on `device`."""
        return replace(
            self,
            sequences=self.sequences.to(device),
            query_ids=self.query_ids.to(device),
            target_ids=self.target_ids.to(device),
        )

"""Pairs -> one packed row per micro batch: queries, targets, hard negatives, end to end, padded only at the row's end.

A model family's Processor turns one query or target into ids, tiles and layouts, encode_pairs those of many pairs;
pack_sequences lays encoded sequences into the row and resolves every visual token to its row of the tiles' features.
Shapes as in batch.py: n sequences, t tokens, k tiles, p patches per tile, v visual tokens, u blended rows.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_llave.batch import PackedSequences, Pair, PairBatch, Side
from megatron_llave.errors import DataError

NEWLINE = -1
"""Stands in a visual layout for the learned image_newline vector."""


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """Where each visual token of an image comes from: one row of its features, several rows blended, or the newline."""

    source: np.ndarray
    """int64 [v]: row of the image's own features [k * p]; k * p + j for its blended row j; or NEWLINE."""
    blend_source: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    """int64 [u, 4]: rows of the image's own features that a blended row is made of."""
    blend_weights: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """float32 [u, 4]: what each of them counts."""

    def __len__(self) -> int:
        """v."""
        return len(self.source)


IMAGE = -200
"""Stands in the ids for all visual tokens of one image; never a vocabulary id."""


@dataclass(frozen=True)
class TileShape:
    """What a packed row needs to know about tiles."""

    size: int
    """Pixels along one side."""
    patches: int
    """p, feature rows per tile."""


@dataclass
class EncodedSequence:
    """One sequence before packing."""

    tokens: list[int]
    """Ids, with IMAGE once per image."""
    tiles: list[np.ndarray]
    """Per image uint8 [k_i, 3, size, size]."""
    layouts: list[VisualLayout]
    """Per image."""
    blank: bool = False
    """Its images are stand-ins, one tile each, which the vision tower sees as zeros."""
    is_cut: bool = False
    """Its text was cut to the encoder's max_length."""

    @property
    def length(self) -> int:
        """Tokens once every IMAGE is expanded."""
        return len(self.tokens) - len(self.layouts) + sum(map(len, self.layouts))


@dataclass
class EncodedPair:
    """One pair before packing."""

    pair: Pair
    """As it came out of the shard."""
    query: EncodedSequence
    target: EncodedSequence
    hard_negatives: list[EncodedSequence]
    """The first of the pair's hard negatives, as many as are used."""

    @property
    def hard_negative_ids(self) -> list[str]:
        """One per hard negative that is used."""
        return self.pair.hard_negative_ids[: len(self.hard_negatives)]

    @property
    def length(self) -> int:
        """Tokens of all its sequences."""
        return sum(sequence.length for sequence in (self.query, self.target, *self.hard_negatives))


class Processor(Protocol):
    """What packing needs of a model family's processor; models/__init__.py says which family brings which one."""

    @property
    def tile_shape(self) -> TileShape:
        """Pixels and patches of the tiles that `encode` makes."""

    def encode(self, side: Side) -> EncodedSequence:
        """Token ids, tiles and layouts of one input.

        Raises:
            DataError: an image cannot be read, or the input does not fit into the longest sequence.
        """


def pack_sequences(encoded: Sequence[EncodedSequence], pad_to_multiple: int, tile_shape: TileShape) -> PackedSequences:
    """Lay the sequences end to end; padding up to a multiple of `pad_to_multiple` tokens is one more sequence.

    No sequences make one padding sequence of `pad_to_multiple` tokens, so that a rank left without data can take part.
    """
    ids = np.array([token for sequence in encoded for token in sequence.tokens], np.int64)
    layouts = [layout for sequence in encoded for layout in sequence.layouts]
    tiles = [tile for sequence in encoded for tile in sequence.tiles]
    is_image = ids == IMAGE
    sizes = np.ones(len(ids), np.int64)  # packed tokens per id
    visual_lengths = np.array([len(layout) for layout in layouts], np.int64)
    sizes[is_image] = visual_lengths
    start = np.cumsum(sizes) - sizes

    lengths = [sequence.length for sequence in encoded]
    total = sum(lengths)
    padding = -total % pad_to_multiple if encoded else pad_to_multiple
    bounds = np.cumsum([0, *lengths] + [padding] * (padding > 0))
    tokens = np.zeros(total + padding, np.int64)  # [t]
    tokens[start[~is_image]] = ids[~is_image]

    num_tiles = np.array([len(tile) for tile in tiles], np.int64)
    is_blank = np.array([sequence.blank for sequence in encoded for _ in sequence.tiles], bool)
    blank = np.repeat(is_blank, num_tiles)  # [k]
    image_start = start[is_image] - (np.cumsum(visual_lengths) - visual_lengths)
    position = np.repeat(image_start, visual_lengths) + np.arange(visual_lengths.sum())  # [v]

    no_tile = np.zeros((0, 3, tile_shape.size, tile_shape.size), np.uint8)
    return PackedSequences(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=max([*lengths, padding]),
        num_sequences=len(encoded),
        num_tokens=total,
        tiles=torch.from_numpy(np.concatenate([no_tile, *tiles])),
        visual_position=torch.from_numpy(position),
        blank=torch.from_numpy(blank) if blank.any() else None,
        **_merge_layouts(layouts, num_tiles * tile_shape.patches),
    )


def _merge_layouts(layouts: Sequence[VisualLayout], num_rows: np.ndarray) -> dict[str, Tensor]:
    """The images' layouts as fields of PackedSequences; image i has num_rows[i] rows of features."""
    num_blended = np.array([len(layout.blend_source) for layout in layouts], np.int64)
    rows_before = np.cumsum(num_rows) - num_rows  # rows of the images before each image
    blended_before = np.cumsum(num_blended) - num_blended
    newline = num_rows.sum()
    # Three ranges follow each other in the row: all images' features, the newline, all images' blended rows.
    own_row = np.concatenate([*(layout.source for layout in layouts), np.zeros(0, np.int64)])  # [v]
    of_image = np.repeat(np.arange(len(layouts)), np.array([len(layout) for layout in layouts], np.int64))  # [v]
    blended_row = newline + 1 + (blended_before - num_rows)[of_image] + own_row
    source = np.where(own_row < num_rows[of_image], rows_before[of_image] + own_row, blended_row)
    source[own_row == NEWLINE] = newline
    if not num_blended.any():
        return {"visual_source": torch.from_numpy(source)}
    blend_source = np.concatenate([layout.blend_source + rows for layout, rows in zip(layouts, rows_before)])
    blend_weights = np.concatenate([layout.blend_weights for layout in layouts])
    return {
        "visual_source": torch.from_numpy(source),
        "blend_source": torch.from_numpy(blend_source),
        "blend_weights": torch.from_numpy(blend_weights),
    }


def encode_pairs(
    pairs: Sequence[Pair | DataError], encoder: Processor, hard_negatives: int, report: Callable[[str], None]
) -> list[EncodedPair]:
    """Encode pairs with the first `hard_negatives` of each.

    A pair of which a part cannot be used is left out, and `report` is told which and why; so is one in whose place a
    DataError says why it could not be read.
    """
    encoded = []
    for pair in pairs:
        if isinstance(pair, DataError):
            report(str(pair))
            continue
        sides = [pair.query, pair.target, *pair.hard_negatives[:hard_negatives]]
        try:
            query, target, *negatives = [_encode_side(side, encoder) for side in sides]
        except DataError as error:
            report(f"pair {pair.key} of subset {pair.subset}: {error}")
            continue
        encoded.append(EncodedPair(pair, query, target, negatives))
    return encoded


def _encode_side(side: Side, encoder: Processor) -> EncodedSequence:
    if not side.images and not side.text.strip():
        raise DataError("a side has neither text nor picture")
    return encoder.encode(side)


def pack_pairs(
    pairs: Sequence[EncodedPair], num_skipped: int, subset: str, pad_to_multiple: int, tile_shape: TileShape
) -> PairBatch:
    """Pack a micro batch: the pairs' queries, their targets, then the hard negatives pair by pair."""
    sequences = [pair.query for pair in pairs] + [pair.target for pair in pairs]
    sequences += [negative for pair in pairs for negative in pair.hard_negatives]
    return PairBatch(
        sequences=pack_sequences(sequences, pad_to_multiple, tile_shape),
        query_ids=_hashes(pair.pair.query_id for pair in pairs),
        target_ids=_hashes(pair.pair.target_id for pair in pairs),
        hard_negative_ids=_hashes(name for pair in pairs for name in pair.hard_negative_ids),
        subset=subset,
        keys=[pair.pair.key for pair in pairs],
        num_skipped=num_skipped,
        num_cut=sum(sequence.is_cut for sequence in sequences),
    )


def _hashes(names: Iterable[str]) -> Tensor:
    return torch.tensor([stable_hash(name) for name in names], dtype=torch.int64)


def stable_hash(text: str) -> int:
    """Signed 64-bit hash, the same in every process and run (Python's own hash is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

"""Packs the pairs of a micro batch into one row: queries, targets and hard negatives end to end, padded at the end.

A model family's Processor turns one query or target into token ids, tiles and visual layouts, and encode_pairs does so
for many pairs. pack_sequences puts encoded sequences into the row and finds for each visual token its row in the
features of the tiles. The shapes are those of batch.py: n sequences, t tokens, k tiles, p patches per tile, v visual
tokens, u blended rows.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_llave.batch import PackedSequences, Pair, PairBatch, Side
from megatron_llave.data.context import row_in_parts
from megatron_llave.errors import DataError

NEWLINE = -1
"""The entry of a visual layout that stands for the learned image_newline vector."""


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """The origin of each visual token of an image: a row of its features, a weighted sum of rows, or the newline."""

    source: np.ndarray
    """int64 [v]: a row of the image's own features [k * p]; k * p + j for its blended row j; or NEWLINE."""
    blend_source: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    """int64 [u, 4]: the rows of the image's own features that each blended row is the weighted sum of."""
    blend_weights: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """float32 [u, 4]: the weights of these rows."""

    def __len__(self) -> int:
        """Return v, the number of visual tokens."""
        return len(self.source)


IMAGE = -200
"""The token id that stands for all visual tokens of one image; no vocabulary has it."""


@dataclass(frozen=True)
class TileShape:
    """The sizes of a tile that packing needs."""

    size: int
    """Number of pixels along one side."""
    patches: int
    """p, the number of feature rows per tile."""
    of_pixels: tuple[int, ...] | None = None
    """Shape of a tile's array of pixels; None: [3, size, size]."""

    @property
    def pixels(self) -> tuple[int, ...]:
        """Return the shape of a tile's array of pixels."""
        return self.of_pixels or (3, self.size, self.size)


@dataclass
class EncodedSequence:
    """A sequence that is encoded and not packed yet."""

    tokens: list[int]
    """Token ids, with IMAGE once per image."""
    tiles: list[np.ndarray]
    """The tiles of each image, uint8 [k_i, *TileShape.pixels]. An axis may have length 1 if values are equal along it;
    it is repeated where another image of the row has it whole."""
    layouts: list[VisualLayout]
    """The layout of each image."""
    blank: bool = False
    """Its images are placeholders of one tile each, which the vision encoder sees as zeros."""
    is_cut: bool = False
    """The text was cut to the processor's max_length."""
    image_notes: tuple[str, ...] = ()
    """What its images lost or are (notes of data.image_files.decode_image), in their order."""
    positions: np.ndarray | None = None
    """int64 [3, length]: temporal, vertical and horizontal position of each token, for rotary embeddings that tell them
    apart; None: tokens are counted."""
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    """Frames, rows and columns of patches of each image, for vision encoders that take images as they are."""

    @property
    def length(self) -> int:
        """Number of tokens after every IMAGE is expanded."""
        return len(self.tokens) - len(self.layouts) + sum(map(len, self.layouts))


@dataclass
class EncodedPair:
    """A pair that is encoded and not packed yet."""

    pair: Pair
    """The pair as it was read from the shard."""
    query: EncodedSequence
    targets: list[EncodedSequence]
    """The targets that are used, the first ones of the pair."""
    hard_negatives: list[EncodedSequence]
    """The hard negatives that are used, the first ones of the pair."""

    @property
    def target_ids(self) -> list[str]:
        """The ids of the targets that are used."""
        return self.pair.target_ids[: len(self.targets)]

    @property
    def hard_negative_ids(self) -> list[str]:
        """The ids of the hard negatives that are used."""
        return self.pair.hard_negative_ids[: len(self.hard_negatives)]

    @property
    def target_scores(self) -> list[float]:
        """The scores of the targets that are used, NaN if the pair has none."""
        return (self.pair.scores or [math.nan] * len(self.targets))[: len(self.targets)]

    @property
    def hard_negative_scores(self) -> list[float]:
        """The scores of the hard negatives that are used, NaN if the pair has none."""
        scores = self.pair.scores[len(self.pair.targets) :] or [math.nan] * len(self.hard_negatives)
        return scores[: len(self.hard_negatives)]

    @property
    def sequences(self) -> list[EncodedSequence]:
        """All its sequences."""
        return [self.query, *self.targets, *self.hard_negatives]

    @property
    def length(self) -> int:
        """Number of tokens in all its sequences."""
        return sum(sequence.length for sequence in self.sequences)


@dataclass(frozen=True)
class InputSize:
    """What an input will take when it is encoded."""

    tokens: int
    """Visual ones included, and no more than the processor's max_length."""
    tiles: int


class Processor(Protocol):
    """What packing needs from the processor of a model family; models/__init__.py registers the families."""

    @property
    def tile_shape(self) -> TileShape:
        """The sizes of the tiles that `encode` makes."""

    def encode(self, side: Side) -> EncodedSequence:
        """Return token ids, tiles and layouts of one query or target.

        Raises:
            DataError: an image cannot be read, or the input does not fit into the longest sequence.
        """

    def measure(self, side: Side) -> InputSize:
        """Return the sizes of what `encode` will make, from the headers of the images; needed with a token budget.

        Raises:
            DataError: as `encode`, if the header of an image is enough to see it.
        """


def pack_sequences(
    encoded: Sequence[EncodedSequence], pad_to_multiple: int, tile_shape: TileShape, context: int = 1
) -> PackedSequences:
    """Put the sequences into a row; padding up to a multiple of `pad_to_multiple` tokens is one more sequence.

    Without sequences the result is one padding sequence of `pad_to_multiple` tokens, so that a rank without data can
    take part in the step. If several context ranks share the row, the multiple must be one of twice their number too.
    """
    if context > 1:
        return row_in_parts(pack_sequences(encoded, 1, tile_shape), context, pad_to_multiple)
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
    with_padding = lengths + [padding] * (padding > 0)
    tokens = np.zeros(total + padding, np.int64)  # [t]
    tokens[start[~is_image]] = ids[~is_image]

    num_tiles = np.array([len(tile) for tile in tiles], np.int64)
    is_blank = np.array([sequence.blank for sequence in encoded for _ in sequence.tiles], bool)
    blank = np.repeat(is_blank, num_tiles)  # [k]
    image_start = start[is_image] - (np.cumsum(visual_lengths) - visual_lengths)
    position = np.repeat(image_start, visual_lengths) + np.arange(visual_lengths.sum())  # [v]

    bounds = np.cumsum([0, *with_padding])
    shape = np.broadcast_shapes(*(tile.shape[1:] for tile in tiles)) if tiles else tile_shape.pixels
    whole = [np.zeros((0, *shape), np.uint8), *(np.broadcast_to(tile, (len(tile), *shape)) for tile in tiles)]
    return PackedSequences(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=with_padding,
        num_sequences=len(encoded),
        tiles=torch.from_numpy(np.concatenate(whole)),
        num_tiles=int(num_tiles.sum()),
        visual_position=torch.from_numpy(position),
        last_token=torch.from_numpy(bounds[1 : len(encoded) + 1] - 1),
        blank=torch.from_numpy(blank) if blank.any() else None,
        positions=_positions(encoded, padding),
        grids=[list(grid) for sequence in encoded for grid in sequence.grids],
        **_merge_layouts(layouts, num_tiles * tile_shape.patches),
    )


def _positions(encoded: Sequence[EncodedSequence], padding: int) -> Tensor | None:
    """Return the positions [3, t] of all sequences and of the padding; None if tokens are counted."""
    if not any(sequence.positions is not None for sequence in encoded):
        return None
    return torch.from_numpy(np.concatenate([*(s.positions for s in encoded), np.zeros((3, padding), np.int64)], axis=1))


def _merge_layouts(layouts: Sequence[VisualLayout], num_rows: np.ndarray) -> dict[str, Tensor]:
    """Return the images' layouts as fields of PackedSequences; image i has num_rows[i] rows of features."""
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
    pairs: Sequence[Pair | DataError],
    processor: Processor,
    hard_negatives: int,
    report: Callable[[str], None],
    positives: int | None = None,
) -> list[EncodedPair]:
    """Encode pairs, each with its first `positives` targets (None: all) and its first `hard_negatives` hard negatives.

    A pair with an input that cannot be used is dropped, and `report` is called with the pair and the reason. So is a
    pair that could not be read, in whose place `pairs` has the error.
    """
    encoded = []
    for pair in pairs:
        if isinstance(pair, DataError):
            report(str(pair))
            continue
        try:
            query, *others = map(processor.encode, _inputs(pair, hard_negatives, positives))
        except DataError as error:
            report(_about(pair, error))
            continue
        number = len(pair.targets[:positives])
        encoded.append(EncodedPair(pair, query, others[:number], others[number:]))
    return encoded


def measure_pair(
    pair: Pair, processor: Processor, hard_negatives: int, positives: int | None = None
) -> list[InputSize]:
    """Return the sizes of the inputs that `encode_pairs` encodes of a pair, without decoding its images.

    Raises:
        DataError: names the pair, which has an input that cannot be used.
    """
    try:
        return list(map(processor.measure, _inputs(pair, hard_negatives, positives)))
    except DataError as error:
        raise DataError(_about(pair, error)) from error


def _about(pair: Pair, error: DataError) -> str:
    return f"pair {pair.key} of subset {pair.subset}: {error}"


def _inputs(pair: Pair, hard_negatives: int, positives: int | None) -> Iterator[Side]:
    """Yield the inputs of a pair in the order in which they are encoded."""
    for side in (pair.query, *pair.targets[:positives], *pair.hard_negatives[:hard_negatives]):
        if not side.num_placeholders and not side.text.strip():
            raise DataError("an input has neither text nor image")
        yield side


def pack_pairs(
    pairs: Sequence[EncodedPair],
    num_skipped: int,
    subset: str,
    pad_to_multiple: int,
    tile_shape: TileShape,
    context: int = 1,
) -> PairBatch:
    """Pack a micro batch: the pairs' queries, their targets, then the hard negatives, pair by pair each."""
    sequences = [pair.query for pair in pairs] + [target for pair in pairs for target in pair.targets]
    sequences += [negative for pair in pairs for negative in pair.hard_negatives]
    has_several = any(len(pair.targets) > 1 for pair in pairs)
    scores = [score for pair in pairs for score in pair.target_scores]
    scores += [score for pair in pairs for score in pair.hard_negative_scores]
    return PairBatch(
        sequences=pack_sequences(sequences, pad_to_multiple, tile_shape, context),
        query_ids=_hashes(pair.pair.query_id for pair in pairs),
        target_ids=_hashes(name for pair in pairs for name in pair.target_ids),
        hard_negative_ids=_hashes(name for pair in pairs for name in pair.hard_negative_ids),
        subset=subset,
        keys=[pair.pair.key for pair in pairs],
        num_skipped=num_skipped,
        num_cut=sum(sequence.is_cut for sequence in sequences),
        target_rows=_rows(len(pair.targets) for pair in pairs) if has_several else None,
        hard_rows=_rows(len(pair.hard_negatives) for pair in pairs),
        most_targets=max((len(pair.targets) for pair in pairs), default=0),
        most_hard_negatives=max((len(pair.hard_negatives) for pair in pairs), default=0),
        scores=torch.tensor(scores) if any(pair.pair.scores for pair in pairs) else None,
    )


def _rows(numbers: Iterable[int]) -> Tensor:
    """The place of the pair that each of its `numbers` inputs belongs to."""
    return torch.tensor([row for row, number in enumerate(numbers) for _ in range(number)], dtype=torch.int64)


def _hashes(names: Iterable[str]) -> Tensor:
    return torch.tensor([stable_hash(name) for name in names], dtype=torch.int64)


def stable_hash(text: str) -> int:
    """Return a signed 64-bit hash that is the same in every process and run; Python's own hash is salted."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

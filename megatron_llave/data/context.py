"""How the sequences of a packed row are split into parts, one for each context-parallel rank: index arithmetic.

Each sequence is padded to a multiple of 2c tokens and cut into 2c chunks of equal length. Rank r has the chunks r and
2c - 1 - r: all ranks have the same number of tokens, and under a causal mask the same number of products of attention.
Megatron-LM and Transformer Engine's "thd" split in the same way. The row is stored rank by rank; in the part of a rank
its chunks follow each other sequence by sequence.

Shapes: n sequences, t tokens of the row, v visual tokens, c context ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_llave.batch import PackedSequences, padded_length


def chunks_of(rank: int, ranks: int) -> tuple[int, int]:
    """Return the numbers of a rank's chunks of every sequence."""
    return rank, 2 * ranks - 1 - rank


def row_order(lengths: Sequence[int], ranks: int) -> np.ndarray:
    """Return [t] int64: for each place of the stored row its position in the row of padded sequences end to end.

    Args:
        lengths: the n padded lengths.
        ranks: c.
    """
    sizes = np.asarray(lengths, np.int64)
    chunks = np.array([chunks_of(rank, ranks) for rank in range(ranks)])[:, None]  # [c, 1, 2]
    size = sizes[:, None] // (2 * ranks)  # [n, 1] tokens of a chunk
    starts = (np.cumsum(sizes) - sizes)[:, None] + chunks * size  # [c, n, 2]
    size = np.broadcast_to(size, starts.shape).ravel()
    return np.repeat(starts.ravel() - (np.cumsum(size) - size), size) + np.arange(sizes.sum())


def row_places(lengths: Sequence[int], ranks: int) -> np.ndarray:
    """Return the inverse of `row_order`, [t] int64: the place of each token of the padded sequences end to end."""
    order = row_order(lengths, ranks)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


@dataclass(frozen=True)
class RowPart:
    """A context rank's part of a row: its chunks, two of each sequence, and the keys that these may see."""

    positions: Tensor
    """[t / c] int64: the position of each token in its own sequence."""
    bounds: Tensor
    """[2n + 1] int64 boundaries of the chunks in the rank's part of the row."""
    keys: Tensor
    """[keys] int64: for each chunk the places of its sequence's tokens from the first one to the chunk's last one."""
    key_bounds: Tensor
    """[2n + 1] int64 boundaries of the chunks' keys."""


def part_of(lengths: Sequence[int], rank: int, ranks: int) -> RowPart:
    """Return the part of a context rank, of a row of n sequences with these padded lengths."""
    sizes = np.asarray(lengths, np.int64)
    start = np.repeat(np.cumsum(sizes) - sizes, 2)  # [2n] of the chunk's sequence
    size = np.repeat(sizes // (2 * ranks), 2)
    key_counts = (np.tile(chunks_of(rank, ranks), len(sizes)) + 1) * size
    key_bounds = np.concatenate([[0], np.cumsum(key_counts)])
    keys = np.repeat(start - key_bounds[:-1], key_counts) + np.arange(key_bounds[-1])
    arrays = (
        np.split(row_order(sizes, ranks), ranks)[rank] - np.repeat(start, size),
        np.concatenate([[0], np.cumsum(size)]),
        row_places(sizes, ranks)[keys],
        key_bounds,
    )
    return RowPart(*map(torch.from_numpy, arrays))


def row_in_parts(packed: PackedSequences, ranks: int, pad_to_multiple: int) -> PackedSequences:
    """Return a row of one part for each context rank, made of the sequences of a row without padding.

    Args:
        packed: the sequences end to end.
        ranks: c.
        pad_to_multiple: the length of the row is a multiple of this many tokens; itself a multiple of 2c.
    """
    lengths = packed.lengths[: packed.num_sequences]
    padded = [padded_length(length, ranks) for length in lengths]
    padding = -sum(padded) % pad_to_multiple if padded else pad_to_multiple
    lengths, padded = lengths + [padding] * (padding > 0), padded + [padding] * (padding > 0)
    bounds = np.cumsum([0, *padded])
    sizes = np.array(lengths)[: packed.num_sequences]
    offset = np.repeat(bounds[: len(sizes)] - (np.cumsum(sizes) - sizes), sizes)
    place = row_places(padded, ranks)[offset + np.arange(len(offset))]  # of each token of `packed`
    tokens = np.zeros(bounds[-1], np.int64)  # [t]
    tokens[place] = packed.tokens.numpy()[: len(place)]
    visual = place[packed.visual_position.numpy()]  # [v]
    by_place = np.argsort(visual)
    # Images with grids are not cut into parts: every rank encodes all of them.
    num_tiles = packed.num_tiles if packed.grids else -(-packed.num_tiles // ranks) * ranks
    tiles = torch.arange(num_tiles).clamp(max=packed.num_tiles - 1)
    positions = packed.positions
    if positions is not None:
        positions = torch.zeros(3, len(tokens), dtype=torch.int64)
        positions[:, place] = packed.positions[:, : len(place)]
    return replace(
        packed,
        tokens=torch.from_numpy(tokens),
        positions=positions,
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        lengths=lengths,
        tiles=packed.tiles[tiles],
        blank=None if packed.blank is None else packed.blank[tiles],
        visual_source=packed.visual_source[torch.from_numpy(by_place)],
        visual_position=torch.from_numpy(visual[by_place]),
        last_token=torch.from_numpy(place[packed.last_token.numpy()]),
        context=ranks,
        visual_bounds=np.searchsorted(visual[by_place], np.arange(ranks + 1) * (bounds[-1] // ranks)).tolist(),
    )

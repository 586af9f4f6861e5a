"""How a packed row is split over context ranks, against a walk over sequences and chunks, token by token."""

import numpy as np
import pytest
import torch
from reference import pack, random_sequence

from megatron_llave.batch import PackedSequences, padded_length
from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.data.context import row_order, row_places

MODEL = ModelConfig(vision=VisionConfig(image_size=30), language=LanguageConfig(vocab_size=300))


def walked(lengths: list[int], ranks: int) -> list[int]:
    """Positions in the order of the stored row: rank by rank, sequence by sequence, its two chunks."""
    order = []
    for rank in range(ranks):
        for index, length in enumerate(lengths):
            size, start = length // (2 * ranks), sum(lengths[:index])
            for chunk in (rank, 2 * ranks - 1 - rank):
                order += range(start + chunk * size, start + (chunk + 1) * size)
    return order


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_order_is_that_of_the_walk_and_balanced(ranks: int) -> None:
    lengths = [padded_length(length, ranks) for length in (5, 1, 17, 16, 33)]
    assert all(0 <= padded - length < 2 * ranks for padded, length in zip(lengths, (5, 1, 17, 16, 33)))
    order = row_order(lengths, ranks)
    assert order.tolist() == walked(lengths, ranks)
    assert np.array_equal(row_places(lengths, ranks)[order], np.arange(sum(lengths)))
    positions = np.concatenate([np.arange(length) for length in lengths])[order]
    seen_keys = [int((part + 1).sum()) for part in np.split(positions, ranks)]  # of a causal mask
    assert len(set(seen_keys)) == 1


def content(row: PackedSequences, place: int, visual: dict[int, int]) -> tuple[str, int]:
    return ("visual", visual[place]) if place in visual else ("text", int(row.tokens[place]))


@pytest.mark.parametrize(("ranks", "multiple"), [(2, 4), (2, 16), (3, 6)])
def test_parts_of_the_ranks_are_the_tokens_and_tiles_of_the_row(ranks: int, multiple: int) -> None:
    encoded = [random_sequence(MODEL, seed, with_image=seed % 2 == 0) for seed in range(5)]
    plain, shared = pack(encoded, MODEL), pack(encoded, MODEL, multiple, ranks)
    t = len(shared.tokens)
    assert t % multiple == 0 and shared.num_tokens == plain.num_tokens and shared.lengths[:5] == plain.lengths
    assert shared.padded_lengths == shared.cu_seqlens.diff().tolist() and sum(shared.padded_lengths) == t
    # Every token of each sequence is at its place, and so is the last one.
    visual = dict(zip(shared.visual_position.tolist(), shared.visual_source.tolist()))
    plain_visual = dict(zip(plain.visual_position.tolist(), plain.visual_source.tolist()))
    places, position = row_places(shared.padded_lengths, ranks), 0
    for start, length, last in zip(shared.cu_seqlens.tolist(), plain.lengths, shared.last_token.tolist()):
        for offset in range(length):
            found = content(shared, int(places[start + offset]), visual)
            assert found == content(plain, position + offset, plain_visual)
        assert last == places[start + length - 1]
        position += length
    assert len(visual) == len(plain_visual)
    # The parts together are the row.
    parts = [shared.part(rank) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), shared.tokens)
    assert torch.equal(torch.cat([part.visual_source for part in parts]), shared.visual_source)
    moved = [part.visual_position + rank * (t // ranks) for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(moved), shared.visual_position)
    assert all(part.visual_position.ge(0).all() and part.visual_position.lt(t // ranks).all() for part in parts)
    tiles = torch.cat([part.tiles for part in parts])
    assert torch.equal(tiles[: len(plain.tiles)], plain.tiles) and len(tiles) < len(plain.tiles) + ranks
    assert {(len(part.tiles), part.num_tiles) for part in parts} == {(len(tiles) // ranks, len(plain.tiles))}
    assert all(part.context == ranks and part.part(0) is part for part in parts)


def test_row_without_sequences_is_padding_alone() -> None:
    empty = pack([], MODEL, 8, 2)
    assert empty.tokens.tolist() == [0] * 8 and empty.padded_lengths == [8] and empty.num_sequences == 0
    part = empty.part(1)
    assert len(part.tokens) == 4 and len(part.tiles) == len(part.visual_source) == len(part.last_token) == 0

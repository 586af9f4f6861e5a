"""Slow and plain versions of what the package does fast, and small inputs to compare them on."""

import numpy as np
import torch
from torch import Tensor

from megatron_llave.batch import PackedSequences, PairBatch
from megatron_llave.config import ModelConfig
from megatron_llave.data.packing import EncodedSequence, TileShape, pack_sequences
from megatron_llave.data.prompts import IMAGE


def dense_contrastive_loss(query: Tensor, target: Tensor, temperature: float, alpha: float) -> Tensor:
    """The paper's formula written out, pair by pair, over all rows at once."""
    cosines = query @ target.T
    directions = []
    for similarity in (cosines, cosines.T):
        rows = []
        for i in range(len(similarity)):
            positive = torch.exp(similarity[i, i] / temperature)
            negatives = [
                torch.exp(similarity[i, j] / temperature + alpha * similarity[i, j].detach())
                for j in range(len(similarity))
                if j != i
            ]
            rows.append(-torch.log(positive / (positive + sum(negatives))))
        directions.append(torch.stack(rows).mean())
    return (directions[0] + directions[1]) / 2


def random_sequence(model: ModelConfig, seed: int, with_image: bool) -> EncodedSequence:
    """A sequence of 3 to 12 text tokens, an image somewhere among them, of one or two tiles."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.language.vocab_size, rng.integers(3, 13)).tolist()
    if not with_image:
        return EncodedSequence(tokens, [], [])
    size, patches = model.vision.image_size, model.vision.patches_per_side**2
    num_tiles = int(rng.integers(1, 3))
    tiles = rng.integers(0, 256, (num_tiles, 3, size, size)).astype(np.uint8)
    layout = np.append(np.arange(num_tiles * patches), -1)  # every patch in order, then a newline
    tokens.insert(int(rng.integers(0, len(tokens))), IMAGE)
    return EncodedSequence(tokens, [tiles], [layout])


def random_pairs(model: ModelConfig, count: int) -> list[tuple[EncodedSequence, EncodedSequence]]:
    """Pairs of every kind: image to text, text to image, text to text, image to image."""
    kinds = [(True, False), (False, True), (False, False), (True, True)]
    return [
        (random_sequence(model, 2 * i, kinds[i % 4][0]), random_sequence(model, 2 * i + 1, kinds[i % 4][1]))
        for i in range(count)
    ]


def tile_shape(model: ModelConfig) -> TileShape:
    """Pixels and patches of the model's tiles."""
    return TileShape(model.vision.image_size, model.vision.patches_per_side**2)


def pack(sequences: list[EncodedSequence], model: ModelConfig, multiple: int = 1) -> PackedSequences:
    """One packed row."""
    return pack_sequences(sequences, multiple, tile_shape(model))


def pack_pair_batch(
    pairs: list[tuple[EncodedSequence, EncodedSequence]], model: ModelConfig, multiple: int = 1
) -> PairBatch:
    """One micro batch: queries, then targets."""
    sequences = [query for query, _ in pairs] + [target for _, target in pairs]
    ids = torch.arange(len(pairs))
    keys = [str(i) for i in range(len(pairs))]
    return PairBatch(pack(sequences, model, multiple), ids, ids, "random", keys)

"""Slow and plain versions of what the package does fast, and small inputs to compare them on."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.batch import PackedSequences, PairBatch, PairEmbeddings
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, VisualLayout, pack_sequences
from megatron_llave.models.qwen_vl.positions import counted_positions, token_positions


def dense_contrastive_loss(
    query: Tensor,
    target: Tensor,
    temperature: float,
    alpha: float,
    hard_negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    hard_negative_ids: Tensor | None = None,
    reward: PairEmbeddings | None = None,
    rules: LossConfig = LossConfig(),
) -> Tensor:
    """The paper's formula and the rules for negatives written out, pair by pair, over all rows at once."""
    no_rows = query.new_zeros(0, query.shape[1])
    hard = no_rows if hard_negatives is None else hard_negatives
    judge = reward or PairEmbeddings(query, target, hard)
    if hard_negative_ids is None:
        hard_negative_ids = torch.full((len(hard),), -1)
    judged = judge.query @ torch.cat([judge.target, judge.hard_negatives]).T  # [B, C]
    same = same_pairs(query_ids, target_ids, hard_negative_ids) if rules.mask_same_target else judged > torch.inf
    to_target = _direction(query, target, hard, same, judged, temperature, alpha, rules)
    if rules.directions == "query_to_target":
        return to_target
    same, judged = same[:, : len(query)].T, judged[:, : len(query)].T
    return (to_target + _direction(target, query, no_rows, same, judged, temperature, alpha, rules)) / 2


def same_pairs(query_ids: Tensor, target_ids: Tensor, hard_negative_ids: Tensor) -> Tensor:
    """[B, C] queries i and columns j, target or hard negative, that loss.mask_same_target does not hold apart."""
    rows = []
    for query_id, target_id in zip(query_ids.tolist(), target_ids.tolist()):
        pairs = [query_id == q or target_id == t for q, t in zip(query_ids.tolist(), target_ids.tolist())]
        rows.append(pairs + [target_id == h for h in hard_negative_ids.tolist()])
    return torch.tensor(rows)


def _direction(rows, columns, hard, same, judged, temperature, alpha, rules) -> Tensor:
    losses = []
    for i, row in enumerate(rows):
        positive = row @ columns[i]
        total = torch.exp(positive / temperature)
        for j, column in enumerate([*columns, *hard]):
            cosine = row @ column
            if j == i or (rules.mask_margin is not None and cosine > positive + rules.mask_margin):
                continue
            if same[i, j]:
                continue
            weighted = rules.hardness in ("all", "hard_negatives" if j >= len(columns) else "in_batch")
            hardness = alpha * judged[i, j].detach() if weighted else 0.0
            total = total + torch.exp(cosine / temperature + hardness)
        losses.append(torch.log(total) - positive / temperature)
    return torch.stack(losses).mean()


def random_sequence(model: ModelConfig, seed: int, with_image: bool) -> EncodedSequence:
    """A sequence of 3 to 12 text tokens, an image somewhere among them, of one or two tiles."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.language.vocab_size, rng.integers(3, 13)).tolist()
    if not with_image:
        has_axes = model.vision.image_size == 0
        return EncodedSequence(tokens, [], [], positions=counted_positions(len(tokens)) if has_axes else None)
    if model.vision.image_size == 0:
        return _with_grid(model, tokens, rng)
    size, patches = model.vision.image_size, model.vision.patches_per_side**2
    num_tiles = int(rng.integers(1, 3))
    tiles = rng.integers(0, 256, (num_tiles, 3, size, size)).astype(np.uint8)
    layout = np.append(np.arange(num_tiles * patches), -1)  # every patch in order, then a newline
    tokens.insert(int(rng.integers(0, len(tokens))), IMAGE)
    return EncodedSequence(tokens, [tiles], [VisualLayout(layout)])


def _with_grid(model: ModelConfig, tokens: list[int], rng: np.random.Generator) -> EncodedSequence:
    """The tokens with an image of any shape among them, for the Qwen-VL families."""
    grid = (1, 2 * int(rng.integers(1, 4)), 2 * int(rng.integers(1, 4)))
    count = math.prod(grid) // 4
    tiles = rng.integers(0, 256, (count, *tile_shape(model).pixels)).astype(np.uint8)
    tokens.insert(int(rng.integers(0, len(tokens))), IMAGE)
    positions = token_positions(tokens, [grid], 1)
    return EncodedSequence(tokens, [tiles], [VisualLayout(np.arange(count))], positions=positions, grids=[grid])


def random_pairs(model: ModelConfig, count: int) -> list[tuple[EncodedSequence, EncodedSequence]]:
    """Pairs of every kind: image to text, text to image, text to text, image to image."""
    kinds = [(True, False), (False, True), (False, False), (True, True)]
    return [
        (random_sequence(model, 2 * i, kinds[i % 4][0]), random_sequence(model, 2 * i + 1, kinds[i % 4][1]))
        for i in range(count)
    ]


def tile_shape(model: ModelConfig) -> TileShape:
    """Pixels and patches of the model's tiles."""
    if model.vision.image_size == 0:
        return TileShape(model.vision.patch_size, 1, (4, 3, 2, model.vision.patch_size, model.vision.patch_size))
    return TileShape(model.vision.image_size, model.vision.patches_per_side**2)


def pack(sequences: list[EncodedSequence], model: ModelConfig, multiple: int = 1, context: int = 1) -> PackedSequences:
    """One packed row."""
    return pack_sequences(sequences, multiple, tile_shape(model), context)


def pack_pair_batch(
    pairs: list[tuple[EncodedSequence, EncodedSequence]],
    model: ModelConfig,
    multiple: int = 1,
    hard_negatives: list[EncodedSequence] = (),
    context: int = 1,
) -> PairBatch:
    """One micro batch: queries, then targets, then hard negatives."""
    sequences = [query for query, _ in pairs] + [target for _, target in pairs] + list(hard_negatives)
    ids = torch.arange(len(pairs))
    keys = [str(i) for i in range(len(pairs))]
    hard_ids = torch.arange(len(hard_negatives)) + 1000
    return PairBatch(pack(sequences, model, multiple, context), ids, ids, hard_ids, "random", keys)


CAUSAL = {"window_size": (-1, 0), "enable_gqa": True}
"""Keyword arguments with which one_by_one, as torch's own function, is causal."""


def one_by_one(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU alone: each sequence attends to its keys.

    The causal mask is aligned at the end, as FlashAttention's is: the last query sees all keys of its sequence.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(value)) and window_size in ((-1, 0), (-1, -1))
    lengths, key_lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths), max(key_lengths)) and isinstance(max_q, int) and isinstance(max_k, int)
    outputs = []
    for own in zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths)):
        mask = torch.ones(len(own[0]), len(own[1]), dtype=torch.bool).tril(len(own[1]) - len(own[0]))
        heads_first = (x.transpose(0, 1) for x in own)
        outputs.append(
            F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=enable_gqa).transpose(0, 1)
        )
    return torch.cat(outputs)

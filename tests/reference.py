"""Slow and plain versions of what the package does fast, and small inputs to compare them on."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.batch import PackedSequences, PairBatch
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.data.packing import IMAGE, EncodedSequence, TileShape, VisualLayout, pack_sequences
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
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
    rows: list[int] | None = None,
) -> Tensor:
    """The paper's formula and the rules for negatives written out, pair by pair, over all rows at once.

    `rows` has the query that each target belongs to; None: each has one.
    """
    hard = query.new_zeros(0, query.shape[1]) if hard_negatives is None else hard_negatives
    rows = list(range(len(query))) if rows is None else rows
    if hard_negative_ids is None:
        hard_negative_ids = torch.full((len(hard),), -1)
    columns = torch.cat([target, hard])
    judge = reward or PairEmbeddings(query, target, hard)
    hardness = alpha * (judge.query @ torch.cat([judge.target, judge.hard_negatives]).T).detach()  # [B, C]
    hardness[:, : len(rows)] *= rules.hardness in ("all", "in_batch")
    hardness[:, len(rows) :] *= rules.hardness in ("all", "hard_negatives")
    cosines = query @ columns.T
    weighted = (cosines / temperature + hardness).exp()
    same = same_pairs(rows, query_ids, target_ids, hard_negative_ids, rules)
    to_target = same | is_above(cosines, row_means(cosines, rows)[:, None], rules)
    total = query.new_zeros(())
    for column, row in enumerate(rows):
        positive = cosines[row, column]
        share = 1 / rows.count(row) / len(query) / (2 if rules.directions == "symmetric" else 1)
        own = torch.exp(positive / temperature)
        total = total + share * torch.log((own + weighted[row][~to_target[row]].sum()) / own)
        if rules.directions == "symmetric":
            to_query = same[:, column] | is_above(cosines[:, column], positive, rules)
            total = total + share * torch.log((own + weighted[:, column][~to_query].sum()) / own)
    return total


def same_pairs(
    rows: list[int], query_ids: Tensor | None, target_ids: Tensor | None, hard_negative_ids: Tensor, rules: LossConfig
) -> Tensor:
    """[B, C] whether column j, target or hard negative, is no negative of query i, by its owner and by the ids."""
    numbers = [rows.count(row) for row in range(rows[-1] + 1)]
    columns = [*enumerate(rows), *((len(rows) + j, None) for j in range(len(hard_negative_ids)))]
    same = torch.zeros(len(numbers), len(columns), dtype=torch.bool)
    for i, (j, owner) in itertools.product(range(len(numbers)), columns):
        if owner == i or (rules.mask_same_target and owner is not None and query_ids[i] == query_ids[owner]):
            same[i, j] = True
        if rules.mask_same_target or numbers[i] > 1 or (owner is not None and numbers[owner] > 1):
            name = hard_negative_ids[j - len(rows)] if owner is None else target_ids[j]
            same[i, j] |= any(row == i and target_ids[c] == name for c, row in enumerate(rows))
    return same


def row_means(cosines: Tensor, rows: list[int]) -> Tensor:
    """[B] mean cosine of each query with its targets, of cosines [B, C]."""
    owned = [[c for c, row in enumerate(rows) if row == i] for i in range(len(cosines))]
    return torch.stack([cosines[i, own].mean() for i, own in enumerate(owned)])


def is_above(cosines: Tensor, positive: Tensor, rules: LossConfig) -> Tensor:
    """Whether mask_margin masks."""
    return cosines > positive + (torch.inf if rules.mask_margin is None else rules.mask_margin)


def dense_own_negatives_loss(
    embeddings: PairEmbeddings, temperature: Tensor, rules: LossConfig, ids: PairIds, reward: PairEmbeddings | None
) -> Tensor:
    """The rule of own negatives written out, row by row."""
    judge = embeddings if reward is None else reward
    losses = []
    for i, query in enumerate(embeddings.query):
        own = [j for j, row in enumerate(embeddings.target_rows.tolist()) if row == i]
        positives = torch.stack([query @ embeddings.target[j] for j in own])
        total = query.new_zeros(())
        for j, row in enumerate(embeddings.hard_rows.tolist()):
            cosine = query @ embeddings.hard_negatives[j]
            hardness = (judge.query[i] @ judge.hard_negatives[j]).detach() * (rules.hardness != "in_batch")
            is_above = rules.mask_margin is not None and cosine > positives.mean() + rules.mask_margin
            is_same = rules.mask_same_target and (ids.target[own] == ids.hard_negatives[j]).any()
            if row == i and not is_above and not is_same:
                total = total + torch.exp(cosine / temperature + rules.alpha * hardness)
        losses.append(torch.stack([torch.log1p(total / torch.exp(p / temperature)) for p in positives]).mean())
    return torch.stack(losses).mean()


def dense_soft_label_loss(embeddings: PairEmbeddings, scores: Tensor, temperature: Tensor, rules: LossConfig) -> Tensor:
    """The mean over all rows of the divergence from the soft labels, row by row."""
    candidates = torch.cat([embeddings.target, embeddings.hard_negatives])
    rows = [*embeddings.target_rows.tolist(), *embeddings.hard_rows.tolist()]
    total = embeddings.query.new_zeros(())
    for i, query in enumerate(embeddings.query):
        chosen = [j for j, row in enumerate(rows) if row == i and not scores[j].isnan()]
        if not chosen:
            continue
        labels = torch.softmax(scores[chosen].double() / rules.soft_label_temperature, 0)
        temperature = rules.soft_label_student_temperature or temperature
        model = torch.softmax(candidates[chosen] @ query / temperature, 0)
        if rules.soft_label_loss == "symmetric_kl":
            total = total + 0.5 * (labels * (labels / model).log() + model * (model / labels).log()).sum()
        elif len(chosen) > 1:
            total = total - (labels * model.log()).sum()
    return total / len(embeddings.query)


def dense_cosent_loss(embeddings: PairEmbeddings, scores: Tensor, temperature: Tensor) -> Tensor:
    """The order of all graded pairs, pair by pair."""
    candidates = torch.cat([embeddings.target, embeddings.hard_negatives])
    rows = torch.cat([embeddings.target_rows, embeddings.hard_rows])
    cosines = (embeddings.query[rows] * candidates).sum(1)
    total = torch.ones((), dtype=cosines.dtype)
    for higher, lower in itertools.permutations(range(len(scores)), 2):
        if scores[lower] < scores[higher]:
            total = total + torch.exp((cosines[lower] - cosines[higher]) / temperature)
    return torch.log(total)


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

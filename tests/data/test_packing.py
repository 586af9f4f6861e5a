"""The packed row against a naive walk over the sequences, and the encoder in front of it."""

import io
import math

import numpy as np
import pytest
import tokenizers
import torch
from letters import Letters
from PIL import Image

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_llave.data.image_files import BadImageError
from megatron_llave.data.packing import (
    IMAGE,
    NEWLINE,
    EncodedSequence,
    TileShape,
    encode_pairs,
    pack_pairs,
    pack_sequences,
    stable_hash,
)
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.loss.inputs import PairEmbeddings, PairIds
from megatron_llave.models import build_processor
from megatron_llave.models.llava_onevision.anyres import visual_layout
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

TILE, PATCH = 28, 14
SHAPE = TileShape(size=TILE, patches=4)
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))


def encoder(template="plain", max_length=400, grids=GRIDS, **options):
    return LlavaOnevisionProcessor(Letters(), template, max_length, grids, TILE, PATCH, **options)


def png(width, height, level):
    data = io.BytesIO()
    Image.new("RGB", (width, height), (level,) * 3).save(data, "PNG")
    return data.getvalue()


def random_sequence(rng):
    """Up to three images of random sizes between random text ids; every tile has its own pixel level."""
    tokens = rng.integers(2, 100, rng.integers(1, 6)).tolist()
    tiles, layouts = [], []
    blank = rng.random() < 0.2
    for _ in range(rng.integers(0, 4)):
        grids = () if blank or rng.random() < 0.3 else GRIDS
        max_tiles = [None, 1, 2][rng.integers(3)]
        layout = visual_layout(int(rng.integers(5, 90)), int(rng.integers(5, 90)), grids, TILE, 2, max_tiles)
        num_tiles = (layout.source.max() - len(layout.blend_source)) // SHAPE.patches + 1
        levels = rng.integers(0, 256, num_tiles).astype(np.uint8)
        layouts.append(layout)
        tiles.append(np.broadcast_to(levels[:, None, None, None], (num_tiles, 3, TILE, TILE)))
        tokens.insert(rng.integers(0, len(tokens) + 1), IMAGE)
    return EncodedSequence(tokens, tiles, layouts, blank)


def feature(row, tiles, blank):
    """A row of the tiles' features as (tile level or "blank", patch)."""
    tile, patch = divmod(int(row), SHAPE.patches)
    return ("blank" if blank[tile] else int(tiles[tile, 0, 0, 0])), patch


def naive(sequence):
    """The sequence as a list of text ids, "newline", features, and tuples of features with their weights."""
    expanded, images = [], iter(zip(sequence.tiles, sequence.layouts))
    for token in sequence.tokens:
        if token != IMAGE:
            expanded.append(token)
            continue
        tiles, layout = next(images)
        blank = [sequence.blank] * len(tiles)
        for row in layout.source.tolist():
            blended = row - len(tiles) * SHAPE.patches
            if row == NEWLINE:
                expanded.append("newline")
            elif blended < 0:
                expanded.append(feature(row, tiles, blank))
            else:
                parts = zip(layout.blend_source[blended], layout.blend_weights[blended].tolist())
                expanded.append(tuple((feature(row, tiles, blank), weight) for row, weight in parts))
    return expanded


def unpacked(packed):
    """Every sequence of the packed row in the form of `naive`."""
    row = packed.tokens.tolist()
    blank = [False] * len(packed.tiles) if packed.blank is None else packed.blank.tolist()
    for position, source in zip(packed.visual_position.tolist(), packed.visual_source.tolist()):
        assert row[position] == 0, "two sources for one position, or a source on a text token"
        blended = source - len(packed.tiles) * SHAPE.patches - 1
        if blended == -1:
            row[position] = "newline"
        elif blended < 0:
            row[position] = feature(source, packed.tiles, blank)
        else:
            parts = zip(packed.blend_source[blended].tolist(), packed.blend_weights[blended].tolist())
            row[position] = tuple((feature(source, packed.tiles, blank), weight) for source, weight in parts)
    bounds = packed.cu_seqlens.tolist()
    return [row[a:b] for a, b in zip(bounds, bounds[1:])]


@pytest.mark.parametrize("multiple", [1, 2, 16])
def test_packed_row_equals_the_naive_walk(multiple):
    rng = np.random.default_rng(multiple)
    for count in (1, 2, 7, 20):
        sequences = [random_sequence(rng) for _ in range(count)]
        packed = pack_sequences(sequences, multiple, SHAPE)
        expected = [naive(sequence) for sequence in sequences]
        total = sum(map(len, expected))
        padding = -total % multiple
        assert unpacked(packed) == expected + [[0] * padding] * (padding > 0)
        assert [sequence.length for sequence in sequences] == [len(e) for e in expected]
        assert packed.tokens.shape == (total + padding,)
        assert packed.lengths == packed.cu_seqlens.diff().tolist() and packed.num_tokens == total
        assert packed.num_sequences == count
        assert packed.last_token.tolist() == (np.cumsum([len(e) for e in expected]) - 1).tolist()
        types = packed.tokens.dtype, packed.cu_seqlens.dtype, packed.visual_source.dtype, packed.visual_position.dtype
        assert types == (torch.int64, torch.int32, torch.int64, torch.int64)
        assert packed.tiles.dtype == torch.uint8 and packed.tiles.is_contiguous()
        assert packed.tiles.shape[0] == sum(len(tiles) for s in sequences for tiles in s.tiles)
        blended = sum(len(layout.blend_source) for s in sequences for layout in s.layouts)
        if blended:
            assert packed.blend_source.shape == packed.blend_weights.shape == (blended, 4)
            assert (packed.blend_source.dtype, packed.blend_weights.dtype) == (torch.int64, torch.float32)
        else:
            assert packed.blend_source is packed.blend_weights is None
        if any(s.blank and s.tiles for s in sequences):
            assert packed.blank.dtype == torch.bool and packed.blank.shape == packed.tiles.shape[:1]
        else:
            assert packed.blank is None
        if count == 20:
            assert blended > 4 and packed.blank.any(), "the random sequences have every kind of visual token"


def test_every_tensor_moves_with_the_row():
    packed = pack_sequences([interpolated_sequence(), blank_sequence()], 4, SHAPE)
    moved = packed.to("meta")
    tensors = ("tokens", "cu_seqlens", "tiles", "visual_source", "visual_position", "blank")
    for name in (*tensors, "blend_source", "blend_weights"):
        assert getattr(packed, name).device.type == "cpu" and getattr(moved, name).device.type == "meta", name
    assert pack_sequences([EncodedSequence([1], [], [])], 1, SHAPE).to("meta").blank is None


def interpolated_sequence():
    """One image whose feature map is interpolated."""
    tiles = np.zeros((5, 3, TILE, TILE), np.uint8)
    return EncodedSequence([IMAGE, 3], [tiles], [visual_layout(60, 50, GRIDS, TILE, 2, 1)])


def blank_sequence():
    """A stand-in for an image that is not there."""
    return encoder("qwen").encode(Side("<image>", []))


def test_text_only_costs_no_tiles():
    packed = pack_sequences([EncodedSequence([5, 6, 7], [], []), EncodedSequence([8], [], [])], 1, SHAPE)
    assert packed.tokens.tolist() == [5, 6, 7, 8] and packed.cu_seqlens.tolist() == [0, 3, 4]
    assert packed.tiles.shape == (0, 3, TILE, TILE)
    assert packed.visual_source.shape == packed.visual_position.shape == (0,)
    assert packed.visual_source.dtype == torch.int64


@pytest.mark.parametrize("multiple", [1, 8])
def test_nothing_packs_into_one_padding_sequence(multiple):
    packed = pack_sequences([], multiple, SHAPE)
    assert packed.tokens.tolist() == [0] * multiple and packed.cu_seqlens.tolist() == [0, multiple]
    assert packed.lengths == [multiple] and packed.num_sequences == 0
    assert packed.last_token.shape == (0,) and packed.tiles.shape == (0, 3, TILE, TILE)


def pair(key, query, target, target_id=None, negatives=()):
    ids = [f"n-{key}-{i}" for i in range(len(negatives))]
    return Pair(key, "birds", query, target, f"q-{key}", target_id or f"t-{key}", list(negatives), ids)


def packed_pairs(pairs, pad_to_multiple=1, hard_negatives=0, problems=None):
    encoded = encode_pairs(pairs, encoder(), hard_negatives, [].append if problems is None else problems.append)
    return pack_pairs(encoded, len(pairs) - len(encoded), "birds", pad_to_multiple, SHAPE)


def test_pairs_are_queries_then_targets():
    pairs = [
        pair("a", Side("ab", []), Side("", [png(28, 28, 10)]), "same"),
        pair("b", Side("c", [png(70, 28, 20)]), Side("def", []), "same"),
    ]
    batch = packed_pairs(pairs, 4)
    encode = encoder().encode
    expected = [naive(encode(side)) for side in (pairs[0].query, pairs[1].query, pairs[0].target, pairs[1].target)]
    assert unpacked(batch.sequences)[:4] == expected
    assert expected[0] == [97, 98, 1] and expected[2][-1] == 1
    assert batch.keys == ["a", "b"] and batch.num_pairs == 2 and batch.num_skipped == 0 and batch.subset == "birds"
    assert batch.query_ids.tolist() == [stable_hash("q-a"), stable_hash("q-b")]
    assert batch.target_ids[0] == batch.target_ids[1] and batch.query_ids.dtype == torch.int64
    assert batch.num_hard_negatives == 0 and batch.hard_negative_ids.dtype == torch.int64


@pytest.mark.parametrize(("used", "kept"), [(0, (0, 0, 0)), (1, (1, 0, 1)), (2, (2, 0, 1)), (9, (3, 0, 1))])
def test_first_hard_negatives_come_after_the_targets(used, kept):
    negatives = [Side("no", []), Side("", [png(70, 28, 30)]), Side("nor this", [])], [], [Side("", [png(28, 28, 40)])]
    pairs = [
        pair(key, Side(key, [png(28, 28, level)]), Side("x", []), negatives=sides)
        for key, level, sides in zip("abc", (10, 20, 50), negatives)
    ]
    encoded = encode_pairs(pairs, encoder(), used, pytest.fail)
    batch = pack_pairs(encoded, 0, "birds", 1, SHAPE)
    taken = [(side, f"n-{p.key}-{i}") for p, n in zip(pairs, kept) for i, side in enumerate(p.hard_negatives[:n])]
    sides = [p.query for p in pairs] + [p.target for p in pairs] + [side for side, _ in taken]
    assert unpacked(batch.sequences) == [naive(encoder().encode(side)) for side in sides]
    assert batch.hard_negative_ids.tolist() == [stable_hash(name) for _, name in taken]
    assert (batch.num_pairs, batch.num_hard_negatives) == (3, sum(kept))
    for p, one, n in zip(pairs, encoded, kept):
        assert one.length == sum(encoder().encode(side).length for side in (p.query, p.target, *p.hard_negatives[:n]))


@pytest.mark.parametrize(("positives", "used"), [(None, 9), (2, 1), (1, 0)])
def test_targets_and_scores_lie_pair_by_pair(positives, used):
    first = pair("a", Side("a", []), Side("t0", []), negatives=[Side("n0", []), Side("n1", [])])
    first.further_targets, first.further_target_ids = [Side("t1", []), Side("t2", [])], ["one", "two"]
    first.scores = [0.5, 0.25, 4.0, -1.0, -2.0]
    pairs = [first, pair("b", Side("b", []), Side("t", []), negatives=[Side("n", [])])]
    encoded = encode_pairs(pairs, encoder(), used, pytest.fail, positives)
    batch = pack_pairs(encoded, 0, "birds", 1, SHAPE)
    targets, negatives = first.targets[:positives], first.hard_negatives[:used]
    sides = [p.query for p in pairs] + targets + [pairs[1].target] + negatives + pairs[1].hard_negatives[:used]
    assert unpacked(batch.sequences) == [naive(encoder().encode(side)) for side in sides]
    names = [*first.target_ids[:positives], "t-b"]
    assert batch.target_ids.tolist() == [stable_hash(name) for name in names] and batch.num_targets == len(names)
    assert batch.target_rows is None if positives == 1 else batch.target_rows.tolist() == [0] * len(targets) + [1]
    assert batch.hard_rows.tolist() == [0] * len(negatives) + [1] * min(used, 1) and batch.num_pairs == 2
    scores = [
        *first.scores[: len(targets)],
        math.nan,
        *first.scores[3 : 3 + len(negatives)],
        *[math.nan] * min(used, 1),
    ]
    torch.testing.assert_close(batch.scores, torch.tensor(scores), rtol=0, atol=0, equal_nan=True)
    assert packed_pairs(pairs[1:]).scores is None
    both = PairIds.of([packed_pairs(pairs[1:], hard_negatives=1), batch])
    known = [math.nan, *scores[: len(names)], math.nan, *scores[len(names) :]]
    torch.testing.assert_close(both.scores, torch.tensor(known), rtol=0, atol=0, equal_nan=True)
    outputs = [torch.rand(3, 4), torch.rand(batch.sequences.num_sequences, 4)]
    rows = PairEmbeddings.of(outputs, [packed_pairs(pairs[1:], hard_negatives=1), batch])
    assert rows.target_rows is None if positives == 1 else rows.target_rows.tolist() == [0, *[1] * len(targets), 2]
    assert rows.hard_rows.tolist() == [0, *(1 + batch.hard_rows).tolist()]
    assert rows.target[1:].equal(outputs[1][2 : 2 + len(names)])


def test_unreadable_hard_negative_costs_its_pair_only_when_it_is_used():
    negatives = [Side("fine", []), Side("", [png(28, 28, 2)[:60]])]
    pairs = [pair("a", Side("q", []), Side("t", []), negatives=negatives), pair("b", Side("q", []), Side("t", []))]
    problems = []
    batch = packed_pairs(pairs, hard_negatives=1, problems=problems)
    assert batch.keys == ["a", "b"] and batch.num_hard_negatives == 1 and not problems
    batch = packed_pairs(pairs, hard_negatives=2, problems=problems)
    assert batch.keys == ["b"] and batch.num_skipped == 1 and batch.num_hard_negatives == 0
    assert batch.sequences.num_sequences == 2
    [problem] = problems
    assert problem.startswith("pair a of subset birds: not a readable image")


def test_hash_is_the_same_everywhere():
    assert stable_hash("t-a") == -150981774169436957  # b2sum -l 64, little endian
    assert stable_hash("t-a") != stable_hash("t-b")


def test_unusable_pairs_are_left_out_and_named():
    good = [pair(key, Side(key, [png(28, 28, level)]), Side("x", [])) for key, level in (("a", 1), ("c", 3))]
    bad = pair("broken-one", Side("q", []), Side("t", [png(28, 28, 2)[:60]]))
    long = pair("too-long", Side("q", [png(56, 56, 2)] * 40), Side("t", []))
    void = pair("void", Side("q", []), Side(" \n", []))
    problems = []
    batch = packed_pairs([good[0], bad, long, void, good[1]], problems=problems)
    assert batch.keys == ["a", "c"] and batch.num_skipped == 3
    for problem, key, why in zip(
        problems,
        ("broken-one", "too-long", "void"),
        ("not a readable image", "data.max_length=400", "neither text nor image"),
        strict=True,
    ):
        assert problem.startswith(f"pair {key} of subset birds: ") and why in problem
    alone = packed_pairs(good)
    assert unpacked(batch.sequences) == unpacked(alone.sequences)
    empty = packed_pairs([bad], 8)
    assert empty.num_pairs == 0 and empty.num_skipped == 1 and empty.query_ids.shape == (0,)
    assert empty.sequences.tokens.shape == (8,)


def test_encoder_raises_for_a_bad_image():
    with pytest.raises(BadImageError):
        encoder().encode(Side("", [b"nothing"]))


def test_encoder_uses_the_grids():
    sequence = encoder().encode(Side("hi", [png(70, 20, 9), png(10, 10, 8)]))
    assert sequence.tokens == [IMAGE, IMAGE, ord("h"), ord("i"), 1]
    assert [tile.shape for tile in sequence.tiles] == [(3, 3, TILE, TILE), (2, 3, TILE, TILE)]
    assert sequence.length == 3 + sum(map(len, sequence.layouts))
    squashed = encoder(grids=()).encode(Side("hi", [png(70, 20, 9)]))
    assert squashed.tiles[0].shape == (1, 3, TILE, TILE)
    assert squashed.layouts[0].source.tolist() == [0, 1, 2, 3, NEWLINE]


@pytest.mark.parametrize(("max_tiles", "tokens"), [(9, 4 + 4 * 5), (None, 4 + 4 * 5), (2, 4 + 2 * 3), (1, 4 + 2 * 3)])
def test_encoder_interpolates_above_its_cap(max_tiles, tokens):
    sequence = encoder(anyres_max_tiles=max_tiles).encode(Side("", [png(60, 60, 9)]))
    assert len(sequence.tiles[0]) == 5 and len(sequence.layouts[0]) == tokens
    assert sequence.length == tokens + 1


def test_placeholder_without_image_is_a_blank_tile_in_the_released_template_only():
    side = Side("<|image_1|>\nFind it", [])
    released = encoder("qwen").encode(side)
    assert released.tokens.count(IMAGE) == 1 and released.layouts[0].source.tolist() == [0, 1, 2, 3, NEWLINE]
    assert released.tiles[0].shape == (1, 3, TILE, TILE) and released.blank
    plain = encoder("plain").encode(side)
    assert plain.tiles == plain.layouts == [] and plain.tokens == [*map(ord, "Find it"), 1]
    assert not plain.blank and not encoder("qwen").encode(Side("<image>", [png(9, 9, 1)])).blank
    two = encoder("qwen", max_length=4096).encode(Side("<image> and <image>", []))
    assert pack_sequences([two, plain], 1, SHAPE).blank.tolist() == [True, True]


def test_placeholder_without_image_can_be_removed():
    def encode(text, images=(), **options):
        return encoder("qwen", image_token_without_image="remove", **options).encode(Side(text, list(images)))

    removed, never_written = encode("<|image_1|>\nFind it.\n"), encode("Find it.\n")
    assert removed == never_written and removed.tiles == [] and not removed.blank
    assert removed.tokens == encoder("qwen").encode(Side("Find it.\n", [])).tokens
    with_image = Side("<|image_1|>\nFind it.", [png(9, 9, 1)])
    assert encode(with_image.text, with_image.images).tokens == encoder("qwen").encode(with_image).tokens
    with pytest.raises(DataError, match="2 image placeholders for 1 images"):
        encode("<image> <image>", with_image.images)


def test_encoded_length_keeps_to_max_length():
    side = Side("x" * 1000, [png(90, 50, 1)])
    assert encoder("qwen", max_length=300).encode(side).length == 300
    assert encoder("plain", max_length=60).encode(side).length == 60


def configs(tmp_path, vocab_size=10, **data):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 7}, unk_token="[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    vision = VisionConfig(image_size=56, patch_size=14)
    language = LanguageConfig(vocab_size=vocab_size)
    return (
        DataConfig(path=str(tmp_path), prompt="plain", max_length=99, **data),
        ModelConfig(vision=vision, language=language, image_grids=[[1, 1], [2, 1]], anyres_max_tiles=5),
    )


def test_build_encoder_from_the_configuration(tmp_path):
    built = build_processor(*configs(tmp_path))
    assert (built.template, built.max_length, built.grids) == ("plain", 99, ((1, 1), (2, 1)))
    assert built.tile_shape == TileShape(size=56, patches=16) and built.tokenizer.eos_id == 7
    assert (built.anyres_max_tiles, built.image_token_without_image) == (5, "blank")
    assert build_processor(*configs(tmp_path, image_token_without_image="remove")).image_token_without_image == "remove"
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    data, model = configs(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    data.path = str(elsewhere)
    assert build_processor(data, model).tokenizer.vocab_size == 8


def test_build_encoder_errors(tmp_path):
    with pytest.raises(ConfigError, match="has 8 token ids, more than model.language.vocab_size=7"):
        build_processor(*configs(tmp_path, vocab_size=7))
    data, model = configs(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="neither tokenizer.json nor tokenizer.model"):
        build_processor(data, model)
    data.tokenizer = str(tmp_path / "absent.model")
    with pytest.raises(DataError, match="absent.model is no file"):
        build_processor(data, model)

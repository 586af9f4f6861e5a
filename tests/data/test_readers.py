"""Steps by a token budget: sizes from headers, micro batches within it, passes, bad pairs, the order of the pairs."""

import io
import itertools
import logging
from dataclasses import replace

import pytest
from letters import Letters
from PIL import Image

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_llave.data.balance import TokenBudget
from megatron_llave.data.index import Index, write_index
from megatron_llave.data.packing import encode_pairs, measure_pair
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import DataError
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

BATCH, TILE_TOKENS = 16, 2.5
ROTATED = 6  # EXIF orientation: a quarter turn


ENCODER = LlavaOnevisionProcessor(Letters(), "plain", 90, ((1, 2), (2, 1), (2, 2)), 28, 14)


def image(width, height, kind="PNG", orientation=None):
    data, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.effect_noise((width, height), 50).convert("RGB").save(data, kind, exif=exif)
    return data.getvalue()


def make_pair(number):
    """Pairs of 1 to 3 images, in one of them turned by its EXIF, and of texts of many lengths with a hard negative."""
    images = [image(20 + 9 * number % 50, 30), image(64, 21, "JPEG", ROTATED if number % 3 == 0 else None)]
    target = Side("x" * (1 + 37 * number % 100), [image(25, 60, "PNG", ROTATED)] if number % 4 == 0 else [])
    query = Side("", images[: 1 + number % 2])
    return Pair(f"p-{number}", "p", query, target, f"q{number}", f"t{number}", [Side("no", [])], [f"n{number}"])


def write(folder, pairs):
    write_index(folder, Index({"p": write_subset(pairs, folder, "p", "retrieval", 20)}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mixed"), map(make_pair, range(48)))


def config(folder, budget=None, **train):
    data = DataConfig(path=str(folder), prompt="plain", workers=0, hard_negatives=1)
    return RunConfig(data=data, train=TrainConfig(global_batch_size=BATCH, tokens_per_micro_batch=budget, **train))


def batches_of(cfg, count, world=1, rank=0, position=None, multiple=4):
    """The next `count` buffers of the stream."""
    tokens = cfg.train.tokens_per_micro_batch
    budget = None if tokens is None else TokenBudget(tokens, TILE_TOKENS)
    stream = build_train_stream(cfg, ENCODER, rank, world, multiple, position, budget)
    return [unpack_step(buffer) for buffer in itertools.islice(stream, count)]


def steps_of(singles):
    """The buffers of each step, which has two passes."""
    while singles:
        count = 2 * singles[0].count
        step, singles = singles[:count], singles[count:]
        if len(step) == count:
            yield step[: count // 2], step[count // 2 :]


def same(ours, theirs):
    pairs = [(a.batches[0].sequences, b.batches[0].sequences) for a, b in zip(ours, theirs, strict=True)]
    return all(a.tokens.equal(b.tokens) and a.tiles.equal(b.tiles) for a, b in pairs)


def test_sizes_from_headers_are_those_of_the_encoded_pair():
    video = Side("<video> seen", [image(40, 30)] * 3, is_video=True)
    as_released = replace(ENCODER, images=replace(ENCODER.images, corrections=()))
    encoders = [ENCODER, replace(ENCODER, grids=(), max_length=30), as_released]
    pairs = [*map(make_pair, range(12)), Pair("v", "p", video, Side("x", []), "v", "v")]
    for encoder, pair in itertools.product(encoders, pairs):
        [encoded] = encode_pairs([pair], encoder, 1, pytest.fail)
        sizes = [(x.length, sum(map(len, x.tiles))) for x in encoded.sequences]
        assert [(size.tokens, size.tiles) for size in measure_pair(pair, encoder, 1)] == sizes, pair.key


@pytest.mark.parametrize(("world", "context"), [(1, 1), (2, 1), (2, 2)])
def test_micro_batches_hold_the_ranks_pairs_and_no_more_than_the_budget(folder, world, context):
    counted = config(folder)
    counted.parallel = ParallelConfig(context=context)
    budget = replace(counted, train=config(folder, budget=200).train)
    for rank in range(world):
        expected = batches_of(counted, 3, world, rank)
        steps = list(itertools.islice(steps_of(batches_of(budget, 60, world, rank)), 3))
        for whole, (first, second) in zip(expected, steps, strict=True):
            assert same(first, second)
            assert {single.position["step"] for single in first} == {whole.position["step"]}
            batches = [single.batches[0] for single in first]
            pairs = sorted(key for batch in whole.batches for key in batch.keys)
            assert sorted(key for batch in batches for key in batch.keys) == pairs
            rows = [batch.sequences for batch in batches]
            costs = [sum(row.padded_lengths[: row.num_sequences]) + TILE_TOKENS * row.num_tiles for row in rows]
            assert max(costs) <= 200 and sum(cost <= 100 for cost in costs) <= 1
            assert {single.longest for single in first} == {max(sum(row.padded_lengths) for row in rows)}


def test_one_micro_batch_needs_one_pass_and_a_reward_model_one_more(folder):
    singles = batches_of(config(folder, budget=10**6), 3)
    assert [single.position["step"] for single in singles] == [1, 2, 3] and {x.count for x in singles} == {1}
    cfg = config(folder, budget=10**6)
    cfg.loss.reward = "ema"
    assert [single.position["step"] for single in batches_of(cfg, 4)] == [1, 1, 2, 2]


def test_interleaved_schedule_gets_empty_micro_batches(folder):
    cfg = config(folder, budget=200)
    number = batches_of(cfg, 1)[0].count
    cfg.parallel = ParallelConfig(pipeline=number + 1, virtual_pipeline=2)
    singles = batches_of(cfg, number + 1)
    assert {single.count for single in singles} == {number + 1}
    assert [single.batches[0].num_pairs > 0 for single in singles] == [True] * number + [False]
    assert singles[-1].batches[0].sequences.lengths == [4]


def test_resumed_stream_is_bit_equal(folder):
    cfg = config(folder, budget=200)
    [_, (before, _), (first, second)] = itertools.islice(steps_of(batches_of(cfg, 60)), 3)
    assert same(batches_of(cfg, len(first + second), position=before[0].position), first + second)


def test_bad_pairs_are_left_out_of_both_passes_and_reported_once(tmp_path, caplog):
    pairs = list(map(make_pair, range(20)))
    whole = pairs[3].query.images[0]
    pairs[3].query.images[0] = whole[: len(whole) // 2]  # its header is whole
    pairs[5].hard_negatives = [Side(" ", [])]  # seen without decoding
    pairs[7].query.images[:], pairs[7].target.text = [image(56, 28)] * 5, "x" * 90  # more than the budget
    cfg = config(write(tmp_path, pairs), budget=200)
    cfg.train.global_batch_size = 20
    count = batches_of(cfg, 1)[0].count
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        [(first, second)] = steps_of(batches_of(cfg, 2 * count))
    assert same(first, second)
    kept = {key for single in second for key in single.batches[0].keys}
    assert kept == {f"p-{number}" for number in range(20)} - {"p-3", "p-5", "p-7"}
    assert [sum(single.batches[0].num_skipped for single in step) for step in (first, second)] == [3, 0]
    reported = "".join(record.getMessage() for record in caplog.records)
    assert all(reported.count(f"pair p-{number} of subset p: ") == 1 for number in (3, 5, 7))
    assert "raise train.tokens_per_micro_batch=200 to at least" in reported


def test_step_without_a_usable_pair_is_one_empty_micro_batch(folder):
    cfg = config(folder, budget=2)
    cfg.data.max_bad_fraction = 1
    [single] = batches_of(cfg, 1)
    assert (single.count, single.longest, single.batches[0].num_pairs) == (1, 4, 0)
    assert single.batches[0].num_skipped == BATCH
    cfg.data.max_bad_fraction = 0.01
    with pytest.raises(DataError, match="16 of 16 pairs were bad.*train.tokens_per_micro_batch=2 to at least"):
        batches_of(cfg, 1)


def test_pair_that_is_longer_than_its_header_says_is_left_out(folder, caplog, monkeypatch):
    """As a PNG whose rotation is noted after its pixels may be: the pipeline sends rows of the planned length."""
    cfg, measure = config(folder, budget=200), LlavaOnevisionProcessor.measure

    def shorter(self, side):
        size = measure(self, side)
        return replace(size, tokens=size.tokens - 1) if side.text == "x" * 38 else size

    monkeypatch.setattr(LlavaOnevisionProcessor, "measure", shorter)
    with caplog.at_level(logging.WARNING):
        epoch = list(itertools.islice(steps_of(batches_of(cfg, 60)), 3))
    kept = {key for first, _ in epoch for single in first for key in single.batches[0].keys}
    assert kept == {f"p-{number}" for number in range(48)} - {"p-1"}
    assert caplog.text.count("pair p-1 of subset p: it has more tokens than the headers") == 1


def test_workers_give_the_same_stream(folder):
    cfg = config(folder, budget=200)
    alone = batches_of(cfg, 12)
    cfg.data.workers = 2
    assert same(batches_of(cfg, 12), alone)

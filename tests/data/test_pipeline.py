"""The training stream: the same pairs at every layout, every pair once an epoch, resume, mixture, damaged pairs."""

import dataclasses
import io
import itertools
import logging
import shutil
import time
from collections import Counter

import psutil
import pytest
from letters import Letters
from PIL import Image

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig, SubsetConfig
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.index import Index, Shard, Subset, write_index
from megatron_llave.data.pipeline import build_train_stream, rank_shares, steps_of_epochs
from megatron_llave.data.readers import shuffled_locations
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

BATCH = 8
SIZES = {"birds": 43, "trees": 20, "words": 8}


ENCODER = LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14)


def png(level):
    data = io.BytesIO()
    Image.new("RGB", (28, 28), (level, 0, 0)).save(data, "PNG")
    return data.getvalue()


def make_pair(subset, number, picture=None):
    key = f"{subset}-{number}"
    images = [] if subset == "words" else [picture or png(number)]
    return Pair(key, subset, Side(key, []), Side("", images) if images else Side("same", []), key, key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of ten pairs, of three subsets."""
    directory = tmp_path_factory.mktemp("pairs")
    subsets = {
        name: write_subset((make_pair(name, i) for i in range(size)), directory, name, "retrieval", 10)
        for name, size in SIZES.items()
    }
    write_index(directory, Index(subsets))
    return directory


def config(folder, subsets=None, micro=None, seed=0, batch=BATCH, negatives="global_batch"):
    chosen = {name: SubsetConfig(*values) for name, values in (subsets or {}).items()}
    return RunConfig(
        data=DataConfig(path=str(folder), prompt="plain", max_length=64, subsets=chosen, workers=0),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro, seed=seed),
        loss=LossConfig(negatives=negatives),
    )


def steps(cfg, count, rank=0, world=1, start_step=0, encoder=ENCODER):
    """Micro batches of each of `count` steps; a later start comes from the position of an uninterrupted stream."""
    position = None
    if start_step:
        stream = build_train_stream(cfg, ENCODER, 0, 1, 4)
        position = unpack_step(next(itertools.islice(stream, start_step - 1, None))).position
    stream = build_train_stream(cfg, encoder, rank, world, 4, position)
    return [unpack_step(step).batches for step in itertools.islice(stream, count)]


def keys(step):
    return [key for batch in step for key in batch.keys]


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 4), (2, None), (2, 1), (2, 2), (4, None), (4, 1)])
def test_pairs_of_a_step_do_not_depend_on_the_layout(folder, world, micro):
    whole = [keys(step) for step in steps(config(folder), 12)]
    cfg = config(folder, micro=micro, negatives="micro_batch")
    ranks = [steps(cfg, 12, rank, world) for rank in range(world)]
    for number, expected in enumerate(whole):
        micro_batches = [ranks[rank][number] for rank in range(world)]
        assert {len(batches) for batches in micro_batches} == {BATCH // world // (micro or BATCH // world)}
        # Micro batch 0 of every rank, then micro batch 1 of every rank: the order of the whole batch.
        joined = [key for same_micro in zip(*micro_batches) for batch in same_micro for key in batch.keys]
        assert joined == expected


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Texts of 1 to 60 letters, each with two hard negatives of as many."""
    directory = tmp_path_factory.mktemp("uneven")
    pairs = []
    for i in range(48):
        text = "x" * (1 + 37 * i % 60)
        negatives = [Side(text, []), Side(text.upper(), [])]
        pairs.append(Pair(f"w-{i}", "w", Side(text, []), Side("same", []), f"w-{i}", "t", negatives, [f"n-{i}", "n"]))
    write_index(directory, Index({"w": write_subset(pairs, directory, "w", "retrieval", 20)}))
    return directory


def tokens(batch):
    return int(batch.sequences.cu_seqlens[batch.sequences.num_sequences])


@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 6), (2, 3), (2, 1), (2, 12)])
def test_global_batch_deals_a_ranks_pairs_by_tokens(uneven, world, micro, hard_negatives):
    for rank in range(world):
        dealt, as_they_come = (
            config(uneven, batch=24, micro=micro, negatives=negatives) for negatives in ("global_batch", "micro_batch")
        )
        dealt.data.hard_negatives = as_they_come.data.hard_negatives = hard_negatives
        dealt, as_they_come = (steps(cfg, 6, rank, world) for cfg in (dealt, as_they_come))
        for ours, theirs in zip(dealt, as_they_come):
            order = keys(theirs)
            assert len(ours) == len(theirs) == 24 // world // micro
            assert sorted(keys(ours)) == sorted(order) and all(batch.num_pairs for batch in ours)
            assert sum(map(tokens, ours)) == sum(map(tokens, theirs))
            for batch in ours:
                places = [order.index(key) for key in batch.keys]
                assert places == sorted(places)
                assert batch.num_hard_negatives == hard_negatives * batch.num_pairs
        longest = [[max(map(tokens, step)) for step in stream] for stream in (dealt, as_they_come)]
        assert all(ours <= theirs for ours, theirs in zip(*longest))
        if micro in (1, 12):  # one pair each, or one micro batch: there is nothing to gain
            assert longest[0] == longest[1]
        else:
            assert sum(longest[0]) < 0.9 * sum(longest[1])


@pytest.mark.parametrize("negatives", ["global_batch", "micro_batch"])
def test_one_micro_batch_is_the_share_as_it_comes(uneven, negatives):
    whole = [key for step in steps(config(uneven, batch=24), 3) for key in keys(step)]
    ranks = [steps(config(uneven, batch=24, negatives=negatives), 3, rank, 2) for rank in range(2)]
    assert [key for pair in zip(*ranks) for step in pair for key in keys(step)] == whole


def test_hard_negatives_that_are_not_used_are_not_encoded(uneven):
    class Counting(Letters):
        texts = []

        def encode(self, text):
            self.texts.append(text)
            return super().encode(text)

    cfg = config(uneven, batch=24)
    cfg.data.hard_negatives = 1
    steps(cfg, 1, encoder=dataclasses.replace(ENCODER, tokenizer=Counting()))
    assert len(Counting.texts) == 3 * 24 and not any("X" in text for text in Counting.texts)


def test_every_pair_comes_once_per_epoch(folder):
    stream = [key for step in steps(config(folder, {"birds": ()}), 16) for key in keys(step)]
    epochs = [stream[0:43], stream[43:86]]
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"birds-{i}" for i in range(43))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [f"birds-{i}" for i in range(43)]


def test_shards_and_pairs_within_a_shard_are_both_shuffled():
    subset = Subset("retrieval", [Shard(f"{i}.tar", 50, 0, "") for i in range(20)])
    order = list(itertools.islice(shuffled_locations(subset, "birds", 0, 0), 1000))
    shards = [shard for shard, _ in order]
    assert [shard for shard, _ in itertools.groupby(shards)] != list(range(20))
    assert all(len(set(shards[i : i + 50])) == 1 for i in range(0, 1000, 50))
    within = [[pair for shard, pair in order if shard == number] for number in (0, 1)]
    assert sorted(within[0]) == list(range(50)) and within[0] != sorted(within[0]) and within[0] != within[1]
    other_seed = list(itertools.islice(shuffled_locations(subset, "birds", 1, 0), 1000))
    other_name = list(itertools.islice(shuffled_locations(subset, "trees", 0, 0), 1000))
    assert order != other_seed and order != other_name


@pytest.mark.parametrize("start", [0, 1, 42, 43, 44, 86, 100, 4321])
def test_skipping_equals_walking(start):
    subset = Subset("retrieval", [Shard(f"{i}.tar", pairs, 0, "") for i, pairs in enumerate((10, 10, 0, 10, 13))])
    walked = itertools.islice(shuffled_locations(subset, "birds", 3, 0), start, start + 90)
    assert list(itertools.islice(shuffled_locations(subset, "birds", 3, start), 90)) == list(walked)


@pytest.mark.parametrize("start_step", [1, 5, 23])
def test_resumed_stream_equals_the_uninterrupted_one(folder, start_step):
    cfg = config(folder, {"birds": (2.0,), "trees": (1.0, 7)}, micro=2)
    walked = steps(cfg, 30, rank=1, world=2)[start_step:]
    resumed = steps(cfg, 30 - start_step, rank=1, world=2, start_step=start_step)
    assert [keys(step) for step in resumed] == [keys(step) for step in walked]
    for ours, theirs in zip(itertools.chain(*resumed), itertools.chain(*walked)):
        assert ours.sequences.tokens.equal(theirs.sequences.tokens)
        assert ours.sequences.tiles.equal(theirs.sequences.tiles)


def test_same_seed_same_stream_other_seed_other_stream(folder):
    first, again, other = ([keys(step) for step in steps(config(folder, seed=seed), 6)] for seed in (5, 5, 6))
    assert first == again != other


def test_a_step_holds_one_subset_and_its_pictures(folder):
    seen = set()
    for step in steps(config(folder, micro=4), 20):
        names = {batch.subset for batch in step} | {key.split("-")[0] for key in keys(step)}
        assert len(names) == 1
        seen |= names
        for batch in step:
            numbers = [int(key.split("-")[1]) for key in batch.keys]
            assert batch.sequences.num_sequences == 2 * batch.num_pairs == 8
            assert batch.sequences.tokens.shape[0] % 4 == 0
            expected = [] if batch.subset == "words" else numbers
            assert batch.sequences.tiles[:, 0, 0, 0].tolist() == expected
    assert seen == set(SIZES)


def test_order_does_not_depend_on_how_the_mixture_is_written(folder):
    one = steps(config(folder, {"birds": (1.0,), "trees": (2.0,)}), 10)
    two = steps(config(folder, {"trees": (2.0,), "birds": (1.0,)}), 10)
    assert [keys(step) for step in one] == [keys(step) for step in two]


def test_unknown_subset_names_what_there_is(folder):
    with pytest.raises(ConfigError, match="data.subsets.fish is not in the index, which has birds, trees, words"):
        build_train_stream(config(folder, {"fish": ()}), ENCODER, 0, 1, 1)


def test_batch_larger_than_a_subset_is_refused(folder):
    with pytest.raises(ConfigError, match="subset words has 8 pairs, fewer than train.global_batch_size=16"):
        build_train_stream(config(folder, batch=16), ENCODER, 0, 1, 1)
    assert len(keys(steps(config(folder, {"trees": ()}, batch=20), 1)[0])) == 20


def test_missing_index_is_named(tmp_path):
    with pytest.raises(DataError, match="index.json"):
        build_train_stream(config(tmp_path), ENCODER, 0, 1, 1)


@pytest.mark.parametrize("negatives", ["global_batch", "micro_batch"])
def test_damaged_picture_costs_one_pair_only(tmp_path, caplog, negatives):
    pairs = [make_pair("birds", i, png(i)[:60] if i == 5 else None) for i in range(16)]
    write_index(tmp_path, Index({"birds": write_subset(pairs, tmp_path, "birds", "retrieval", 5)}))
    with caplog.at_level(logging.WARNING):
        epoch = list(itertools.chain(*steps(config(tmp_path, micro=4, negatives=negatives), 2)))
    assert [batch.num_skipped for batch in epoch].count(1) == 1 and sum(batch.num_skipped for batch in epoch) == 1
    assert sorted(int(key.split("-")[1]) for key in keys(epoch)) == [i for i in range(16) if i != 5]
    for batch in epoch:
        assert batch.num_pairs == 4 - batch.num_skipped or negatives == "global_batch"
        assert batch.sequences.tiles[:, 0, 0, 0].tolist() == [int(key.split("-")[1]) for key in batch.keys]
    assert "birds-5 of subset birds" in caplog.text


def test_shard_of_another_subset_is_left_out(tmp_path, caplog):
    """It has the size and the number of pairs that the index says."""
    for subset in ("cats", "dogs"):
        (tmp_path / subset).mkdir()
        pairs = [make_pair(subset, i) for i in range(16)]
        index = Index({subset: write_subset(pairs, tmp_path / subset, subset, "retrieval", 8)})
        write_index(tmp_path / subset, index)
    shutil.copy(tmp_path / "dogs" / "dogs-000000.tar", tmp_path / "cats" / "cats-000000.tar")
    epoch = list(itertools.chain(*steps(config(tmp_path / "cats", {"cats": ()}, micro=4), 2)))
    assert sum(batch.num_skipped for batch in epoch) == 8
    assert all(key.startswith("cats-") for key in keys(epoch))
    assert "cats-000000.tar has a pair of subset 'dogs' in its place" in caplog.text


def test_rank_reads_only_its_own_pairs(folder):
    class Counting(Letters):
        texts = []

        def encode(self, text):
            self.texts.append(text)
            return super().encode(text)

    encoder = LlavaOnevisionProcessor(Counting(), "plain", 64, (), 28, 14)
    steps(config(folder, {"birds": ()}), 3, rank=1, world=4, start_step=50, encoder=encoder)
    assert len(Counting.texts) == 3 * 2 * BATCH // 4


def test_shares_cover_the_batch_once():
    assert rank_shares(8, 2, 1, 2) == [slice(2, 4), slice(6, 8)]
    taken = [i for rank in range(3) for share in rank_shares(24, 4, rank, 3) for i in range(24)[share]]
    assert sorted(taken) == list(range(24))


def test_sample_with_a_damaged_json_is_left_out(folder, tmp_path, caplog):
    """The tar is whole, one member in it is not: its pair is skipped and counted, its neighbours stay."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    shard = damaged / "words-000000.tar"
    content = shard.read_bytes()
    assert content.count(b'"id":"words-3"') == 2
    shard.write_bytes(content.replace(b'{"subset"', b'!"subset"', 1))
    streams = (build_train_stream(config(path, {"words": ()}), ENCODER, 0, 1, 1) for path in (folder, damaged))
    (whole,), (step,) = (unpack_step(next(stream)).batches for stream in streams)
    assert (step.num_pairs, step.num_skipped) == (BATCH - 1, 1)
    assert set(step.keys) < set(whole.keys)
    assert "words-000000.tar" in caplog.text and "not valid JSON" in caplog.text


def test_killed_worker_is_one_line_when_its_step_is_asked_for(folder):
    cfg = config(folder)
    cfg.data.workers = 1
    stream = build_train_stream(cfg, ENCODER, 0, 1, 1)
    before = psutil.Process().children()
    next(stream)
    for process in set(psutil.Process().children()) - set(before):
        process.kill()
    time.sleep(0.5)  # training goes on; a signal handler that raised would do so here
    with pytest.raises(DataError, match="a process that reads data was killed.*data.workers"):
        list(itertools.islice(stream, 100))


@pytest.mark.parametrize(("epochs", "expected"), [(1.0, 8), (2.0, 17), (0.5, 4), (0.05, 0)])
def test_steps_of_epochs_are_whole_steps_over_all_pairs(folder, epochs, expected):
    cfg = config(folder)
    cfg.train.epochs = epochs
    assert steps_of_epochs(cfg) == expected  # 71 pairs, 8 a step


def test_a_pair_without_scores_is_bad_where_the_objective_compares_them(tmp_path):
    pairs = [dataclasses.replace(make_pair("words", i), target_id=f"t{i}", scores=[float(i)]) for i in range(8)]
    pairs[3].scores = []
    write_index(tmp_path, Index({"words": write_subset(pairs, tmp_path, "words", "retrieval")}))
    cfg = config(tmp_path, batch=8)
    [[batch]] = steps(cfg, 1)
    assert batch.num_pairs == 8 and batch.scores.isnan().sum() == 1
    cfg.data.subsets = {"words": SubsetConfig(objective="cosent")}
    [[batch]] = steps(cfg, 1)
    assert "words-3" not in batch.keys and batch.num_skipped == 1
    assert sorted(batch.scores.tolist()) == [0, 1, 2, 4, 5, 6, 7]
    cfg.data.max_bad_fraction = 0.0
    with pytest.raises(DataError, match="pair words-3 of subset words: it has no scores, which objective=cosent needs"):
        steps(cfg, 1)

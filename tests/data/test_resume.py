"""The training stream killed and resumed: the same pairs as one that was not, with other numbers of ranks each once."""

import itertools
import json
import multiprocessing
import os
import random
import time
from collections import Counter

import pytest
from letters import Letters

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig, SubsetConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.index import Index, write_index
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import ConfigError
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor
from megatron_llave.processes import end_forks_with_parent

SIZES = {"birds": 83, "trees": 50, "words": 31}
BATCH, STEPS, SAVE_EVERY, KILLS = 4, 200, 3, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three subsets of texts in shards of ten."""
    directory = tmp_path_factory.mktemp("pairs")
    subsets = {}
    for name, size in SIZES.items():
        pairs = (Pair(f"{name}-{i}", name, Side(f"{i}", []), Side("x", []), f"{i}", f"{i}") for i in range(size))
        subsets[name] = write_subset(pairs, directory, name, "retrieval", 10)
    write_index(directory, Index(subsets))
    return directory


def stream(folder, rank=0, world=1, position=None, workers=0, **options):
    """(keys of a step, position after it)."""
    train = TrainConfig(global_batch_size=options.pop("batch", BATCH), seed=options.pop("seed", 0))
    data = DataConfig(path=str(folder), prompt="plain", max_length=64, workers=workers, **options)
    encoder = LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14)
    for flat in build_train_stream(RunConfig(data=data, train=train), encoder, rank, world, 1, position):
        step = unpack_step(flat)
        yield [key for batch in step.batches for key in batch.keys], step.position


def walk(folder, out, rank, world, pause):
    """What a rank of a run does: steps into a log, and every few of them a checkpoint of log and position at once."""
    end_forks_with_parent()  # as training does: a worker whose rank is killed before it looks at it would never end
    state = json.loads(out.read_text()) if out.is_file() else {"seen": [], "position": None}
    if len(state["seen"]) == STEPS:
        return
    for keys, position in stream(folder, rank, world, state["position"], workers=2):
        state["seen"].append(keys)
        time.sleep(pause)
        if position["step"] % SAVE_EVERY == 0 or position["step"] == STEPS:
            state["position"] = position
            out.with_suffix(".partial").write_text(json.dumps(state))
            os.replace(out.with_suffix(".partial"), out)
        if position["step"] == STEPS:
            return


def steps_saved(out):
    return len(json.loads(out.read_text())["seen"]) if out.is_file() else 0


def test_killed_ten_times_with_two_workers_and_two_ranks(folder, tmp_path):
    chance = random.Random(time.time_ns())  # another sequence of kills each time; all have to hold
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    kills = 0
    while not all(steps_saved(out) == STEPS for out in outs):
        ranks = [context.Process(target=walk, args=(folder, out, i, 2, 0.002)) for i, out in enumerate(outs)]
        for process in ranks:
            process.start()
        goal = min(STEPS, min(map(steps_saved, outs)) + chance.randint(1, STEPS // KILLS))
        deadline = time.monotonic() + 60
        while kills < KILLS and min(map(steps_saved, outs)) < goal and time.monotonic() < deadline:
            time.sleep(chance.uniform(0, 0.01))
        for process in ranks:
            if kills < KILLS:
                process.kill()
            # With a time limit it would wait for the workers too, who see only after seconds that they are orphans.
            process.join(None if kills < KILLS else 60)
            assert process.exitcode in ((-9, 0) if kills < KILLS else (0,)), process.exitcode
        kills += 1
    assert kills > KILLS
    for rank, out in enumerate(outs):
        expected = [keys for keys, _ in itertools.islice(stream(folder, rank, 2), STEPS)]
        assert json.loads(out.read_text())["seen"] == expected


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
@pytest.mark.parametrize("stop", [1, 17, 39])
def test_other_number_of_ranks_goes_on_in_the_epoch_no_pair_twice(folder, before, after, stop):
    epoch_steps = sum(size // BATCH for size in SIZES.values())
    seen, position = Counter(), None
    for rank in range(before):
        for keys, position in itertools.islice(stream(folder, rank, before), stop):
            seen.update(keys)
    for rank in range(after):
        for keys, _ in itertools.islice(stream(folder, rank, after, position), epoch_steps - stop):
            seen.update(keys)
    assert set(seen.values()) == {1}
    # What does not fill a batch is the beginning of the subset's next batch: here 3, 2 and 3 pairs.
    assert len(seen) == sum(size - size % BATCH for size in SIZES.values())


def test_resumed_epochs_go_on_with_what_was_left_over(folder):
    """Over four epochs each pair comes four times, but for the last incomplete batch of each subset."""
    steps = sum(4 * size // BATCH for size in SIZES.values())
    position, seen = None, Counter()
    for _ in range(2):
        for keys, position in itertools.islice(stream(folder, position=position), steps // 2):
            seen.update(keys)
    assert steps % 2 == 0 and set(seen.values()) <= {3, 4}
    assert 4 * sum(SIZES.values()) - sum(seen.values()) == sum(4 * size % BATCH for size in SIZES.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "had seed=0, now it is 1"),
        ({"batch": 8}, "had batch_size=4, now it is 8"),
        ({"sub_batches": 2}, "had batch_size=4, now it is 2|had batches_per_step=1, now it is 2"),
        ({"size_power": 0.5}, "had subset birds: (taken=0, now it is 4|weight=83.0, now it is 9.1)"),
        ({"subsets": {"birds": SubsetConfig(83.0)}}, "had subset (birds: taken=0, now it is 4|trees: pairs=50)"),
    ],
)
def test_another_order_of_pairs_is_refused(folder, changed, message):
    position = next(stream(folder))[1]
    with pytest.raises(ConfigError, match=message):
        next(stream(folder, position=json.loads(json.dumps(position)), **changed))


def test_changed_data_is_refused(folder, tmp_path):
    position = next(stream(folder))[1]
    position["subsets"]["birds"]["pairs"] = 82
    with pytest.raises(ConfigError, match="had subset birds: pairs=82, now it is 83"):
        next(stream(folder, position=position))

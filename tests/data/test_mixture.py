"""Which subset a batch is of: shares exact in each epoch, curricula, the same everywhere."""

from collections import Counter
from itertools import islice

import pytest

from megatron_llave.config.data import DataConfig, SubsetConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.index import Index, Shard, Subset
from megatron_llave.data.mixture import Mixture, Source, build_mixture, draw_subsets

SIZES = {"birds": 430, "trees": 200, "words": 70}
INDEX = Index({name: Subset("retrieval", [Shard(f"{name}.tar", size, 0, "")]) for name, size in SIZES.items()})


def drawn(mixture, count):
    return list(islice(draw_subsets(mixture), count))


def built(batch=10, sub_batches=1, seed=0, power=1.0, **subsets):
    data = DataConfig(path="x", subsets=subsets, sub_batches=sub_batches, size_power=power)
    return build_mixture(RunConfig(data=data, train=TrainConfig(global_batch_size=batch, seed=seed)), INDEX)


def test_by_size_an_epoch_takes_every_full_batch_once_and_keeps_the_rest_for_the_next():
    mixture = built(batch=16)
    taken, position = Counter(), 0
    for epoch in range(1, 8):
        full = {name: epoch * size // 16 for name, size in SIZES.items()}
        taken += Counter(drawn(mixture, sum(full.values()))[position:])
        position = sum(full.values())
        assert taken == full
    assert drawn(mixture, 40) != sorted(drawn(mixture, 40))


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_power_of_the_size(power):
    mixture = built(power=power)
    counts = Counter(drawn(mixture, 7000))
    total = sum(size**power for size in SIZES.values())
    assert all(abs(counts[name] - 7000 * size**power / total) < 4 for name, size in SIZES.items())


def test_given_weights_win_over_sizes():
    mixture = built(birds=SubsetConfig(1.0), words=SubsetConfig(3.0))
    assert list(mixture.sources) == ["birds", "words"]
    counts = Counter(drawn(mixture, 500))
    assert abs(counts["words"] - 375) < 3 and abs(counts["birds"] - 125) < 3


def test_subsets_start_at_their_step_and_the_others_share_the_steps_before():
    sources = {"birds": Source(600, 3.0, 0), "trees": Source(500, 1.0, 0), "words": Source(700, 4.0, 1000)}
    for per_step in (1, 3):
        order = drawn(Mixture(sources, 10, per_step, 0), 5000 * per_step)
        early, late = Counter(order[: 1000 * per_step]), Counter(order[1000 * per_step :])
        assert "words" not in early and "words" in order[1000 * per_step : 1010 * per_step]
        assert abs(early["birds"] - 750 * per_step) < 50 and abs(late["words"] - 2000 * per_step) < 100
        assert abs(late["trees"] - 500 * per_step) < 50


def test_the_order_is_that_of_the_seed():
    first, again, other = (drawn(built(seed=seed), 70) for seed in (5, 5, 6))
    assert first == again != other
    assert Counter(first) == Counter(other)


def test_sub_batches_are_what_is_drawn():
    mixture = built(batch=40, sub_batches=4)
    assert (mixture.batch_size, mixture.batches_per_step) == (10, 4)
    assert Counter(drawn(mixture, 70)) == {"birds": 43, "trees": 20, "words": 7}

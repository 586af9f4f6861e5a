"""The training stream with a mined order: it follows the order, has each pair once per epoch, and resumes bit-equal."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from letters import Letters
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.batch import Pair, Side, StepBatches
from megatron_llave.config.data import DataConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data import shard_reader
from megatron_llave.data.balance import TokenBudget
from megatron_llave.data.index import Index, read_index, write_index
from megatron_llave.data.order import BatchOrder, SubsetOrder
from megatron_llave.data.packing import stable_hash
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.data.tar_members import find_samples
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

SIZES, CLUSTER = {"birds": 43, "words": 24}, 4
ENCODER = LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14)


def write(folder: Path, sizes: dict[str, int]) -> Path:
    """Shards of ten pairs."""

    def pair(name: str, i: int) -> Pair:
        return Pair(f"{name}-{i}", name, Side(f"q {i}" * (i % 3 + 1), []), Side(f"t {i}", []), f"q{i}", f"t{i}")

    subsets = {
        name: write_subset((pair(name, i) for i in range(size)), folder, name, "retrieval", 10)
        for name, size in sizes.items()
    }
    write_index(folder, Index(subsets))
    return folder


def write_order(folder: Path, shards: Path) -> Path:
    """An order at random, as mining writes it."""
    folder.mkdir()
    subsets = {
        name: {
            "shards": [{"file": shard.file, "sha256": shard.sha256} for shard in subset.shards],
            "order": np.random.default_rng(subset.pairs).permutation(subset.pairs).tolist(),
        }
        for name, subset in read_index(shards).subsets.items()
    }
    value = {"format": "megatron_llave order", "version": 1, "cluster_size": CLUSTER, "subsets": subsets}
    (folder / "order.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, groups: ProcessGroupCollection) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("order")
    shards = write(root / "shards", SIZES)
    return shards, write_order(root / "order", shards)


def config(path: Path, order: Path | str | None, batch: int = 8, **data: object) -> RunConfig:
    data = {"workers": 0, **data}
    section = DataConfig(str(path), prompt="plain", max_length=64, order=order and str(order), **data)
    return RunConfig(data=section, train=TrainConfig(global_batch_size=batch))


def steps(cfg: RunConfig, count: int, rank: int = 0, world: int = 1, **given: object) -> list[StepBatches]:
    stream = build_train_stream(cfg, ENCODER, rank, world, 4, **given)
    return [unpack_step(step) for step in itertools.islice(stream, count)]


def keys(found: list[StepBatches]) -> list[list[str]]:
    return [[key for batch in step.batches for key in batch.keys] for step in found]


def plain_epochs(order: list[int], name: str, seed: int, epochs: int) -> list[int]:
    """The pairs of some epochs: what is left over and one cluster more close the gaps between epochs."""
    taken: list[int] = []
    for epoch in range(epochs):
        whole = len(order) // CLUSTER
        clusters = [order[i * CLUSTER : (i + 1) * CLUSTER] for i in range(whole)]
        rng = np.random.default_rng((seed, stable_hash(name) % 2**63, epoch))
        clusters = [clusters[i] for i in rng.permutation(whole)]
        gap = -len(taken) % CLUSTER
        pieces = order[whole * CLUSTER :]
        if gap > len(pieces):
            pieces = clusters.pop() + pieces
        taken += pieces[:gap] + list(itertools.chain(*clusters)) + pieces[gap:]
    return taken


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_pair_comes_once_per_epoch_in_the_order(folders: tuple[Path, Path], world: int) -> None:
    shards, out = folders
    value = json.loads((out / "order.json").read_text())["subsets"]
    expected = {name: plain_epochs(value[name]["order"], name, 0, 6) for name in SIZES}
    of_ranks = [steps(config(shards, out), 40, rank, world) for rank in range(world)]
    by_subset: dict[str, list[set[str]]] = {name: [] for name in SIZES}
    for parts in zip(*of_ranks):
        found = set(itertools.chain(*keys(list(parts))))
        assert len({key.partition("-")[0] for key in found}) == 1 and sum(map(len, keys(list(parts)))) == 8
        by_subset[next(iter(found)).partition("-")[0]].append(found)
    for name, size in SIZES.items():
        batches = by_subset[name]
        assert len(batches) * 8 > 4 * size
        for number, found in enumerate(batches):
            assert found == {f"{name}-{i}" for i in expected[name][number * 8 : (number + 1) * 8]}, (name, number)
        for epoch in range(6):
            assert sorted(expected[name][epoch * size : (epoch + 1) * size]) == list(range(size))


def test_all_clusters_but_two_are_whole_in_a_batch_and_epochs_differ() -> None:
    for size in (4, 5, 7, 16, 43, 46, 47):
        order = BatchOrder(CLUSTER, {"x": SubsetOrder([], np.random.default_rng(size).permutation(size))})
        taken = order.take("x", 3, 0, 20 * size)
        assert taken.tolist() == plain_epochs(order.subsets["x"].pairs.tolist(), "x", 3, 20)
        for epoch in range(20):
            of_epoch = taken[epoch * size : (epoch + 1) * size]
            assert sorted(of_epoch) == list(range(size))
        slots = {frozenset(slot) for slot in taken.reshape(-1, CLUSTER).tolist()}
        clusters = {frozenset(x) for x in order.subsets["x"].pairs[: size // 4 * 4].reshape(-1, 4).tolist()}
        assert clusters <= slots or size < 16
        for start, count in ((1, 3), (size - 1, 2 * size + 3), (7 * size + 2, 5), (0, 0)):
            assert order.take("x", 3, start, count).tolist() == taken[start : start + count].tolist()
    few = BatchOrder(CLUSTER, {"x": SubsetOrder([], np.array([2, 0, 1]))})  # mining looks at it, no run can use it
    assert few.take("x", 3, 0, 30).reshape(10, 3).tolist() == [[2, 0, 1]] * 10
    assert order.take("x", 3, 0, 47).tolist() != order.take("x", 3, 47, 47).tolist()
    assert order.take("x", 3, 0, 47).tolist() != order.take("x", 4, 0, 47).tolist()


def test_the_headers_of_a_shard_are_read_once(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, out = folders
    found: list[str] = []
    monkeypatch.setattr(
        shard_reader, "find_samples", lambda file, path: found.append(path.name) or find_samples(file, path)
    )
    steps(config(shards, out), 40)
    assert len(found) == len(set(found)) == sum(len(subset.shards) for subset in read_index(shards).subsets.values())


def test_a_token_budget_and_sub_batches_follow_it_too(folders: tuple[Path, Path]) -> None:
    shards, out = folders
    plain = [sorted(batch) for batch in keys(steps(config(shards, out), 12))]
    micro_batches = steps(config(shards, out), 40, budget=TokenBudget(200, 1.0))  # each comes in several passes
    dealt: dict[int, set[str]] = {}
    for micro_batch in micro_batches:
        dealt.setdefault(micro_batch.position["step"], set()).update(*keys([micro_batch]))
    whole = range(1, min(max(dealt), 13))  # the last step may lack micro batches
    assert len(whole) > 3 and [dealt[step] for step in whole] == [set(x) for x in plain[: len(whole)]]
    halves = keys(steps(config(shards, out, batch=16, sub_batches=2), 6))
    assert [sorted(x) for step in halves for x in (step[:8], step[8:])] == plain


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_equal_and_another_order_is_refused(
    folders: tuple[Path, Path], world: int, tmp_path: Path
) -> None:
    shards, out = folders
    cfg = config(shards, f"pipe:cat {out}/{{file}}", cache=str(tmp_path / "cache"))  # as from the network
    whole = steps(cfg, 20, world - 1, world)
    position = json.loads(json.dumps(whole[9].position))
    resumed = steps(cfg, 10, world - 1, world, position=position)
    for one, other in zip(resumed, whole[10:], strict=True):
        assert one.position == other.position
        for x, y in zip(one.batches, other.batches, strict=True):
            tensors: list[list[torch.Tensor]] = [[], []]
            for batch, found in zip((x, y), tensors):
                dataclasses.replace(batch, scores=None).map(lambda tensor, found=found: found.append(tensor) or tensor)
            assert len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors)) and x.keys == y.keys
    assert Counter(itertools.chain(*keys(steps(config(shards, None), 20)))) != Counter(
        itertools.chain(*keys(steps(config(shards, out), 20)))
    )
    with pytest.raises(ConfigError, match="data.order: the run to resume had those with identity .* now it has none"):
        build_train_stream(config(shards, None), ENCODER, 0, 1, 4, position)
    other = Path(shutil.copytree(out, tmp_path / "other"))
    edit(other, lambda value: value["subsets"]["birds"]["order"].reverse())
    with pytest.raises(ConfigError, match="data.order: the run to resume had those with identity"):
        build_train_stream(config(shards, other), ENCODER, 0, 1, 4, position)


def edit(out: Path, change: object) -> None:
    value = json.loads((out / "order.json").read_text())
    change(value)
    (out / "order.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out, data: (out / "order.json").unlink(),
            "does not exist; data.order must be a folder that",
        ),
        (
            lambda out, data: (out / "order.json").write_text('{"format": "megatron_llave order"'),
            "order.json is not valid JSON",
        ),
        (
            lambda out, data: edit(out, lambda value: value["subsets"]["birds"].pop("order")),
            "malformed .KeyError: 'order'.; run `llave mine batches` again",
        ),
        (
            lambda out, data: edit(out, lambda value: value["subsets"]["birds"]["order"].__setitem__(3, "x")),
            "malformed .TypeError: order must be a list of whole numbers",
        ),
        (lambda out, data: edit(out, lambda value: value.update(cluster_size=0)), "cluster_size=0 must be a whole"),
        (
            lambda out, data: edit(out, lambda value: value["subsets"]["birds"]["order"].remove(7)),
            "is incomplete: the 42 entries of subset birds lack pair 7; run",
        ),
        (
            lambda out, data: edit(out, lambda value: value["subsets"]["birds"]["order"].remove(42)),
            "is incomplete: it has 42 pairs of subset birds, the data have 43; run",
        ),
        (
            lambda out, data: edit(out, lambda value: value["subsets"].pop("words")),
            "has no order of subset words, but of birds; run",
        ),
        (lambda out, data: rewrite(data, {"birds": 44, "words": 24}), "is of another birds-000004.tar than the data's"),
        (
            lambda out, data: rewrite(data, {"birds": 20, "words": 24}),
            "is of 5 shards of subset birds, the data",
        ),
        (lambda out, data: rewrite(data, {"cats": 20}), "has no order of subset cats, but of birds, words; run"),
    ],
)
def test_what_does_not_belong_to_the_shards_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, change: object, message: str
) -> None:
    data, out = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders)
    change(out, data)
    with pytest.raises(DataError, match=message) as caught:
        build_train_stream(config(data, out), ENCODER, 0, 1, 4)
    assert str(out) in str(caught.value) and "\n" not in str(caught.value)


def rewrite(data: Path, sizes: dict[str, int]) -> None:
    shutil.rmtree(data)
    write(data, sizes)


@pytest.mark.parametrize(("batch", "sub_batches", "size"), [(6, 1, 6), (12, 2, 6)])
def test_batches_are_of_whole_clusters(folders: tuple[Path, Path], batch: int, sub_batches: int, size: int) -> None:
    message = f"clusters of 4 pairs, but train.global_batch_size / data.sub_batches is {size}, not a multiple of it"
    with pytest.raises(ConfigError, match=message):
        build_train_stream(config(*folders, batch=batch, sub_batches=sub_batches), ENCODER, 0, 1, 4)

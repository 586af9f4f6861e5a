"""The training stream: per optimizer step the micro batches of one data-parallel rank.

Stages: draw_subsets (which subset a step takes) -> shuffled_positions (which of its pairs, in which order) ->
PairReader (raw pairs from shards) -> encode_pairs -> deal (micro batches of like length) -> pack_pairs. The first two
are pure functions of (seed, step) and (seed, subset, epoch): every rank walks the same order without talking to the
others and decodes only its own share, and a resumed run goes on where it stopped.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.batch import Pair, PairBatch
from megatron_llave.config import RunConfig, SubsetConfig
from megatron_llave.data.balance import deal
from megatron_llave.data.index import Index, Subset, read_index
from megatron_llave.data.packing import Encoder, encode_pairs, pack_pairs, stable_hash
from megatron_llave.data.shards import read_samples, unpack_pair
from megatron_llave.errors import ConfigError, DataError

KEEP_BYTES = 128 * 2**20
"""A subset whose shards are together at most this large stays in memory; of others, one shard at a time."""

Position = tuple[int, int]
"""(number of the shard in the index, number of the pair in the shard)."""

RawStep = tuple[str, list[list[Pair | DataError]]]
"""(subset, this rank's pairs per micro batch as they come)."""


def build_train_stream(
    cfg: RunConfig, encoder: Encoder, rank: int, world: int, pad_to_multiple: int, start_step: int = 0
) -> Iterator[list[PairBatch]]:
    """Endless stream of steps: the micro batches of data-parallel rank `rank` of `world`, from step `start_step` on.

    A step's pairs and their order depend on seed and step alone; over ranks and micro batches they are
    `train.global_batch_size` pairs of one subset. A batch may run from the end of one epoch into the next. With
    `loss.negatives: global_batch`, whose loss is the same however they are dealt, a rank deals its own pairs to its
    micro batches by their tokens.

    Raises:
        ConfigError: a subset that the index lacks, or that has fewer pairs than a global batch.
        DataError: index or shards are missing or damaged.
    """
    directory, batch_size, seed = Path(cfg.data.path), cfg.train.global_batch_size, cfg.train.seed
    index = read_index(directory)
    mixture = build_mixture(cfg.data.subsets, index, batch_size)
    steps_before = Counter(itertools.islice(draw_subsets(mixture, seed, 0), start_step))
    orders = {
        name: shuffled_positions(index.subsets[name], name, seed, steps_before[name] * batch_size) for name in mixture
    }
    readers = {name: PairReader(directory, index.subsets[name]) for name in mixture}
    shares = rank_shares(batch_size, cfg.train.micro_batch_size or batch_size // world, rank, world)
    steps = _read_steps(draw_subsets(mixture, seed, start_step), orders, readers, shares, batch_size)
    balance = cfg.loss.negatives == "global_batch"
    return (_pack_step(step, encoder, cfg.data.hard_negatives, balance, pad_to_multiple) for step in steps)


def _read_steps(
    subsets: Iterator[str],
    orders: dict[str, Iterator[Position]],
    readers: dict[str, "PairReader"],
    shares: list[slice],
    batch_size: int,
) -> Iterator[RawStep]:
    for name in subsets:
        positions = list(itertools.islice(orders[name], batch_size))
        yield name, [[readers[name].read(p) for p in positions[share]] for share in shares]


def _pack_step(
    step: RawStep, encoder: Encoder, hard_negatives: int, balance: bool, pad_to_multiple: int
) -> list[PairBatch]:
    subset, raw = step
    encoded = [encode_pairs(pairs, encoder, hard_negatives, subset) for pairs in raw]
    num_skipped = [len(pairs) - len(kept) for pairs, kept in zip(raw, encoded)]
    if balance:
        together = list(itertools.chain(*encoded))
        encoded = [[together[i] for i in part] for part in deal([pair.length for pair in together], len(raw))]
    return [
        pack_pairs(pairs, skipped, subset, pad_to_multiple, encoder.tile_shape)
        for pairs, skipped in zip(encoded, num_skipped)
    ]


def build_mixture(subsets: dict[str, SubsetConfig], index: Index, batch_size: int) -> dict[str, SubsetConfig]:
    """The subsets to draw from; none configured: all of the index, weighted by their number of pairs.

    Raises:
        ConfigError: a subset that the index lacks, or that has fewer pairs than a global batch.
    """
    mixture = subsets or {name: SubsetConfig(weight=float(s.pairs)) for name, s in index.subsets.items() if s.pairs}
    for name in mixture:
        if name not in index.subsets:
            raise ConfigError(f"data.subsets.{name} is not in the index, which has {', '.join(sorted(index.subsets))}")
        pairs = index.subsets[name].pairs
        if pairs < batch_size:
            raise ConfigError(
                f"subset {name} has {pairs} pairs, fewer than train.global_batch_size={batch_size}: "
                "a batch would hold pairs twice; lower it or leave the subset out of data.subsets"
            )
    return dict(sorted(mixture.items()))


def draw_subsets(mixture: dict[str, SubsetConfig], seed: int, start_step: int) -> Iterator[str]:
    """The subset of every step from `start_step` on: drawn by weight among those that have started."""
    for step in itertools.count(start_step):
        active = {name: subset.weight for name, subset in mixture.items() if subset.start_step <= step}
        bounds = np.cumsum(list(active.values()))
        drawn = np.random.default_rng([seed, step]).random() * bounds[-1]
        yield list(active)[int(np.searchsorted(bounds, drawn, side="right"))]


def shuffled_positions(subset: Subset, name: str, seed: int, start: int) -> Iterator[Position]:
    """Positions of the subset's pairs over endless epochs, the first `start` of them skipped without reading.

    Each epoch shuffles the shards, and the pairs within each shard; every pair comes once per epoch.
    """
    subset_seed = stable_hash(name) % 2**63
    first_epoch, skip = divmod(start, subset.pairs)
    for epoch in itertools.count(first_epoch):
        for shard in np.random.default_rng([seed, subset_seed, epoch]).permutation(len(subset.shards)).tolist():
            num_pairs = subset.shards[shard].pairs
            if skip >= num_pairs:
                skip -= num_pairs
                continue
            order = np.random.default_rng([seed, subset_seed, epoch, shard]).permutation(num_pairs).tolist()
            for pair in order[skip:]:
                yield shard, pair
            skip = 0


def rank_shares(batch_size: int, micro_batch_size: int, rank: int, world: int) -> list[slice]:
    """Which pairs of the global batch the rank takes, per micro batch; the caller sees to it that the sizes divide."""
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    return [slice(start, start + micro_batch_size) for start in starts]


class PairReader:
    """Raw pairs of one subset by position; fast when positions come shard by shard, as from shuffled_positions."""

    def __init__(self, directory: Path, subset: Subset) -> None:
        """Nothing is read before the first `read`."""
        self._directory = directory
        self._shards = subset.shards
        self._keep_all = sum(shard.bytes for shard in subset.shards) <= KEEP_BYTES
        self._held: dict[int, list[Pair | DataError]] = {}

    def read(self, position: Position) -> Pair | DataError:
        """The pair at a position, or what is wrong with that one sample.

        Raises:
            DataError: the shard is damaged or holds another number of pairs than its index says.
        """
        shard, pair = position
        if shard not in self._held:
            if not self._keep_all:
                self._held.clear()
            self._held[shard] = self._read_shard(shard)
        return self._held[shard][pair]

    def _read_shard(self, number: int) -> list[Pair | DataError]:
        shard = self._shards[number]
        path = self._directory / shard.file
        pairs = [_unpack(sample, f"{path}: sample {sample['__key__']}") for sample in read_samples(path)]
        if len(pairs) != shard.pairs:
            raise DataError(f"{path} holds {len(pairs)} pairs, index.json says {shard.pairs}; prepare the data again")
        return pairs


def _unpack(sample: dict[str, Any], where: str) -> Pair | DataError:
    """One damaged sample must not cost the shard: it is left out later, where it can be counted."""
    try:
        return unpack_pair(sample, where)
    except DataError as error:
        return error

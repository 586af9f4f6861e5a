"""The training stream: per optimizer step the micro batches of one data-parallel rank.

The stages are draw_subsets (which subset each batch is from), plan_steps (which of its pairs), StepReader in worker
processes ahead of training (raw pairs from shards, encode_pairs, micro batches of similar lengths, pack_pairs, one
buffer) and within_budget (the limit on bad pairs). What a step holds is a pure function of (seed, step) and (seed,
subset, epoch). So all ranks follow the same order without communication, each rank decodes only its own share, and a
resumed run continues at the pair where it stopped.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_llave.batch import Pair, StepBatches
from megatron_llave.config.loss import WHOLE_STEP, LossConfig
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.data.balance import balance_micro_batches
from megatron_llave.data.index import Index, Subset
from megatron_llave.data.mixture import Mixture, build_mixture, draw_subsets
from megatron_llave.data.packing import Processor, encode_pairs, pack_pairs, stable_hash
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.step_buffer import StepBuffer, pack_step
from megatron_llave.data.storage import Storage, open_storage
from megatron_llave.data.stored_vectors import StoredVectors, names_in_row, open_vectors, with_stored
from megatron_llave.data.worker_signals import ignore_torchrun_signals, start_workers
from megatron_llave.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Number of steps that each worker keeps ready."""
SHARDS_PER_SUBSET = 2
"""Number of shards of each subset that a worker keeps open, since the batches of a subset run through one shard and
into the next."""
PAIRS_FOR_A_FRACTION = 1000
"""The smallest number of pairs of which a fraction of bad pairs is taken."""

PAIRS_LOOKED_UP = 20
"""Pairs of each subset whose stored embeddings are looked up before the first step."""
STORED = "stored_embeddings"
"""Key of the identity of the stored embeddings in the position in the data."""

PairLocation = tuple[int, int]
"""The number of a shard in its subset, and the number of the pair in that shard."""


@dataclass(frozen=True)
class StepPlan:
    """Which pairs an optimizer step takes."""

    step: int
    parts: tuple[tuple[str, int], ...]
    """For each batch of the step, its subset and the number of pairs of that subset in all earlier batches."""
    position: dict
    """The position in the data after the step, as `data_position` returns it."""


@dataclass(frozen=True)
class TrainStep:
    """The data of one step on one data-parallel rank, and what went wrong while it was read."""

    data: StepBuffer
    num_pairs: int
    """Number of pairs that this rank was to read."""
    problems: list[str]
    """One line for each of these pairs that was dropped: which pair it is, and why."""

    def pin_memory(self) -> "TrainStep":
        """Return the same step with its data in page-locked memory; see StepBuffer.pin_memory."""
        return TrainStep(self.data.pin_memory(), self.num_pairs, self.problems)


def build_train_stream(
    cfg: RunConfig, processor: Processor, rank: int, world: int, pad_to_multiple: int, position: dict | None = None
) -> Iterator[StepBuffer]:
    """Return an endless stream of packed steps: the micro batches of data-parallel rank `rank` out of `world`.

    The pairs of a step and their order depend on seed and step alone. Over all ranks and micro batches a step has
    `train.global_batch_size` pairs, from one subset or from `data.sub_batches` subsets. A batch may run from the end of
    one epoch of its subset into the next. With `loss.negatives: global_batch` the loss does not depend on the micro
    batch that a pair is in, so each rank distributes its pairs over its micro batches by their lengths.

    Args:
        cfg: the configuration of the run.
        processor: turns queries and targets into tokens and tiles.
        rank: number of this data-parallel rank.
        world: number of data-parallel ranks; it may differ from the one that `position` was saved with.
        pad_to_multiple: the length of a packed row is a multiple of this many tokens.
        position: where to continue, as `data_position` returned it; None: start at the first pair.

    Raises:
        ConfigError: a subset is not in the index or has fewer pairs than a batch; or data, mixture or batch size differ
            from those of `position`, or loss.stored_embeddings.
        DataError: the index is missing or damaged, or the missing shards hold more pairs than data.max_bad_fraction
            allows; later also when more pairs than that are bad. Or loss.stored_embeddings lacks an input.
    """
    storage = open_storage(cfg.data)
    index = storage.read_index()
    mixture = build_mixture(cfg, index)
    check_shards(storage, index, mixture, cfg.data.max_bad_fraction)
    start_step = 0
    if position is not None:
        start_step = position["step"]
        taken = Counter(itertools.islice(draw_subsets(mixture), start_step * mixture.batches_per_step))
        require_same_data(position, data_position(mixture, start_step, taken))
    micro_batch_size = cfg.train.micro_batch_size or cfg.train.global_batch_size // world
    reader = StepReader(
        mixture,
        {name: index.subsets[name] for name in mixture.sources},
        ShardReader(storage, SHARDS_PER_SUBSET * len(mixture.sources)),
        processor,
        shares=rank_shares(cfg.train.global_batch_size, micro_batch_size, rank, world),
        hard_negatives=cfg.data.hard_negatives,
        positives=cfg.data.positives,
        needs_scores=frozenset(name for name in mixture.sources if loss_of_subset(cfg, name).objective == "cosent"),
        balance=cfg.loss.negatives in WHOLE_STEP,
        pad_to_multiple=pad_to_multiple,
        context=cfg.parallel.context,
        stored=open_vectors(cfg.loss.stored_embeddings) if cfg.loss.stored_embeddings else None,
        loss_of=partial(loss_of_subset, cfg),
    )
    require_same_vectors(reader, position)
    reader.require_vectors()
    steps = read_ahead(reader, plan_steps(mixture, start_step), cfg.data.workers)
    return (step.data for step in within_budget(steps, cfg.data.max_bad_fraction))


def steps_of_epochs(cfg: RunConfig) -> int:
    """Return the number of complete optimizer steps in `train.epochs`, counting every subset as started.

    Raises:
        ConfigError: a subset cannot be drawn from.
        DataError: the index is missing or damaged.
    """
    mixture = build_mixture(cfg, open_storage(cfg.data).read_index())
    num_pairs = sum(source.pairs for source in mixture.sources.values())
    return int(cfg.train.epochs * num_pairs / cfg.train.global_batch_size)


def check_shards(storage: Storage, index: Index, mixture: Mixture, max_bad_fraction: float) -> None:
    """Log the shards that are missing or have the wrong size; their pairs will be dropped.

    Raises:
        DataError: they hold a larger fraction of the mixture's pairs than `max_bad_fraction`.
    """
    lost, total, problem = 0, 0, ""
    for name in mixture.sources:
        for shard in index.subsets[name].shards:
            total += shard.pairs
            try:
                storage.check(shard)
            except DataError as error:
                lost, problem = lost + shard.pairs, str(error)
                logger.warning("%d pairs of subset %s are lost: %s", shard.pairs, name, error)
    if lost > max_bad_fraction * total:
        share = f"with it {lost} of {total} pairs are lost, more than data.max_bad_fraction={max_bad_fraction:g}"
        raise DataError(f"{problem}; {share}")


def plan_steps(mixture: Mixture, start_step: int) -> Iterator[StepPlan]:
    """Yield the plan of each step from `start_step` on, without reading any data."""
    drawn = draw_subsets(mixture)
    taken = Counter(itertools.islice(drawn, start_step * mixture.batches_per_step))
    for step in itertools.count(start_step):
        parts = []
        for name in itertools.islice(drawn, mixture.batches_per_step):
            parts.append((name, taken[name] * mixture.batch_size))
            taken[name] += 1
        yield StepPlan(step, tuple(parts), data_position(mixture, step + 1, taken))


def data_position(mixture: Mixture, step: int, taken: Counter[str]) -> dict:
    """Return the position in the data after `step` steps, with everything that the order of the pairs depends on.

    All values can be written as JSON. `taken` is the number of batches that were drawn from each subset so far.
    """
    subsets = {name: {**asdict(s), "taken": taken[name] * mixture.batch_size} for name, s in mixture.sources.items()}
    described = {name: value for name, value in asdict(mixture).items() if name != "sources"}
    return {"step": step, **described, "subsets": subsets}


def require_same_data(saved: dict, current: dict) -> None:
    """Refuse to resume with another order of the pairs than the stopped run had; both are from `data_position`.

    Raises:
        ConfigError: names the first value that differs.
    """
    _require_equal({**saved, "subsets": None, STORED: None}, {**current, "subsets": None, STORED: None}, "")
    for name in sorted(saved["subsets"].keys() | current["subsets"].keys()):
        before, now = (position["subsets"].get(name, {}) for position in (saved, current))
        _require_equal(before, now, f"subset {name}: ")


def require_same_vectors(reader: "StepReader", saved: dict | None) -> None:
    """Refuse to resume with other stored embeddings than the stopped run had at the saved position.

    Raises:
        ConfigError: they differ.
    """
    before, now = (saved or {}).get(STORED), reader.stored and reader.stored.identity
    if saved is not None and before != now:
        hint = "give those of before, or start a new run from its weights with checkpoint.init"
        names = [f"those with identity {identity}" if identity else "none" for identity in (before, now)]
        raise ConfigError(f"loss.stored_embeddings: the run to resume had {names[0]}, now it has {names[1]}; {hint}")


def _require_equal(before: dict, now: dict, where: str) -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"the run to resume had {where}{key}={before.get(key)}, now it is {now.get(key)}: its pairs would "
                "come in another order; change it back, or start a new run from its weights with checkpoint.init"
            )


def shuffled_locations(subset: Subset, name: str, seed: int, start: int) -> Iterator[PairLocation]:
    """Yield the locations of the subset's pairs over endless epochs, after skipping the first `start` of them.

    Each epoch shuffles the shards, and the pairs within each shard, and has every pair once. Nothing is read.
    """
    subset_seed = stable_hash(name) % 2**63
    first_epoch, skip = divmod(start, subset.pairs)
    for epoch in itertools.count(first_epoch):
        for shard in _permutation((seed, subset_seed, epoch), len(subset.shards)):
            num_pairs = subset.shards[shard].pairs
            if skip >= num_pairs:
                skip -= num_pairs
                continue
            yield from ((shard, pair) for pair in _permutation((seed, subset_seed, epoch, shard), num_pairs)[skip:])
            skip = 0


@lru_cache(maxsize=256)
def _permutation(seed: tuple[int, ...], length: int) -> list[int]:
    """Cached, because all steps that take pairs from one shard ask for the same permutation."""
    return np.random.default_rng(seed).permutation(length).tolist()


def rank_shares(batch_size: int, micro_batch_size: int, rank: int, world: int) -> list[slice]:
    """Return which pairs of the global batch the rank takes, per micro batch; the caller checks that sizes divide."""
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    return [slice(start, start + micro_batch_size) for start in starts]


@dataclass(frozen=True)
class StepReader(Dataset):
    """Makes the micro batches of a step from its plan. Any process can make any step."""

    mixture: Mixture
    subsets: dict[str, Subset]
    shards: ShardReader
    processor: Processor
    shares: list[slice]
    """Pairs of the global batch that this rank takes, per micro batch."""
    hard_negatives: int
    positives: int | None
    needs_scores: frozenset[str]
    """The subsets whose pairs are bad without scores."""
    balance: bool
    pad_to_multiple: int
    context: int = 1
    """Number of context ranks that share a packed row."""
    stored: StoredVectors | None = None
    """Embeddings of the inputs by another model, which come with the micro batches; None: there are none."""
    loss_of: Callable[[str], LossConfig] | None = None
    """The loss of a subset, which says what it takes from the stored embeddings; None: there are none."""

    def require_vectors(self) -> None:
        """Look up the inputs of the first pairs of each subset, before anything else is done; the others when read.

        Raises:
            DataError: loss.stored_embeddings has no embedding of one of them.
        """
        for name, subset in self.subsets.items() if self.stored else ():
            first = [self._pair(name, 0, number) for number in range(min(subset.shards[0].pairs, PAIRS_LOOKED_UP))]
            usable = encode_pairs(first, self.processor, self.hard_negatives, lambda problem: None, self.positives)
            self.stored.rows(names_in_row(usable))

    def __getitem__(self, plan: StepPlan) -> "TrainStep | UserError":
        """Return the step, or the error that it ran into; a raised error would arrive with the worker's traceback."""
        try:
            return self.read(plan)
        except UserError as error:
            return error

    def read(self, plan: StepPlan) -> TrainStep:
        """Read, encode and pack this rank's share of the step."""
        locations = []
        for name, start in plan.parts:
            order = shuffled_locations(self.subsets[name], name, self.mixture.seed, start)
            locations += [(name, *location) for location in itertools.islice(order, self.mixture.batch_size)]
        problems: list[str] = []
        encoded, num_skipped = [], []
        for share in self.shares:
            pairs = [self._pair(*location) for location in locations[share]]
            encoded.append(encode_pairs(pairs, self.processor, self.hard_negatives, problems.append, self.positives))
            num_skipped.append(len(pairs) - len(encoded[-1]))
        if self.balance:
            all_pairs = list(itertools.chain(*encoded))
            positions = balance_micro_batches([pair.length for pair in all_pairs], len(encoded))
            encoded = [[all_pairs[i] for i in chosen] for chosen in positions]
        subset = "+".join(sorted({name for name, _ in plan.parts}))
        shape = self.processor.tile_shape
        batches = [
            pack_pairs(pairs, skipped, subset, self.pad_to_multiple, shape, self.context)
            for pairs, skipped in zip(encoded, num_skipped)
        ]
        position = plan.position
        if self.stored is not None:
            rows, loss = [self.stored.rows(names_in_row(pairs)) for pairs in encoded], self.loss_of(subset)
            batches = [with_stored(batch, own, loss) for batch, own in zip(batches, rows)]
            position = position | {STORED: self.stored.identity}
        data = pack_step(StepBatches(batches, position))
        return TrainStep(data, sum(share.stop - share.start for share in self.shares), problems)

    def _pair(self, name: str, shard: int, number: int) -> Pair | DataError:
        file = self.subsets[name].shards[shard]
        try:
            pair = self.shards.read(file, number)
        except DataError as error:
            return DataError(f"a pair of subset {name}: {error}")
        if pair.subset != name:
            return DataError(f"a pair of subset {name}: {file.file} has a pair of subset {pair.subset!r} in its place")
        if name in self.needs_scores and not pair.scores:
            return DataError(f"pair {pair.key} of subset {name}: it has no scores, which objective=cosent needs")
        return pair


def read_ahead(reader: StepReader, plans: Iterable[StepPlan], workers: int) -> Iterator[TrainStep]:
    """Yield steps in the order of their plans, made ahead of time by worker processes.

    Raises:
        DataError: a worker was killed.
        UserError: a step could not be read.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_torchrun_signals,
        generator=torch.Generator(),  # the loader draws a seed, which must not come from the global generator
    )
    try:
        for step in start_workers(loader):
            if isinstance(step, UserError):
                raise step
            yield step
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        hint = "if memory is short, lower data.workers"
        raise DataError(f"a process that reads data was killed ({reason}); {hint}") from error


def within_budget(steps: Iterable[TrainStep], max_bad_fraction: float) -> Iterator[TrainStep]:
    """Yield the same steps and log the pairs that were dropped, until there are too many of them.

    Raises:
        DataError: more pairs were dropped than `max_bad_fraction` of the pairs so far, and of PAIRS_FOR_A_FRACTION.
    """
    num_pairs = num_bad = 0
    for step in steps:
        num_pairs, num_bad = num_pairs + step.num_pairs, num_bad + len(step.problems)
        for problem in step.problems:
            logger.warning("left out %s", problem)
        if num_bad > max_bad_fraction * max(num_pairs, PAIRS_FOR_A_FRACTION):
            raise DataError(
                f"{num_bad} of {num_pairs} pairs were bad, more than data.max_bad_fraction={max_bad_fraction:g}; "
                f"the last one: {step.problems[-1]}"
            )
        yield step

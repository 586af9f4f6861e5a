"""The training stream: per optimizer step the micro batches of one data-parallel rank.

Stages: draw_subsets (which subset a batch is of) -> plan_steps (which pairs of it) -> StepReader, in worker processes
ahead of training (raw pairs from shards -> encode_pairs -> deal, micro batches of like length -> pack_pairs -> one
buffer) -> within_budget (bad pairs). What a step holds is a pure function of (seed, step) and (seed, subset, epoch):
all ranks walk the same order without talking, each decodes its own share, and a resumed run goes on where it stopped.
"""

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_llave.batch import Pair, StepBatches
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.balance import balance_micro_batches
from megatron_llave.data.index import Index, Subset
from megatron_llave.data.mixture import Mixture, build_mixture, draw_subsets
from megatron_llave.data.packing import Processor, encode_pairs, pack_pairs, stable_hash
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.step_buffer import StepBuffer, pack_step
from megatron_llave.data.storage import Storage, open_storage
from megatron_llave.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Steps that each worker keeps ready."""
SHARDS_PER_SUBSET = 2
"""Shards a worker keeps open: batches of a subset follow each other through one shard and into the next."""
PAIRS_FOR_A_FRACTION = 1000
"""Fewer pairs than this are too few to tell a fraction of bad ones by."""

Place = tuple[int, int]
"""(number of the shard in the subset, number of the pair in the shard)."""


@dataclass(frozen=True)
class StepPlan:
    """What a step takes."""

    step: int
    parts: tuple[tuple[str, int], ...]
    """Per batch of the step its subset, and how many pairs of that subset all batches before it have taken."""
    position: dict
    """Where the data stands after the step, see `data_position`."""


@dataclass(frozen=True)
class TrainStep:
    """A step's data, and what the rank knows about it."""

    data: StepBuffer
    num_pairs: int
    """Pairs this rank was to read."""
    problems: list[str]
    """One for each pair of them that was left out: which, and why."""

    def pin_memory(self) -> "TrainStep":
        """See FlatStep.pin_memory."""
        return TrainStep(self.data.pin_memory(), self.num_pairs, self.problems)


def build_train_stream(
    cfg: RunConfig, encoder: Processor, rank: int, world: int, pad_to_multiple: int, position: dict | None = None
) -> Iterator[StepBuffer]:
    """Endless stream of steps: the micro batches of data-parallel rank `rank` of `world`, flattened.

    A step's pairs and their order depend on seed and step alone; over ranks and micro batches they are
    `train.global_batch_size` pairs, of one subset or of `data.sub_batches` of them. A batch may run from the end of one
    of a subset's epochs into the next. With `loss.negatives: global_batch`, whose loss is the same however they are
    dealt, a rank deals its own pairs to its micro batches by their tokens.

    Args:
        cfg: the run.
        encoder: turns sides into tokens and tiles.
        rank: of the data-parallel ranks.
        world: how many there are; may be another number than before `position`.
        pad_to_multiple: length of a packed row, tokens.
        position: where to go on, from `data_position`; None: at the beginning.

    Raises:
        ConfigError: a subset that the index lacks or that has fewer pairs than a batch; or the data, mixture or batch
            are others than those of `position`.
        DataError: the index is missing or damaged; more shards than data.max_bad_fraction allows are missing; later,
            more pairs than that are bad.
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
        encoder,
        shares=rank_shares(cfg.train.global_batch_size, micro_batch_size, rank, world),
        hard_negatives=cfg.data.hard_negatives,
        balance=cfg.loss.negatives == "global_batch",
        pad_to_multiple=pad_to_multiple,
    )
    steps = read_ahead(reader, plan_steps(mixture, start_step), cfg.data.workers)
    return (step.data for step in within_budget(steps, cfg.data.max_bad_fraction))


def steps_of_epochs(cfg: RunConfig) -> int:
    """Optimizer steps of `train.epochs`, whole ones, once all subsets have started.

    Raises:
        ConfigError: a subset that cannot be drawn.
        DataError: the index is missing or damaged.
    """
    mixture = build_mixture(cfg, open_storage(cfg.data).read_index())
    num_pairs = sum(source.pairs for source in mixture.sources.values())
    return int(cfg.train.epochs * num_pairs / cfg.train.global_batch_size)


def check_shards(storage: Storage, index: Index, mixture: Mixture, max_bad_fraction: float) -> None:
    """Log shards that are missing or of a wrong size; their pairs will be left out.

    Raises:
        DataError: they hold more of the mixture's pairs than `max_bad_fraction`.
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
    """What each step takes, from `start_step` on, without reading anything."""
    drawn = draw_subsets(mixture)
    taken = Counter(itertools.islice(drawn, start_step * mixture.batches_per_step))
    for step in itertools.count(start_step):
        parts = []
        for name in itertools.islice(drawn, mixture.batches_per_step):
            parts.append((name, taken[name] * mixture.batch_size))
            taken[name] += 1
        yield StepPlan(step, tuple(parts), data_position(mixture, step + 1, taken))


def data_position(mixture: Mixture, step: int, taken: Counter[str]) -> dict:
    """Where the data of a run stands after `step` steps, and all that the order of its pairs depends on; JSON values.

    `taken` are the batches that each subset has given so far.
    """
    subsets = {name: {**asdict(s), "taken": taken[name] * mixture.batch_size} for name, s in mixture.sources.items()}
    described = {name: value for name, value in asdict(mixture).items() if name != "sources"}
    return {"step": step, **described, "subsets": subsets}


def require_same_data(saved: dict, own: dict) -> None:
    """Refuse to go on in an order of pairs that is not the one the run was stopped in.

    Raises:
        ConfigError: names the first thing that differs.
    """
    _require_equal({**saved, "subsets": None}, {**own, "subsets": None}, "")
    for name in sorted(saved["subsets"].keys() | own["subsets"].keys()):
        before, now = (position["subsets"].get(name, {}) for position in (saved, own))
        _require_equal(before, now, f"subset {name}: ")


def _require_equal(before: dict, now: dict, where: str) -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"the run to go on with had {where}{key}={before.get(key)}, now it is {now.get(key)}: its pairs would "
                "come in another order; change it back, or start a new run from its weights with checkpoint.init"
            )


def shuffled_places(subset: Subset, name: str, seed: int, start: int) -> Iterator[Place]:
    """Places of the subset's pairs over endless epochs, the first `start` of them skipped without reading.

    Each epoch shuffles the shards, and the pairs within each shard; every pair comes once per epoch.
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
    """Kept, because the steps that share a shard ask for it again."""
    return np.random.default_rng(seed).permutation(length).tolist()


def rank_shares(batch_size: int, micro_batch_size: int, rank: int, world: int) -> list[slice]:
    """Which pairs of the global batch the rank takes, per micro batch; the caller sees to it that the sizes divide."""
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    return [slice(start, start + micro_batch_size) for start in starts]


@dataclass(frozen=True)
class StepReader(Dataset):
    """Plan of a step -> its micro batches. Any process can make any step."""

    mixture: Mixture
    subsets: dict[str, Subset]
    shards: ShardReader
    encoder: Processor
    shares: list[slice]
    """Pairs of the global batch that this rank takes, per micro batch."""
    hard_negatives: int
    balance: bool
    pad_to_multiple: int

    def __getitem__(self, plan: StepPlan) -> "TrainStep | UserError":
        """The step, or why it cannot be read: an error of a worker would arrive as many lines of its traceback."""
        try:
            return self.read(plan)
        except UserError as error:
            return error

    def read(self, plan: StepPlan) -> TrainStep:
        """Read, encode and pack this rank's share of the step."""
        places = []
        for name, start in plan.parts:
            order = shuffled_places(self.subsets[name], name, self.mixture.seed, start)
            places += [(name, *place) for place in itertools.islice(order, self.mixture.batch_size)]
        problems: list[str] = []
        encoded, num_skipped = [], []
        for share in self.shares:
            pairs = [self._pair(*place) for place in places[share]]
            encoded.append(encode_pairs(pairs, self.encoder, self.hard_negatives, problems.append))
            num_skipped.append(len(pairs) - len(encoded[-1]))
        if self.balance:
            together = list(itertools.chain(*encoded))
            dealt = balance_micro_batches([pair.length for pair in together], len(encoded))
            encoded = [[together[i] for i in part] for part in dealt]
        subset = "+".join(sorted({name for name, _ in plan.parts}))
        shape = self.encoder.tile_shape
        batches = [
            pack_pairs(pairs, skipped, subset, self.pad_to_multiple, shape)
            for pairs, skipped in zip(encoded, num_skipped)
        ]
        data = pack_step(StepBatches(batches, plan.position))
        return TrainStep(data, sum(share.stop - share.start for share in self.shares), problems)

    def _pair(self, name: str, shard: int, number: int) -> Pair | DataError:
        try:
            return self.shards.read(self.subsets[name].shards[shard], number)
        except DataError as error:
            return DataError(f"a pair of subset {name}: {error}")


def read_ahead(reader: StepReader, plans: Iterable[StepPlan], workers: int) -> Iterator[TrainStep]:
    """Steps in the order of their plans, made by worker processes ahead of time.

    Raises:
        DataError: a worker was killed.
        UserError: what a step ran into.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_torchrun_signals,
        generator=torch.Generator(),  # its own, for the loader draws a seed from it
    )
    try:
        for step in _start(loader):
            if isinstance(step, UserError):
                raise step
            yield step
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        hint = "if memory is short, lower data.workers"
        raise DataError(f"a process that reads data was killed ({reason}); {hint}") from error


def _ignore_torchrun_signals(worker: int) -> None:
    """Ignore SIGTERM and SIGUSR1 of others: torchrun sends them to all processes, but the training wants its step."""
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads that are started from now on inherit it

    def obey() -> None:
        parent = multiprocessing.parent_process().pid
        while signal.sigwaitinfo(signals).si_pid != parent:
            continue
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=obey, daemon=True).start()


def _start(loader: DataLoader) -> Iterator[TrainStep | UserError]:
    """Start the workers, but let nobody interrupt the training: a killed one is to show when its step is asked for.

    torch would raise in the middle of whatever the training is doing, from a handler of SIGCHLD.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    steps = iter(loader)
    if threading.current_thread() is threading.main_thread():  # no other may, nor would torch
        signal.signal(signal.SIGCHLD, handler)
    return steps


def within_budget(steps: Iterable[TrainStep], max_bad_fraction: float) -> Iterator[TrainStep]:
    """The same steps, the pairs they lack logged, as long as these are not too many.

    Raises:
        DataError: more than `max_bad_fraction` of the pairs so far, and of PAIRS_FOR_A_FRACTION, were left out.
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

"""What worker processes make of the plan of a step: all its micro batches at once, or one at a time.

Without a token budget a worker makes a whole step (StepReader). With train.tokens_per_micro_batch a worker first deals
the pairs of a step to micro batches, by lengths that it takes from the headers of their images (StepDealer); then each
micro batch is made by itself, once for each pass that the step makes over it (MicroBatchReader). So memory holds a few
micro batches, however many pairs a step has.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron_llave.batch import Pair, PairBatch, StepBatches, padded_length
from megatron_llave.config.loss import LossConfig
from megatron_llave.data.balance import TokenBudget, balance_micro_batches, fill_micro_batches
from megatron_llave.data.index import Subset
from megatron_llave.data.mined_negatives import MinedNegatives
from megatron_llave.data.mixture import Mixture
from megatron_llave.data.order import BatchOrder
from megatron_llave.data.packing import (
    EncodedPair,
    Processor,
    encode_pairs,
    measure_pair,
    pack_pairs,
    stable_hash,
)
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.step_buffer import StepBuffer, pack_step
from megatron_llave.data.stored_vectors import StoredVectors, names_in_row, with_stored
from megatron_llave.errors import DataError, UserError

PAIRS_LOOKED_UP = 20
"""Pairs of each subset whose stored embeddings are looked up before the first step."""
STORED = "stored_embeddings"
"""Key of the identity of the stored embeddings in the position in the data."""
MINED = "mined_negatives"
"""Key of the identity of the mined negatives in the position in the data."""
ORDER = "order"
"""Key of the identity of the mined order in the position in the data."""
MINING = "mining"
"""Key of the interval and the rules of mining while training in the position in the data."""
LONGER = "it has more tokens than the headers of its images say, as if a rotation were noted after the pixels"
"""Why a pair that was planned by the headers of its images is left out when it is decoded."""

PairLocation = tuple[str, int, int]
"""The name of a subset, the number of a shard in it, and the number of the pair in that shard."""


@dataclass(frozen=True)
class StepPlan:
    """Which pairs an optimizer step takes."""

    step: int
    parts: tuple[tuple[str, int], ...]
    """For each batch of the step, its subset and the number of pairs of that subset in all earlier batches."""
    position: dict
    """The position in the data after the step, as `data_position` returns it."""

    @property
    def subset(self) -> str:
        """Return the names of the subsets of the step."""
        return "+".join(sorted({name for name, _ in self.parts}))


@dataclass(frozen=True)
class MicroBatchPlan:
    """Which pairs of a data-parallel rank's step one micro batch takes."""

    step: StepPlan
    count: int
    """Number of micro batches of the step."""
    longest: int
    """Tokens of the longest packed row of the step."""
    locations: list[PairLocation]
    lengths: list[int]
    """Tokens of each pair, by which it was dealt to this micro batch."""
    problems: list[str] = field(default_factory=list)
    """One line for each pair that was dropped when the step was dealt; the first micro batch of a step has them all."""
    is_repeated: bool = False
    """Whether an earlier pass over the step has reported what is dropped."""


@dataclass(frozen=True)
class TrainStep:
    """The data of one step on one data-parallel rank, or of a micro batch, and what went wrong while it was read."""

    data: StepBuffer
    num_pairs: int
    """Number of pairs that this rank was to read."""
    problems: list[str]
    """One line for each of these pairs that was dropped: which pair it is, and why."""

    def pin_memory(self) -> "TrainStep":
        """Return the same step with its data in page-locked memory; see StepBuffer.pin_memory."""
        return TrainStep(self.data.pin_memory(), self.num_pairs, self.problems)


def shuffled_locations(subset: Subset, name: str, seed: int, start: int) -> Iterator[tuple[int, int]]:
    """Yield shard and number in it of the subset's pairs over endless epochs, after skipping the first `start` of them.

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


@dataclass(frozen=True)
class PairReader(Dataset):
    """Base of the readers: finds, reads, encodes and packs the pairs that a plan names.

    The result depends on the plan alone, so any process can read any plan.
    """

    mixture: Mixture
    subsets: dict[str, Subset]
    shards: ShardReader
    processor: Processor
    shares: list[slice]
    """Pairs of the global batch that this rank takes, per micro batch; with a token budget one slice for all."""
    hard_negatives: int
    positives: int | None
    needs_scores: frozenset[str]
    """The subsets whose pairs are bad without scores."""
    pad_to_multiple: int
    context: int
    """Number of context ranks that share a packed row."""
    stored: StoredVectors | None
    """Embeddings of the inputs by another model, which come with the micro batches; None: there are none."""
    mined: MinedNegatives | None
    """The mined negatives, which pairs get after their own; None: there are none."""
    order: BatchOrder | None
    """The mined order of the pairs; None: they are shuffled."""
    loss_of: Callable[[str], LossConfig]
    """The loss of a subset, which says what it takes from the stored embeddings."""

    def require_vectors(self) -> None:
        """Look up the inputs of the first pairs of each subset, before anything else is done; the others when read.

        Raises:
            DataError: loss.stored_embeddings has no embedding of one of them.
        """
        for name, subset in self.subsets.items() if self.stored else ():
            first = [(name, 0, number) for number in range(min(subset.shards[0].pairs, PAIRS_LOOKED_UP))]
            self.stored.rows(names_in_row(self.encode(first, [])))

    def __getitem__(self, plan: Any) -> Any:
        """Return what `read` does, or the error that it ran into, which would arrive with the worker's traceback."""
        try:
            return self.read(plan)
        except UserError as error:
            return error

    def read(self, plan: Any) -> Any:
        """Return what this reader makes of a plan."""
        raise NotImplementedError

    def locations(self, plan: StepPlan) -> list[list[PairLocation]]:
        """Return where this rank's pairs of a step are, for each of its shares."""
        locations = []
        for name, start in plan.parts:
            seed, size = self.mixture.seed, self.mixture.batch_size
            if self.order is None:
                found = itertools.islice(shuffled_locations(self.subsets[name], name, seed, start), size)
            else:
                found = self.order.locations(self.subsets[name], name, seed, start, size)
            locations += [(name, *location) for location in found]
        return [locations[share] for share in self.shares]

    def pair(self, location: PairLocation) -> Pair | DataError:
        """Return a pair as it is stored, or the reason why it cannot be read."""
        name, shard, number = location
        file = self.subsets[name].shards[shard]
        try:
            pair = self.shards.read(file, number)
            pair = self.mined.join(pair, file) if self.mined and pair.subset == name else pair
        except DataError as error:
            return DataError(f"a pair of subset {name}: {error}")
        if pair.subset != name:
            return DataError(f"a pair of subset {name}: {file.file} has a pair of subset {pair.subset!r} in its place")
        if name in self.needs_scores and not pair.scores:
            return DataError(f"pair {pair.key} of subset {name}: it has no scores, which objective=cosent needs")
        return pair

    def encode(self, locations: list[PairLocation], problems: list[str]) -> list[EncodedPair]:
        """Read and encode pairs; those that cannot be used are left out, and `problems` gets a line for each."""
        pairs = [self.pair(location) for location in locations]
        return encode_pairs(pairs, self.processor, self.hard_negatives, problems.append, self.positives)

    def pack(self, pairs: list[EncodedPair], num_skipped: int, subset: str) -> PairBatch:
        """Pack a micro batch."""
        shape = self.processor.tile_shape
        batch = pack_pairs(pairs, num_skipped, subset, self.pad_to_multiple, shape, self.context)
        if self.stored is None:
            return batch
        return with_stored(batch, self.stored.rows(names_in_row(pairs)), self.loss_of(subset))

    def position(self, plan: StepPlan) -> dict:
        """Return the position in the data after the step."""
        beside = {STORED: self.stored, MINED: self.mined, ORDER: self.order}
        return plan.position | {key: value.identity for key, value in beside.items() if value is not None}


@dataclass(frozen=True)
class StepReader(PairReader):
    """Makes the micro batches of a step, a TrainStep, from its StepPlan."""

    balance: bool
    """Whether pairs are distributed over the micro batches by their lengths."""

    def read(self, plan: StepPlan) -> TrainStep:
        """Read, encode and pack this rank's share of the step."""
        problems: list[str] = []
        encoded, num_skipped = [], []
        for locations in self.locations(plan):
            encoded.append(self.encode(locations, problems))
            num_skipped.append(len(locations) - len(encoded[-1]))
        if self.balance:
            all_pairs = list(itertools.chain(*encoded))
            positions = balance_micro_batches([pair.length for pair in all_pairs], len(encoded))
            encoded = [[all_pairs[i] for i in chosen] for chosen in positions]
        batches = [self.pack(pairs, skipped, plan.subset) for pairs, skipped in zip(encoded, num_skipped)]
        data = pack_step(StepBatches(batches, self.position(plan)))
        return TrainStep(data, sum(share.stop - share.start for share in self.shares), problems)


@dataclass(frozen=True)
class StepDealer(PairReader):
    """Deals the pairs of a step, a StepPlan, to micro batches by a token budget. No image is decoded.

    A pair that is beyond the budget by itself is left out like a bad one.
    """

    budget: TokenBudget
    multiple: int
    """The number of micro batches is a multiple of this; the last ones may be empty."""

    def read(self, plan: StepPlan) -> list[MicroBatchPlan]:
        """Return the plans of the step's micro batches."""
        problems: list[str] = []
        locations, lengths, costs = [], [], []
        for location in itertools.chain(*self.locations(plan)):
            try:
                length, cost = self._measure(self.pair(location))
            except DataError as error:
                problems.append(str(error))
                continue
            locations.append(location)
            lengths.append(length)
            costs.append(cost)
        filled = fill_micro_batches(costs, self.budget.tokens)
        filled += [[]] * (-len(filled) % self.multiple)
        rows = (sum(lengths[i] for i in chosen) for chosen in filled)
        longest = max(-(-max(tokens, 1) // self.pad_to_multiple) * self.pad_to_multiple for tokens in rows)
        plans = [
            MicroBatchPlan(plan, len(filled), longest, [locations[i] for i in chosen], [lengths[i] for i in chosen])
            for chosen in filled
        ]
        return [replace(plans[0], problems=problems), *plans[1:]]

    def _measure(self, pair: Pair | DataError) -> tuple[int, float]:
        """Return the tokens of a pair and what it takes of the budget.

        Raises:
            DataError: the pair cannot be read or used, or takes more than all of it.
        """
        if isinstance(pair, DataError):
            raise pair
        sizes = measure_pair(pair, self.processor, self.hard_negatives, self.positives)
        length, tiles = sum(padded_length(size.tokens, self.context) for size in sizes), sum(x.tiles for x in sizes)
        cost, most = self.budget.cost(length, tiles), self.budget.tokens
        if cost > most:
            counted = f" and {tiles} tiles, which count as {self.budget.tile_tokens:.4g} each," if tiles else ""
            remedy = f"raise train.tokens_per_micro_batch={most} to at least {-int(-cost // 1)} or shorten the pair"
            raise DataError(f"pair {pair.key} of subset {pair.subset}: {length} tokens{counted} are too many; {remedy}")
        return length, cost


@dataclass(frozen=True)
class MicroBatchReader(PairReader):
    """Makes one micro batch, a TrainStep, from its MicroBatchPlan."""

    def read(self, plan: MicroBatchPlan) -> TrainStep:
        """Read, encode and pack the micro batch."""
        problems = list(plan.problems)
        encoded = []
        for location, length in zip(plan.locations, plan.lengths):
            for pair in self.encode([location], problems):
                if sum(padded_length(x.length, self.context) for x in pair.sequences) > length:
                    # The pipeline sends rows of the length that was planned, and the memory is planned for it too.
                    problems.append(f"pair {pair.pair.key} of subset {pair.pair.subset}: {LONGER}")
                else:
                    encoded.append(pair)
        batch = self.pack(encoded, 0 if plan.is_repeated else len(problems), plan.step.subset)
        data = pack_step(StepBatches([batch], self.position(plan.step), plan.count, plan.longest))
        if plan.is_repeated:
            return TrainStep(data, 0, [])
        return TrainStep(data, len(plan.locations) + len(plan.problems), problems)


def in_passes(steps: Iterable[list[MicroBatchPlan]], loss_of: Callable[[str], LossConfig]) -> Iterator[MicroBatchPlan]:
    """Yield the micro batches of each step, once for each pass that `gradient_cache.forward_backward` makes over them.

    Args:
        steps: from a StepDealer.
        loss_of: the loss of a step of a subset.
    """
    for plans in steps:
        loss = loss_of(plans[0].step.subset)
        passes = loss.has_reward_pass + (1 if loss.takes_one_pass(len(plans)) else 2)
        for number in range(passes):
            yield from (replace(plan, is_repeated=number > 0) for plan in plans)

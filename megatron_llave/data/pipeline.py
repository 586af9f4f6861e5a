"""The training stream: per optimizer step the micro batches of one data-parallel rank.

The stages are draw_subsets (which subset each batch is from), plan_steps (which of its pairs), StepReader in worker
processes ahead of training (raw pairs from shards, encode_pairs, micro batches of similar lengths, pack_pairs, one
buffer) and within_budget (the limit on bad pairs). With a token budget, StepDealer and MicroBatchReader take the place
of StepReader (readers.py). What a step holds is a pure function of (seed, step) and (seed, subset, epoch). So all ranks
follow the same order without communication, each rank decodes only its own share, and a resumed run continues at the
pair where it stopped.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from megatron_llave.config.loss import WHOLE_STEP
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.data.balance import TokenBudget
from megatron_llave.data.index import Index
from megatron_llave.data.mined_negatives import MinedNegatives
from megatron_llave.data.mixture import Mixture, build_mixture, draw_subsets
from megatron_llave.data.order import BatchOrder, open_order
from megatron_llave.data.packing import Processor
from megatron_llave.data.readers import (
    MINED,
    MINING,
    ORDER,
    STORED,
    MicroBatchReader,
    PairReader,
    StepDealer,
    StepPlan,
    StepReader,
    TrainStep,
    in_passes,
)
from megatron_llave.data.refreshed_negatives import StepNegatives, folder_of, last_step_with, mined_after
from megatron_llave.data.shard_reader import ShardReader
from megatron_llave.data.step_buffer import StepBuffer
from megatron_llave.data.storage import Storage, open_storage
from megatron_llave.data.stored_vectors import StoredVectors, open_vectors
from megatron_llave.data.worker_signals import ignore_torchrun_signals, start_workers
from megatron_llave.errors import ConfigError, DataError, UserError

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Number of steps, or with a token budget of micro batches, that each worker keeps ready."""
SHARDS_PER_SUBSET = 2
"""Number of shards of each subset that a worker keeps open, since the batches of a subset run through one shard and
into the next."""
MOST_IN_ORDER = 256
"""The most shards, and files of negatives, that a worker keeps open where data.order takes pairs from all; their
tables of samples take 0.8 kB per pair."""
PAIRS_FOR_A_FRACTION = 1000
"""The smallest number of pairs of which a fraction of bad pairs is taken."""


def build_train_stream(
    cfg: RunConfig,
    processor: Processor,
    rank: int,
    world: int,
    pad_to_multiple: int,
    position: dict | None = None,
    budget: TokenBudget | None = None,
) -> Iterator[StepBuffer]:
    """Return an endless stream of packed steps: the micro batches of data-parallel rank `rank` out of `world`.

    With a token budget it is a stream of single micro batches, as `in_passes` orders them. The pairs of a step and
    their order depend on seed and step alone. Over all ranks and micro batches a step has `train.global_batch_size`
    pairs, from one subset or from `data.sub_batches` subsets. A batch may run from the end of one epoch of its subset
    into the next. With `loss.negatives: global_batch` or `own` the loss does not depend on the micro batch that a pair
    is in, so each rank distributes its pairs over its micro batches by their lengths.

    Args:
        cfg: the configuration of the run.
        processor: turns queries and targets into tokens and tiles.
        rank: number of this data-parallel rank.
        world: number of data-parallel ranks; it may differ from the one that `position` was saved with.
        pad_to_multiple: the length of a packed row is a multiple of this many tokens.
        position: where to continue, as `data_position` returned it; None: start at the first pair.
        budget: that of train.tokens_per_micro_batch (planning.token_budget); None: micro batches are counted.

    Raises:
        ConfigError: a subset is not in the index or has fewer pairs than a batch; or data, mixture, batch size or
            mining differ from those of `position`, or what lies beside the data, or batches do not fit the order.
        DataError: the index is missing or damaged, or shards with too many pairs are missing; later also when too many
            pairs are bad. Or what lies beside the data lacks an input, is incomplete or of other shards.
    """
    storage = open_storage(cfg.data)
    index = storage.read_index()
    mixture = build_mixture(cfg, index)
    check_shards(storage, index, mixture, cfg.data.max_bad_fraction)
    start_step = 0 if position is None else position["step"]
    if position is not None:
        taken = Counter(itertools.islice(draw_subsets(mixture), start_step * mixture.batches_per_step))
        require_same_data(position, data_position(mixture, start_step, taken))
    micro_batch_size = cfg.train.micro_batch_size or cfg.train.global_batch_size // world
    most_open = most_open_shards(cfg, index, mixture)
    negatives = StepNegatives(cfg, index, list(mixture.sources), most_open)
    common = {
        "mixture": mixture,
        "subsets": {name: index.subsets[name] for name in mixture.sources},
        "shards": ShardReader(storage, most_open),
        "processor": processor,
        "shares": rank_shares(cfg.train.global_batch_size, micro_batch_size, rank, world),
        "hard_negatives": cfg.data.hard_negatives,
        "positives": cfg.data.positives,
        "needs_scores": frozenset(n for n in mixture.sources if loss_of_subset(cfg, n).objective == "cosent"),
        "pad_to_multiple": pad_to_multiple,
        "context": cfg.parallel.context,
        **_open_beside(cfg, index, mixture, negatives, position),
        "loss_of": partial(loss_of_subset, cfg),
    }
    PairReader(**common).require_vectors()
    steps = _with_mined(cfg, common, plan_steps(mixture, start_step), negatives, start_step + 1, budget)
    return (step.data for step in within_budget(steps, cfg.data.max_bad_fraction))


def _open_beside(
    cfg: RunConfig, index: Index, mixture: Mixture, negatives: StepNegatives, position: dict | None
) -> dict[str, StoredVectors | MinedNegatives | BatchOrder | None]:
    """Open what lies beside the shards, as fields of a PairReader; it must be what it was at `position`."""
    stored = open_vectors(cfg.loss.stored_embeddings) if cfg.loss.stored_embeddings else None
    require_same_beside("loss.stored_embeddings", STORED, stored, position)
    done, interval = 0 if position is None else position["step"], cfg.mining.interval
    if position is not None:
        require_same_mining(position, mining_of(cfg))
    source, mined = mined_after(done + 1, interval), None
    if source == mined_after(done, interval):  # else the next step has others, which may be being mined
        mined = negatives.of_step(done + 1)
        key = f"negatives in {folder_of(cfg.train.output, source)}" if source else "data.negatives"
        require_same_beside(key, MINED, mined, position)
    order = open_order(cfg.data, index, list(mixture.sources), mixture.batch_size)
    require_same_beside("data.order", ORDER, order, position)
    return {"stored": stored, "mined": mined, "order": order}


def _with_mined(
    cfg: RunConfig,
    common: dict[str, Any],
    plans: Iterator[StepPlan],
    negatives: StepNegatives,
    step: int,
    budget: TokenBudget | None,
) -> Iterator[TrainStep]:
    """Return the stream from a step, counted from 1, on, whose pairs have the negatives of their step.

    Nothing is read ahead beyond the last step with the same negatives, since those of the next one may still be mined.
    Whoever asks for that one has waited for them (mining/refresh.py).
    """
    interval, described = cfg.mining.interval, mining_of(cfg)
    if not interval:
        yield from _made_ahead(cfg, common, plans, budget)
    plans = (replace(plan, position=plan.position | {MINING: described}) for plan in plans)
    while interval:
        after = last_step_with(mined_after(step, interval), interval) + 1
        common["mined"] = common["mined"] or negatives.of_step(step)
        yield from _made_ahead(cfg, common, itertools.islice(plans, after - step), budget)
        step, common = after, {**common, "mined": None}


def mining_of(cfg: RunConfig) -> dict[str, Any]:
    """What decides which negatives the run mines for its steps, as the position in the data has it."""
    return {"interval": cfg.mining.interval, **(cfg.mining.options if cfg.mining.interval else {})}


def _made_ahead(
    cfg: RunConfig, common: dict[str, Any], plans: Iterator[StepPlan], budget: TokenBudget | None
) -> Iterator[TrainStep]:
    """Return the stream with what went wrong; `common` are the fields of a PairReader."""
    if budget is None:
        return read_ahead(StepReader(**common, balance=cfg.loss.negatives in WHOLE_STEP), plans, cfg.data.workers)
    multiple = cfg.parallel.pipeline if cfg.parallel.virtual_pipeline > 1 else 1  # for the interleaved schedule
    dealt = read_ahead(StepDealer(**common, budget=budget, multiple=multiple), plans, min(1, cfg.data.workers))
    return read_ahead(MicroBatchReader(**common), in_passes(dealt, partial(loss_of_subset, cfg)), cfg.data.workers)


def steps_of_epochs(cfg: RunConfig) -> int:
    """Return the number of complete optimizer steps in `train.epochs`, counting every subset as started.

    Raises:
        ConfigError: a subset cannot be drawn from.
        DataError: the index is missing or damaged.
    """
    mixture = build_mixture(cfg, open_storage(cfg.data).read_index())
    num_pairs = sum(source.pairs for source in mixture.sources.values())
    return int(cfg.train.epochs * num_pairs / cfg.train.global_batch_size)


def most_open_shards(cfg: RunConfig, index: Index, mixture: Mixture) -> int:
    """Return the number of shards that a worker keeps open, since finding the samples of a shard reads all its headers.

    Shuffled pairs come from one shard after the other (readers.shuffled_locations), those of a mined order from all.
    """
    if cfg.data.order is None:
        return SHARDS_PER_SUBSET * len(mixture.sources)
    return min(MOST_IN_ORDER, sum(len(index.subsets[name].shards) for name in mixture.sources))


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
    apart = dict.fromkeys(("subsets", STORED, MINED, ORDER, MINING))  # compared by themselves
    _require_equal({**saved, **apart}, {**current, **apart}, "")
    for name in sorted(saved["subsets"].keys() | current["subsets"].keys()):
        before, now = (position["subsets"].get(name, {}) for position in (saved, current))
        _require_equal(before, now, f"subset {name}: ")


def require_same_mining(saved: dict, now: dict[str, Any]) -> None:
    """Refuse to resume with other negatives than the stopped run would have mined; `now` is of `mining_of`.

    Raises:
        ConfigError: names the first key that differs.
    """
    before, change = saved.get(MINING, {"interval": 0}), "its steps would have other negatives"
    _require_equal(*({"interval": one["interval"]} for one in (before, now)), "mining.", change)
    _require_equal(before, now, "mining.", change)


def require_same_beside(
    key: str, name: str, now: StoredVectors | MinedNegatives | BatchOrder | None, saved: dict | None
) -> None:
    """Refuse to resume with other data beside the shards than the stopped run had at the saved position.

    Args:
        key: the key of the configuration that they come from.
        name: under which the position has their identity.
        now: those of this run.
        saved: the position; None: the run is new.

    Raises:
        ConfigError: they differ.
    """
    before, identity = (saved or {}).get(name), now and now.identity
    if saved is not None and before != identity:
        hint = "give those of before, or start a new run from its weights with checkpoint.init"
        names = [f"those with identity {one}" if one else "none" for one in (before, identity)]
        raise ConfigError(f"{key}: the run to resume had {names[0]}, now it has {names[1]}; {hint}")


def _require_equal(before: dict, now: dict, where: str, change: str = "its pairs would come in another order") -> None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"the run to resume had {where}{key}={before.get(key)}, now it is {now.get(key)}: {change}; change it "
                "back, or start a new run from its weights with checkpoint.init"
            )


def rank_shares(batch_size: int, micro_batch_size: int, rank: int, world: int) -> list[slice]:
    """Return which pairs of the global batch the rank takes, per micro batch; the caller checks that sizes divide."""
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    return [slice(start, start + micro_batch_size) for start in starts]


def read_ahead(reader: PairReader, plans: Iterable, workers: int) -> Iterator[Any]:
    """Yield what the reader makes of the plans, in their order, made ahead of time by worker processes.

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

"""Plan of a run before it starts: memory, FLOPs, communicated bytes, pipeline bubble, and a parallel layout that fits.

Everything is computed by the formulas of flops.py and memory.py; llave plan prints it.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from megatron_llave.config.checks import require_sizes
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.loss import WHOLE_STEP
from megatron_llave.config.model import RECOMPUTE, ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import ConfigError
from megatron_llave.models import family_of
from megatron_llave.models.vision_cost import FLOAT, element
from megatron_llave.planning.adapters import NONE, as_frozen, require_plannable
from megatron_llave.planning.flops import Work, extra_flops, loss_flops, step_flops
from megatron_llave.planning.host_memory import offloaded_bytes, save_bytes
from megatron_llave.planning.memory import (
    Chunk,
    MicroBatch,
    StepShape,
    stage_chunks,
    stage_memory,
)
from megatron_llave.planning.pair_lengths import Kind, longest_batch, scaled_longest, targets_per_pair
from megatron_llave.planning.token_budget import full_micro_batches

NODE = 8
"""Devices of a node, which fast links connect; tensor parallelism stays within a node."""
SPLITS = (1, 2, 4, NODE)
"""Numbers of tensor- and context-parallel ranks that the search for a layout tries."""
LONGEST = 2**22
"""Tokens of a pair up to which `longest_pair` looks."""
SMALL_PART = 0.1
"""Share of a device's memory that is kept free for the CUDA context, NCCL buffers and fragmentation."""


@dataclass(frozen=True)
class StagePlan:
    """Plan of a pipeline stage, the same for all of its ranks."""

    layers: int
    """Layers of the decoder."""
    memory: dict[str, int]
    """Bytes by part on each rank."""
    flops: float
    """FLOPs of a step of all ranks of the stage together, extra ones included."""
    save: int
    """Host bytes that a save takes on each rank."""
    offloaded: int
    """Host bytes of what each rank has offloaded of the optimizer."""

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """Plan of a run on a number of ranks."""

    cfg: RunConfig
    step: StepShape
    stages: list[StagePlan]
    model_flops: int
    """FLOPs of a step of all ranks together."""
    extra_flops: int
    """FLOPs that the way of computing adds, those of the loss included."""
    gather_bytes: int
    """Bytes that the loss receives per rank and step."""
    reduction_bytes: int
    """Bytes that a rank of the largest stage receives per step, to reduce gradients and to gather weights."""

    @property
    def worst(self) -> StagePlan:
        """Return the stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def saves(self) -> list[int]:
        """Return the host bytes that a save takes on each rank, in the order of the ranks."""
        layout = self.cfg.parallel
        ranks = self.step.data_parallel * layout.tensor * layout.context
        return [stage.save for stage in self.stages for _ in range(ranks)]

    def save_per_node(self, ranks: int = NODE) -> int:
        """Return the host bytes that a save takes on the node that needs most, with so many ranks on each."""
        return max(sum(self.saves[first : first + ranks]) for first in range(0, len(self.saves), ranks))

    @property
    def bubble(self) -> float:
        """Return the share of a step in which a stage waits for others, if all stages were equally fast."""
        waits, layout = len(self.stages) - 1, self.cfg.parallel
        return waits / (self.step.micro_batches * layout.virtual_pipeline + waits)

    @property
    def balance(self) -> float:
        """Return the mean of the stages' FLOPs over the largest: 1 if no stage waits for a slower one."""
        flops = [stage.flops for stage in self.stages]
        return sum(flops) / len(flops) / max(flops)

    def fits(self, memory: float) -> bool:
        """Whether every rank fits into `memory` bytes, of which SMALL_PART stay free."""
        return self.worst.total <= memory * (1 - SMALL_PART)


def count_parameters(model: ModelConfig, lora: LoraConfig = NONE) -> dict[str, int]:
    """Return the parameters of the complete model by group, the vocabulary padded as on one process."""
    whole = Chunk(model, ParallelConfig(), model.language.num_layers, True, True, lora)
    return {group: sum(sizes) for group, sizes in whole.sizes().items()}


def mean_work(kinds: list[Kind], pairs: int, hard_negatives: int = 0) -> Work:
    """Return the average input of a number of pairs; hard negatives count like the first targets."""
    total = sum(kind.share for kind in kinds)
    tokens = squares = tiles = patch_pairs = 0.0
    for kind in kinds:
        for query, first, *further in kind.pairs:
            for side, times in ((query, 1), (first, 1 + hard_negatives), *((target, 1) for target in further)):
                number = times * pairs * kind.share / total / len(kind.pairs)
                tokens += number * side.tokens
                squares += number * side.tokens**2
                tiles += number * side.tiles
                patch_pairs += number * side.patch_pairs
    return Work(round(tokens), round(squares), round(tiles), round(patch_pairs))


def make_plan(cfg: RunConfig, ranks: int, kinds: list[Kind], on_gpu: bool = True) -> Plan:
    """Plan a run: memory for the longest micro batch, FLOPs for the mean one.

    Args:
        cfg: configuration of the run, with the sizes of its model.
        ranks: number of processes, one per device.
        kinds: the kinds of pairs.
        on_gpu: see memory.stage_memory.

    Raises:
        ConfigError: the model's sizes are not given, its adapters cannot be planned, or parallel layout or batch do not
            fit these ranks.
    """
    require_sizes(cfg)
    require_plannable(cfg)
    step = step_shape(cfg, validate_layout(cfg.model, cfg.parallel, ranks), kinds, on_gpu)
    work = mean_work(kinds, cfg.train.global_batch_size, cfg.data.hard_negatives)
    has_reward = cfg.loss.reward != "self"
    losses = cfg.train.global_batch_size // step.rows  # summed over all ranks
    dims = cfg.loss.matryoshka_dims or [cfg.model.language.hidden_size]
    further = step.columns // step.data_parallel - step.rows
    stages = range(cfg.parallel.pipeline)
    sharing = step.data_parallel * cfg.parallel.context  # ranks that share gradients and optimizer
    inner = as_frozen(cfg)
    trained = [sum(c.buffer(sharing) for c in stage_chunks(inner.model, cfg.parallel, s, cfg.lora)) for s in stages]
    moved = max(trained) * (FLOAT + element(cfg.model))
    return Plan(
        cfg=cfg,
        step=step,
        stages=[_plan_stage(cfg, stage, step, work, on_gpu) for stage in stages],
        model_flops=step_flops(cfg.model, work, cfg.lora.parts),
        extra_flops=_extra_flops(inner, work, step) + losses * loss_flops(step.rows, step.columns, dims, has_reward),
        gather_bytes=losses // step.data_parallel * gather_bytes(cfg, step.rows, step.data_parallel, further),
        reduction_bytes=moved * (sharing - 1) // sharing,
    )


def step_shape(cfg: RunConfig, data_parallel: int, kinds: list[Kind], on_gpu: bool = True) -> StepShape:
    """Return how a step is divided; by a token budget, that of the kind whose steps need most memory.

    Raises:
        ConfigError: the batch cannot be divided.
    """
    validate_batch(cfg, data_parallel)
    share = cfg.train.global_batch_size // data_parallel
    if cfg.train.tokens_per_micro_batch is not None:
        return _budget_shape(cfg, data_parallel, kinds, on_gpu)
    size = cfg.train.micro_batch_size or share
    has_embed_pass = size < share and cfg.loss.negatives in WHOLE_STEP
    rows = share if cfg.loss.negatives in WHOLE_STEP else size
    columns = _columns(cfg, kinds, rows * data_parallel)
    longest = longest_batch(kinds, size, cfg.data.hard_negatives)
    batch = MicroBatch.of(longest, cfg.parallel.context, family_of(cfg.model).cost.splits_tiles)
    return StepShape(data_parallel, share // size, rows, columns, has_embed_pass, batch)


def _columns(cfg: RunConfig, kinds: list[Kind], rows: int) -> int:
    """Targets and hard negatives of `rows` pairs."""
    return ceil(rows * (targets_per_pair(kinds) + cfg.data.hard_negatives))


def _budget_shape(cfg: RunConfig, data_parallel: int, kinds: list[Kind], on_gpu: bool) -> StepShape:
    layout, rows = cfg.parallel, cfg.train.global_batch_size // data_parallel
    columns = _columns(cfg, kinds, cfg.train.global_batch_size)
    full, part = full_micro_batches(cfg, kinds, on_gpu)
    multiple = layout.pipeline if layout.virtual_pipeline > 1 else 1
    number = ceil(rows * part / multiple) * multiple
    held = min(number, layout.pipeline * layout.virtual_pipeline + 1)  # those in flight, and the next one
    batches = [MicroBatch.of(sides, layout.context, family_of(cfg.model).cost.splits_tiles) for sides in full]
    shapes = [StepShape(data_parallel, number, rows, columns, number > 1, batch, held) for batch in batches]
    stages = range(layout.pipeline)
    return max(shapes, key=lambda shape: max(sum(stage_memory(cfg, s, shape, on_gpu).values()) for s in stages))


def _plan_stage(cfg: RunConfig, stage: int, step: StepShape, work: Work, on_gpu: bool) -> StagePlan:
    """Plan a stage, given the input of a step. The first stage has vision encoder and projector too."""

    def flops(part: Work) -> int:
        return step_flops(cfg.model, part, cfg.lora.parts) + _extra_flops(as_frozen(cfg), part, step)

    layers = sum(chunk.layers for chunk in stage_chunks(cfg.model, cfg.parallel, stage))
    total = flops(Work(work.tokens, work.squared_lengths, 0)) * layers / cfg.model.language.num_layers
    if stage == 0:
        total += flops(replace(work, tokens=0, squared_lengths=0))
    memory, sharing = stage_memory(cfg, stage, step, on_gpu), step.data_parallel * cfg.parallel.context
    return StagePlan(layers, memory, total, save_bytes(cfg, stage, step), offloaded_bytes(cfg, stage, sharing))


def _extra_flops(cfg: RunConfig, work: Work, step: StepShape) -> int:
    """FLOPs that the way of computing adds, without the loss."""
    copies = 1 if family_of(cfg.model).cost.splits_tiles else cfg.parallel.context
    passes = step.has_embed_pass, cfg.loss.reward == "ema"
    return extra_flops(cfg.model, work, *passes, copies, keeps_features=step.held is None)


def gather_bytes(cfg: RunConfig, rows: int, ranks: int, further: int = 0) -> int:
    """Return the bytes that a rank receives in one loss over `rows` pairs of each of N ranks.

    `further` counts hard negatives, and targets after the first, of the rows of a rank.
    """
    total, width = 0, cfg.model.language.hidden_size
    for dim in cfg.loss.matryoshka_dims or [width]:
        total += 8 * (rows + further) * dim + 20 * rows + 24
        # Stored embeddings are not cut. Their width is that of another model, which is taken to be the model's.
        total += 4 * (rows + further) * {"self": 0, "ema": dim, "stored": width}[cfg.loss.reward]
        total += (16 * rows + 8 * further) * cfg.loss.mask_same_target
    return (ranks - 1) * total


def find_fit(cfg: RunConfig, ranks: int, kinds: list[Kind], memory: float) -> tuple[Plan, list[str]] | None:
    """Return the first other configuration that fits into `memory` bytes per rank, and the overrides that make it.

    Parallel layouts are tried in the order of the number of parts that they split a pair's work into, that of the
    configuration first, and context parallel, which splits no weights, last. Among the plans of a layout the fewest
    FLOPs win, then the largest micro batch. None: nothing fits.
    """
    for plans in _plans(cfg, ranks, kinds):
        fitting = [plan for plan in plans if plan.fits(memory)]
        if fitting:
            best = min(fitting, key=lambda plan: (plan.extra_flops, plan.step.micro_batches))
            return best, changes(cfg, best.cfg)
    return None


def find_smallest(cfg: RunConfig, ranks: int, kinds: list[Kind]) -> tuple[Plan, list[str]] | None:
    """Return that of the plans that `find_fit` tries whose fullest rank needs least memory; None: no layout works."""
    plans = itertools.chain.from_iterable(_plans(cfg, ranks, kinds))
    best = min(plans, key=lambda plan: plan.worst.total, default=None)
    return None if best is None else (best, changes(cfg, best.cfg))


def _plans(cfg: RunConfig, ranks: int, kinds: list[Kind]) -> Iterator[list[Plan]]:
    """Yield the possible plans of each layout."""
    for layout in _layouts(cfg.parallel, ranks):
        plans = []
        for train, recompute in _settings(cfg):
            model = replace(cfg.model, recompute=recompute)
            other = replace(cfg, parallel=layout, model=model, train=train)
            try:
                plans.append(make_plan(other, ranks, kinds))
            except ConfigError:
                continue  # the layout is impossible, or the batch cannot be divided
        yield plans


def _layouts(given: ParallelConfig, ranks: int) -> Iterator[ParallelConfig]:
    """Yield the given layout, then others with as many parts, twice as many, and so on.

    If the ranks cannot be split into that many parts, the others begin with the whole model on each rank.
    """
    yield given
    parts = given.tensor * given.pipeline * given.context
    if ranks % parts:
        parts = 1
    while parts <= ranks:
        for context, tensor in itertools.product(SPLITS, SPLITS[::-1]):
            pipeline, rest = divmod(parts, context * tensor)
            if rest or (tensor, pipeline, context) == (given.tensor, given.pipeline, given.context):
                continue
            yield replace(
                given,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                sequence=tensor > 1,
                virtual_pipeline=1,
                first_stage_layers=None,
            )
        parts *= 2


def _settings(cfg: RunConfig) -> Iterator[tuple[TrainConfig, str]]:
    """Yield micro-batch sizes from the configured one downwards, each with all stronger values of model.recompute."""
    key = "micro_batch_size" if cfg.train.tokens_per_micro_batch is None else "tokens_per_micro_batch"
    size = getattr(cfg.train, key) or cfg.train.global_batch_size
    while size >= 1:
        for recompute in RECOMPUTE[RECOMPUTE.index(cfg.model.recompute) :]:
            yield replace(cfg.train, **{key: size}), recompute
        size //= 2


def longest_pair(cfg: RunConfig, ranks: int, kinds: list[Kind], memory: float) -> int:
    """Return the tokens of the longest pair that fits into `memory` bytes per rank with one pair per micro batch.

    Its query and target are in the same proportion as those of the longest pair of these kinds, and so are their
    visual tokens and tiles. 0: not even a pair of one token fits.

    Raises:
        ConfigError: parallel layout or batch do not fit these ranks.
    """
    single = replace(cfg, train=replace(cfg.train, micro_batch_size=1, tokens_per_micro_batch=None))

    def is_too_long(tokens: int) -> bool:
        return not make_plan(single, ranks, [Kind(1, [scaled_longest(kinds, tokens)])]).fits(memory)

    return bisect_left(range(1, LONGEST), True, key=is_too_long)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Return the overrides `section.key=value` that turn `before` into `after`, for the keys that find_fit changes."""
    overrides = []
    for section in ("parallel", "model", "train"):
        old, new = vars(getattr(before, section)), vars(getattr(after, section))
        overrides += [f"{section}.{key}={_spelled(new[key])}" for key in old if old[key] != new[key]]
    return overrides


def _spelled(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

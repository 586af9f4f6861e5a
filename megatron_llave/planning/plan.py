"""A run planned before it is started: memory, FLOPs, bytes moved, pipeline bubble, and a layout that fits.

Formulas alone (flops.py, memory_plan.py); tools/plan.py shows them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_llave.config.checks import has_sizes
from megatron_llave.config.model import RECOMPUTE, ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import ConfigError, require
from megatron_llave.planning.flops import Work, extra_flops, loss_flops, step_flops
from megatron_llave.planning.memory import FLOAT, Chunk, MicroBatch, StepShape, element, stage_chunks, stage_memory
from megatron_llave.planning.pair_lengths import Kind, longest_batch

NODE = 8
"""Devices with fast links between them: tensor parallel does not go beyond."""
SMALL_PART = 0.1
"""Of the card, kept free for the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True)
class StagePlan:
    """A pipeline stage; its ranks are alike."""

    layers: int
    """Of the decoder."""
    memory: dict[str, int]
    """Bytes by part, on each rank."""
    flops: float
    """Of a step, all ranks of the stage together, extra ones too."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """A run on a number of ranks."""

    cfg: RunConfig
    step: StepShape
    stages: list[StagePlan]
    model_flops: int
    """Of a step, all ranks together."""
    extra_flops: int
    """What the way of computing adds, the loss with it."""
    gather_bytes: int
    """Received per rank and step by the loss."""
    reduction_bytes: int
    """Received per rank and step to sum gradients and to gather weights, where most is."""

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def bubble(self) -> float:
        """Share of a pass over the pipeline in which a stage waits, were all stages equal."""
        waits, layout = len(self.stages) - 1, self.cfg.parallel
        return waits / (self.step.micro_batches * layout.virtual_pipeline + waits)

    @property
    def balance(self) -> float:
        """Mean over largest FLOPs of the stages: 1 where none waits for a slower one."""
        flops = [stage.flops for stage in self.stages]
        return sum(flops) / len(flops) / max(flops)

    def fits(self, memory: float) -> bool:
        """Whether every rank has room in so many bytes, less SMALL_PART."""
        return self.worst.total <= memory * (1 - SMALL_PART)


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Of the whole model, by group; the vocabulary padded as on one process."""
    whole = Chunk(model, ParallelConfig(), model.language.num_layers, True, True)
    return {group: sum(sizes) for group, sizes in whole.sizes().items()}


def mean_work(kinds: list[Kind], pairs: int, hard_negatives: int = 0) -> Work:
    """What a number of pairs takes on average; hard negatives are like targets."""
    total = sum(kind.share for kind in kinds)
    tokens = squares = tiles = 0.0
    for kind in kinds:
        for sides in kind.pairs:
            for side, times in zip(sides, (1, 1 + hard_negatives)):
                number = times * pairs * kind.share / total / len(kind.pairs)
                tokens += number * side.tokens
                squares += number * side.tokens**2
                tiles += number * side.tiles
    return Work(round(tokens), round(squares), round(tiles))


def make_plan(cfg: RunConfig, ranks: int, kinds: list[Kind], on_gpu: bool = True) -> Plan:
    """Plan a run: memory for the longest micro batch, FLOPs for the mean one.

    Args:
        cfg: of the run, with its model's sizes.
        ranks: processes, one per device.
        kinds: the pairs.
        on_gpu: see memory_plan.stage_memory.

    Raises:
        ConfigError: the model's sizes are not given, or layout or batch cannot work on these ranks.
    """
    require(has_sizes(cfg.model), f"checkpoint.init={cfg.checkpoint.init} has the model's sizes: name model.preset too")
    step = step_shape(cfg, validate_layout(cfg.model, cfg.parallel, ranks), kinds)
    work = mean_work(kinds, cfg.train.global_batch_size, cfg.data.hard_negatives)
    has_reward = cfg.loss.reward == "ema"
    losses = cfg.train.global_batch_size // step.rows  # of all ranks
    dims = cfg.loss.matryoshka_dims or [cfg.model.language.hidden_size]
    stages = range(cfg.parallel.pipeline)
    trained = [sum(c.buffer(step.data_parallel) for c in stage_chunks(cfg.model, cfg.parallel, s)) for s in stages]
    moved = max(trained) * (FLOAT + element(cfg.model))
    return Plan(
        cfg=cfg,
        step=step,
        stages=[_plan_stage(cfg, stage, step, work, on_gpu) for stage in stages],
        model_flops=step_flops(cfg.model, work),
        extra_flops=extra_flops(cfg.model, work, step.has_embed_pass, has_reward)
        + losses * loss_flops(step.rows, step.columns, dims, has_reward),
        gather_bytes=losses // step.data_parallel * gather_bytes(cfg, step.rows, step.data_parallel),
        reduction_bytes=moved * (step.data_parallel - 1) // step.data_parallel,
    )


def step_shape(cfg: RunConfig, data_parallel: int, kinds: list[Kind]) -> StepShape:
    """How a step is cut up.

    Raises:
        ConfigError: the batch cannot be split.
    """
    validate_batch(cfg, data_parallel)
    share = cfg.train.global_batch_size // data_parallel
    size = cfg.train.micro_batch_size or share
    has_embed_pass = size < share and cfg.loss.negatives == "global_batch"
    rows = share if cfg.loss.negatives == "global_batch" else size
    columns = rows * data_parallel * (1 + cfg.data.hard_negatives)
    batch = MicroBatch.of(longest_batch(kinds, size, cfg.data.hard_negatives))
    return StepShape(data_parallel, share // size, rows, columns, has_embed_pass, batch)


def _plan_stage(cfg: RunConfig, stage: int, step: StepShape, work: Work, on_gpu: bool) -> StagePlan:
    """`work`: of the step. A stage has its share of the decoder's FLOPs, the first one tower and projector too."""

    def flops(part: Work) -> int:
        return step_flops(cfg.model, part) + extra_flops(cfg.model, part, step.has_embed_pass, cfg.loss.reward == "ema")

    layers = sum(chunk.layers for chunk in stage_chunks(cfg.model, cfg.parallel, stage))
    own = flops(Work(work.tokens, work.squared_lengths, 0)) * layers / cfg.model.language.num_layers
    if stage == 0:
        own += flops(Work(0, 0, work.tiles))
    return StagePlan(layers, stage_memory(cfg, stage, step, on_gpu), own)


def gather_bytes(cfg: RunConfig, rows: int, ranks: int) -> int:
    """Bytes that a rank receives in one loss over b pairs of each of N ranks (study/communication/model.py)."""
    hard, total = rows * cfg.data.hard_negatives, 0
    for dim in cfg.loss.matryoshka_dims or [cfg.model.language.hidden_size]:
        total += 8 * (rows + hard) * dim + 20 * rows + 16
        total += 4 * (rows + hard) * dim * (cfg.loss.reward == "ema")
        total += (16 * rows + 8 * hard) * cfg.loss.mask_same_target
    return (ranks - 1) * total


def find_fit(cfg: RunConfig, ranks: int, kinds: list[Kind], memory: float) -> tuple[Plan, list[str]] | None:
    """The first other configuration that fits into `memory` bytes per rank, and the overrides that make it.

    Layouts are tried in the order of how often they split the model, the configuration's own first; within a layout the
    fewest FLOPs win, then the largest micro batch. None: nothing fits.
    """
    for layout in _layouts(cfg.parallel, ranks):
        plans = []
        for size, recompute in _settings(cfg):
            model = replace(cfg.model, recompute=recompute)
            other = replace(cfg, parallel=layout, model=model, train=replace(cfg.train, micro_batch_size=size))
            try:
                plans.append(make_plan(other, ranks, kinds))
            except ConfigError:
                continue  # the layout cannot be had, or the batch not be split so
        fitting = [plan for plan in plans if plan.fits(memory)]
        if fitting:
            best = min(fitting, key=lambda plan: (plan.extra_flops, -plan.cfg.train.micro_batch_size))
            return best, changes(cfg, best.cfg)
    return None


def _layouts(own: ParallelConfig, ranks: int) -> Iterator[ParallelConfig]:
    """The own one, then those that split the model into more parts, each into as many as its forerunner or twice."""
    yield own
    parts = own.tensor * own.pipeline
    while parts <= ranks:
        for tensor in (1, 2, 4, NODE)[::-1]:
            if parts % tensor == 0 and (tensor, parts // tensor) != (own.tensor, own.pipeline):
                pipeline = parts // tensor
                yield replace(
                    own,
                    tensor=tensor,
                    pipeline=pipeline,
                    sequence=tensor > 1,
                    virtual_pipeline=1,
                    first_stage_layers=None,
                )
        parts *= 2


def _settings(cfg: RunConfig) -> Iterator[tuple[int, str]]:
    """Micro-batch sizes from the configuration's own down, each with every way to recompute from its own up."""
    size = cfg.train.micro_batch_size or cfg.train.global_batch_size
    while size >= 1:
        for recompute in RECOMPUTE[RECOMPUTE.index(cfg.model.recompute) :]:
            yield size, recompute
        size //= 2


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Overrides `section.key=value` that make the one of the other; of the keys that find_fit changes."""
    found = []
    for section in ("parallel", "model", "train"):
        own, other = vars(getattr(before, section)), vars(getattr(after, section))
        found += [f"{section}.{key}={_spelled(other[key])}" for key in own if own[key] != other[key]]
    return found


def _spelled(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""What a run needs on each rank, by formula: bytes by part, FLOPs, bytes moved, pipeline bubble. tools/plan.py shows it.

Parts are counted at their largest: weights and gradients of a step, the activations of as many micro batches as the
pipeline schedule has in flight, and the largest temporary beside them. docs/planner.md says what was checked how.
Shapes: t tokens, h hidden, f inner width of the MLP, n heads, d head dimension; H, F of the tower; p patches, k tiles;
b pairs of a rank, B of all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

from megatron_llave.config import ParallelConfig, RunConfig
from megatron_llave.config_checks import has_sizes
from megatron_llave.config_model import ModelConfig, require
from megatron_llave.data.pair_shapes import SideShape
from megatron_llave.flops import Work, extra_flops, loss_flops, step_flops
from megatron_llave.loss import CHUNK
from megatron_llave.model.language import padded_vocab_size
from megatron_llave.model.transformer_settings import DTYPES
from megatron_llave.parallel import validate_batch, validate_layout

FLOAT = 4
PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128
"""Elements, of megatron-core's gradient buffer (param_and_grad_buffer.py)."""
PART_OF = {"vision": "vision", "projector": "projector", "embedding": "language", "decoder": "language"}
"""model.freeze's name of each group of parameters."""


@dataclass(frozen=True)
class MicroBatch:
    """What one micro batch passes through the model."""

    work: Work
    sequences: int
    visual_tokens: int
    attended: int
    """Rows of the local attention, which pads sequences of similar lengths to the longest of them."""

    @staticmethod
    def of(sides: Sequence[SideShape]) -> "MicroBatch":
        """These sides, packed."""
        lengths = [side.tokens for side in sides]
        buckets: dict[int, list[int]] = {}
        for length in lengths:
            buckets.setdefault((length - 1).bit_length(), []).append(length)  # as layer_specs.packed_layout
        tiles, visual = (sum(getattr(side, name) for side in sides) for name in ("tiles", "visual_tokens"))
        attended = sum(len(bucket) * max(bucket) for bucket in buckets.values())
        return MicroBatch(Work(sum(lengths), sum(x * x for x in lengths), tiles), len(sides), visual, attended)


@dataclass(frozen=True)
class Chunk:
    """A share of the model on one rank: all of it, a pipeline stage, or one of a stage's chunks."""

    model: ModelConfig
    layout: ParallelConfig
    layers: int
    """Of the decoder."""
    is_first: bool
    """Has tower, projector and token embedding."""
    is_last: bool
    """Has the final norm and pools."""

    def sizes(self) -> dict[str, list[int]]:
        """Elements of each parameter on one tensor-parallel rank, by group."""
        language, vision, tp = self.model.language, self.model.vision, self.layout.tensor
        h, f, kv = language.hidden_size, language.ffn_hidden_size, kv_width(self.model)
        layer = [(h + 2 * kv) * h // tp, (h + 2 * kv) // tp, h * h // tp, 2 * f * h // tp, f * h // tp, h, h]
        sizes = {"decoder": layer * self.layers + [h] * self.is_last}
        if not self.is_first:
            return sizes
        H, F = vision.hidden_size, vision.ffn_hidden_size
        block = [3 * H * H // tp, 3 * H // tp, H * H // tp, H, F * H // tp, F // tp, F * H // tp, H, *[H] * 4]
        stem = [3 * vision.patch_size**2 * H, H, vision.patches_per_side**2 * H]  # convolution, its bias, positions
        return sizes | {
            "vision": stem + block * vision.num_layers,
            "projector": [H * h // tp, h // tp, h * h // tp, h, h],  # the last is image_newline
            "embedding": [padded_vocab_size(language, tp) // tp * h],
        }

    def buffer(self, data_parallel: int) -> int:
        """Elements of the gradient buffer: the trained parameters, each one's begin and the end aligned."""
        trained = [s for group, sizes in self.sizes().items() if is_trained(self.model, group) for s in sizes]
        return round_up(sum(round_up(s, PARAMETER_ALIGNMENT) for s in trained), lcm(data_parallel, BUFFER_ALIGNMENT))

    def activations(self, batch: MicroBatch, on_gpu: bool) -> int:
        """Bytes that the backward of one micro batch needs, but for the features of a frozen tower."""
        model, h, e = self.model, self.model.language.hidden_size, element(self.model)
        kept = self.layers * layer_activations(model, self.layout, batch, on_gpu, model.recompute)
        if model.kernels == "local" and model.recompute != "full":
            kept += 8 * (batch.work.tokens + batch.attended)  # where each token lies in the buckets
        if self.is_first and not {"vision", "projector"} <= set(model.freeze):
            patches = batch.work.tiles * model.vision.patches_per_side**2
            kept += 2 * patches * h * e // self.layout.tensor + batch.visual_tokens * h * e
            kept += 0 if "vision" in model.freeze else tower_activations(model, self.layout, batch.work.tiles)
        if self.is_last:
            spread = self.layout.tensor if self.layout.sequence else 1
            kept += (norm_activations(model, on_gpu) - h * e) * batch.work.tokens // spread
            kept += 3 * FLOAT * h * batch.sequences  # pooled, and made of unit length
        return kept


def kv_width(model: ModelConfig) -> int:
    """Width of all key heads, or of all value heads."""
    return model.language.hidden_size // model.language.num_heads * model.language.num_kv_heads


def element(model: ModelConfig) -> int:
    """Bytes of a weight or activation."""
    return DTYPES[model.precision].itemsize


def is_trained(model: ModelConfig, group: str) -> bool:
    """Whether a group of parameters gets gradients."""
    return PART_OF[group] not in model.freeze


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def norm_activations(model: ModelConfig, on_gpu: bool) -> int:
    """Bytes per token of a norm: its input, its output, and what torch keeps between where it is not one kernel."""
    h, e = model.language.hidden_size, element(model)
    between_and_input = h * e if on_gpu or model.kernels == "transformer_engine" else 2 * h * FLOAT
    return between_and_input + h * e + FLOAT


def layer_activations(model: ModelConfig, layout: ParallelConfig, batch: MicroBatch, on_gpu: bool, recompute: str) -> int:
    """Bytes that one decoder layer keeps of one micro batch."""
    language, e, tp = model.language, element(model), layout.tensor
    h, f, kv, t = language.hidden_size, language.ffn_hidden_size, kv_width(model), batch.work.tokens
    spread = tp if layout.sequence else 1
    if recompute == "full":
        return t * h * e // spread
    fused, is_selective = model.kernels == "transformer_engine", recompute == "selective"
    # Queries and keys once turned, the one tensor of all three before (the values are a slice of it), the output.
    attention = t * e * (h + kv + (h + 2 * kv) + h)
    if not is_selective:
        attention += t * FLOAT * language.num_heads
        if not fused:  # sequences are copied into buckets and out again
            attention = t * e * h + batch.attended * (e * (2 * h + 2 * kv) + FLOAT * language.num_heads)
    # Both halves of the gated MLP, the gate's SiLU, the other half plus megatron-core's offset, and the product.
    mlp = 0 if is_selective else 5 * f * t * e
    norms = 2 * norm_activations(model, on_gpu) * t
    if fused and is_selective:
        norms -= h * e * t  # the second norm is part of the recomputed MLP
    turning = 0 if fused else 4 * (h // language.num_heads) * t * e
    dropped = 2 * h * t * e if model.dropout else 0
    return (attention + mlp) // tp + (norms + dropped) // spread + turning


def tower_activations(model: ModelConfig, layout: ParallelConfig, tiles: int) -> int:
    """Bytes that a trained tower keeps of its tiles."""
    vision, e, tp = model.vision, element(model), layout.tensor
    H, F, p = vision.hidden_size, vision.ffn_hidden_size, vision.patches_per_side**2
    split = 4 * H + 2 * F  # queries, keys, values and the attention's output; the MLP before and after its GELU
    layer = p * (e * (4 * H + split // tp) + FLOAT * (vision.num_heads // tp + 4))
    pixels = 3 * (vision.patches_per_side * vision.patch_size) ** 2
    return tiles * (vision.num_layers * layer + p * H * e + pixels * e)


def feature_bytes(model: ModelConfig, tiles: int) -> int:
    """What the tower makes of tiles."""
    return tiles * model.vision.patches_per_side**2 * model.vision.hidden_size * element(model)


def data_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """A micro batch as it comes: ids, where visual tokens go and come from, pixels."""
    tiles = 3 * model.vision.image_size**2 * batch.work.tiles
    return 8 * batch.work.tokens + 16 * batch.visual_tokens + tiles + 12 * batch.sequences


def loss_bytes(rows: int, columns: int, dim: int) -> int:
    """Embeddings of b pairs and their gradients, the gathered targets and theirs, and a chunk of logits, float32."""
    return FLOAT * (6 * rows * dim + 3 * columns * dim + 4 * min(CHUNK, rows) * columns)


def temporary_bytes(chunk: Chunk, batch: MicroBatch, on_gpu: bool) -> int:
    """The largest of what exists for a moment only, beside all the rest."""
    model, e = chunk.model, element(chunk.model)
    language, vision, tp, tokens = model.language, model.vision, chunk.layout.tensor, batch.work.tokens
    # A layer that is computed again, and the gradients in its MLP.
    whole = layer_activations(model, chunk.layout, batch, on_gpu, "none")
    again = whole if model.recompute != "none" else 0
    largest = [again + 3 * language.ffn_hidden_size * tokens * e // tp]
    if chunk.is_first:
        if is_trained(model, "embedding"):
            largest.append(chunk.sizes()["embedding"][0] * e)  # its gradient, dense
        patches = batch.work.tiles * vision.patches_per_side**2
        inner = max(5 * vision.hidden_size, 3 * vision.ffn_hidden_size) // tp
        largest.append(patches * (2 * vision.hidden_size + inner) * e)
        largest.append(batch.work.tiles * 3 * vision.image_size**2 * 20)  # pixels in float64, twice, and in float32
    return max(largest)


def chunk_order(chunks: int, stages: int, micro_batches: int) -> list[int]:
    """Chunks in the order in which a stage runs their forwards: groups of as many micro batches as there are stages."""
    return [k % (stages * chunks) // stages for k in range(micro_batches * chunks)]


def bytes_in_flight(kept: list[int], stage: int, stages: int, micro_batches: int) -> int:
    """The most a stage keeps for backwards to come, from what a micro batch leaves in each of its chunks.

    1F1B, or interleaved where there are several chunks (megatron-core's schedules.py): after some forwards alone, one
    forward, one backward.
    """
    chunks, order = len(kept), chunk_order(len(kept), stages, micro_batches)
    alone = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    held = most = 0
    for step in range(len(order) + min(alone, len(order))):
        if step < len(order):
            held += kept[order[step]]
            most = max(most, held)
        if step >= alone:
            held -= kept[chunks - 1 - order[step - alone]]
    return most


@dataclass(frozen=True)
class StagePlan:
    """One rank of a pipeline stage; all ranks of a stage are alike."""

    layers: int
    memory: dict[str, int]
    """Bytes by part."""
    flops: float
    """Of a step, all ranks of the stage together; extra ones too."""
    buffer: int
    """Elements of its gradient buffers."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """A run on a number of ranks."""

    data_parallel: int
    micro_batches: int
    """Of each data-parallel rank, per step."""
    has_embed_pass: bool
    """Whether the step goes over its micro batches twice."""
    parameters: dict[str, int]
    """Of the whole model by group, its vocabulary padded as on one process."""
    model_flops: int
    """Of a step, all ranks together."""
    extra_flops: int
    """What the way of computing adds, the loss with it."""
    stages: list[StagePlan]
    bubble: float
    """Share of a pipeline pass in which a stage waits, were all stages equal."""
    gather_bytes: int
    """Received per rank and step by the loss."""
    reduction_bytes: int
    """Received per rank and step for the gradients' reduction and the weights' gather, at the largest stage."""

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def balance(self) -> float:
        """Mean over largest FLOPs of the stages: 1 where none waits for a slower one."""
        flops = [stage.flops for stage in self.stages]
        return sum(flops) / len(flops) / max(flops)


def plan(cfg: RunConfig, ranks: int, longest: MicroBatch, mean_pair: Work, on_gpu: bool = True) -> Plan:
    """Plan a run.

    Args:
        cfg: of the run, with its model's sizes.
        ranks: processes, one per device.
        longest: the micro batch that memory is counted for.
        mean_pair: what a pair takes on average, times 1000.
        on_gpu: False: as torch computes on a CPU, with norms of several operations.

    Raises:
        ConfigError: the model's sizes are not given, or layout or batch cannot work on these ranks.
    """
    require(has_sizes(cfg.model), f"checkpoint.init={cfg.checkpoint.init} has the model's sizes: name model.preset too")
    data_parallel = validate_layout(cfg.model, cfg.parallel, ranks)
    validate_batch(cfg, data_parallel)
    share = cfg.train.global_batch_size // data_parallel
    micro_batches = share // (cfg.train.micro_batch_size or share)
    has_embed_pass = micro_batches > 1 and cfg.loss.negatives == "global_batch"
    work = Work(*(value * cfg.train.global_batch_size // 1000 for value in vars(mean_pair).values()))
    model, stages = cfg.model, cfg.parallel.pipeline
    extra = extra_flops(model, work, has_embed_pass, cfg.loss.reward == "ema")
    rows = share if has_embed_pass else share // micro_batches
    comparisons = share // rows * data_parallel
    columns = rows * data_parallel * (1 + cfg.data.hard_negatives)
    dims = cfg.loss.matryoshka_dims or [model.language.hidden_size]
    loss = comparisons * loss_flops(rows, columns, dims, cfg.loss.reward == "ema")
    parts = [
        _plan_stage(cfg, stage, data_parallel, micro_batches, longest, on_gpu, (rows, columns), work)
        for stage in range(stages)
    ]
    buffer = max(part.buffer for part in parts)
    bytes_of_gradients = buffer * (FLOAT + element(model)) * (data_parallel - 1) // data_parallel
    return Plan(
        data_parallel=data_parallel,
        micro_batches=micro_batches,
        has_embed_pass=has_embed_pass,
        parameters=count_parameters(model),
        model_flops=step_flops(model, work),
        extra_flops=extra + loss,
        stages=parts,
        bubble=(stages - 1) / (micro_batches * cfg.parallel.virtual_pipeline + stages - 1),
        gather_bytes=share // rows * gather_bytes(cfg, rows, data_parallel),
        reduction_bytes=bytes_of_gradients,
    )


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Of the whole model, by group."""
    whole = Chunk(model, ParallelConfig(), model.language.num_layers, True, True)
    return {group: sum(sizes) for group, sizes in whole.sizes().items()}


def stage_chunks(model: ModelConfig, layout: ParallelConfig, stage: int) -> list[Chunk]:
    """What a stage holds."""
    stages, number, first = layout.pipeline, layout.virtual_pipeline, layout.first_stage_layers
    rest = model.language.num_layers // stages
    if first is not None:
        rest = first if stage == 0 else (model.language.num_layers - first) // (stages - 1)
    return [
        Chunk(model, layout, rest // number, stage + i == 0, (stage, i) == (stages - 1, number - 1))
        for i in range(number)
    ]


def _plan_stage(
    cfg: RunConfig,
    stage: int,
    data_parallel: int,
    micro_batches: int,
    batch: MicroBatch,
    on_gpu: bool,
    comparison: tuple[int, int],
    work: Work,
) -> StagePlan:
    """`comparison`: rows and columns of the loss on a rank; `work`: of the step."""
    model, e = cfg.model, element(cfg.model)
    chunks = stage_chunks(model, cfg.parallel, stage)
    buffers = [chunk.buffer(data_parallel) for chunk in chunks]
    frozen = sum(sum(s) for c in chunks for group, s in c.sizes().items() if not is_trained(model, group))
    kept = [chunk.activations(batch, on_gpu) for chunk in chunks]
    is_last, dim = stage == cfg.parallel.pipeline - 1, model.language.hidden_size
    memory = {
        "weights": (sum(buffers) + frozen) * e,
        "gradients": sum(buffers) * FLOAT,
        # Two moments, and the weights themselves where they are less precise elsewhere.
        "optimizer": sum(buffers) // data_parallel * FLOAT * (2 if e == FLOAT else 3),
        "activations": bytes_in_flight(kept, stage, cfg.parallel.pipeline, micro_batches),
        "vision features": _kept_features(cfg, chunks[0], stage, micro_batches, batch),
        "loss": loss_bytes(*comparison, dim) if is_last else 0,
        "data": data_bytes(model, batch) * micro_batches,
        "temporary": max(temporary_bytes(chunk, batch, on_gpu) for chunk in chunks),
    }
    if model.precision == "fp8":  # FP8 copies of the decoder's matrices, and of their transposes
        memory["weights"] += 2 * sum(s for c in chunks for s in c.sizes()["decoder"])
    if cfg.loss.reward == "ema":  # the average, and a copy of it that takes the weights' place for a pass
        memory["averaged weights"] = sum(buffers) * (FLOAT + e)
    layers = sum(chunk.layers for chunk in chunks)
    return StagePlan(layers, memory, _stage_flops(cfg, chunks[0].is_first, layers, work, micro_batches), sum(buffers))


def _kept_features(cfg: RunConfig, chunk: Chunk, stage: int, micro_batches: int, batch: MicroBatch) -> int:
    """Bytes of a frozen tower's features, which two passes share, and which the projector's backward needs."""
    model, stages = cfg.model, cfg.parallel.pipeline
    if not chunk.is_first or "vision" not in model.freeze:
        return 0
    of_one = feature_bytes(model, batch.work.tiles)
    passes = (cfg.loss.negatives == "global_batch" and micro_batches > 1) + (cfg.loss.reward == "ema")
    if passes:
        return micro_batches * of_one
    if "projector" in model.freeze:
        return 0
    others = [0] * (cfg.parallel.virtual_pipeline - 1)
    return bytes_in_flight([of_one, *others], stage, stages, micro_batches)


def _stage_flops(cfg: RunConfig, is_first: bool, layers: int, work: Work, micro_batches: int) -> float:
    """A step's FLOPs on a stage: its share of the decoder's, and on the first stage tower and projector."""
    two_passes = micro_batches > 1 and cfg.loss.negatives == "global_batch"

    def total(part: Work) -> int:
        return step_flops(cfg.model, part) + extra_flops(cfg.model, part, two_passes, cfg.loss.reward == "ema")

    decoder = total(Work(work.tokens, work.squared_lengths, 0)) * layers / cfg.model.language.num_layers
    return decoder + total(Work(0, 0, work.tiles)) * is_first


def gather_bytes(cfg: RunConfig, rows: int, ranks: int) -> int:
    """Bytes that a rank receives in one loss over b pairs of each of N ranks (benchmarks/gather_overhead.py)."""
    hard = rows * cfg.data.hard_negatives
    total = 0
    for dim in cfg.loss.matryoshka_dims or [cfg.model.language.hidden_size]:
        total += 8 * (rows + hard) * dim + 20 * rows + 16
        total += 4 * (rows + hard) * dim * (cfg.loss.reward == "ema")
        total += (16 * rows + 8 * hard) * cfg.loss.mask_same_target
    return (ranks - 1) * total


def layouts(cfg: RunConfig, ranks: int, longest_tensor: int = 8) -> list[ParallelConfig]:
    """Other layouts to try, from those that split the model least; tensor parallel stays within a node of 8."""
    found = []
    for size in (2**i for i in range(12) if 2**i <= ranks):
        for tensor in (2**i for i in range(4) if 2**i <= min(size, longest_tensor)):
            found.append((tensor, size // tensor))
    own = prod((cfg.parallel.tensor, cfg.parallel.pipeline))
    return [ParallelConfig(tensor=t, pipeline=p, sequence=t > 1) for t, p in found if t * p >= own]

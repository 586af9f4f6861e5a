"""Memory of a rank in bytes, computed by formula for each part; plan.py makes a plan of it.

Each part counts with its largest size: weights and gradients of a step, the activations of as many micro batches as the
pipeline schedule has in flight, and the largest temporary tensors. docs/planner.md says how the formulas were checked.
Shapes: t tokens, h hidden, f inner width of the MLP, n heads, d head dimension, k tiles; b pairs of a rank, C
columns of the loss. The parts before the decoder have their formulas in their family (models/vision_cost.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm

from megatron_llave.batch import padded_length
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import ParallelConfig, RunConfig
from megatron_llave.loss.contrastive import CHUNK
from megatron_llave.models import family_of
from megatron_llave.models.blocks.layer_specs import length_bucket
from megatron_llave.models.blocks.qwen2 import padded_vocab_size
from megatron_llave.models.vision_cost import FLOAT, VisionCost, element, has_buckets, rms_norm_activations
from megatron_llave.planning.adapters import NONE, adapter_activations, as_frozen, decoder_adapters
from megatron_llave.planning.flops import Work
from megatron_llave.planning.pair_lengths import SideShape

ADAPTERS = "adapters"
"""The group of parameters of LoRA adapters."""
PARAMETER_ALIGNMENT, BUFFER_ALIGNMENT = 64, 128
"""Alignment in elements of parameters in megatron-core's gradient buffer, and of its end (param_and_grad_buffer.py)."""
PART_OF = {"vision": "vision", "projector": "projector", "embedding": "language", "decoder": "language"}
"""The name in model.freeze for each group of parameters."""


@dataclass(frozen=True)
class MicroBatch:
    """The amount of input of one micro batch, and the share of it that each context rank has."""

    work: Work
    """All of it."""
    sequences: int
    context: int
    """Number of context ranks."""
    videos: int
    """Number of them; the tiles of the Qwen-VL families are twice as large if there is any."""
    visual_tokens: int
    """Of a context rank, as all numbers below."""
    tokens: int
    tiles: int
    attended: int
    """Queries of the local attention, which pads sequences of similar lengths to the longest of them."""
    keys: int
    """Keys of these queries, padded in the same way."""
    masked: int
    """Products of queries and keys; 0 if one rank has the row, which needs no mask."""

    @staticmethod
    def of(sides: Sequence[SideShape], context: int = 1, splits_tiles: bool = True) -> "MicroBatch":
        """Return the micro batch of these sides, packed into one row that `context` ranks share.

        `splits_tiles`: whether they share the tiles too, or each has all of them.
        """
        lengths = [side.tokens for side in sides]
        padded = [padded_length(length, context) for length in lengths]
        buckets: dict[int, list[int]] = {}
        names = ("tiles", "visual_tokens", "patch_pairs", "videos")
        for length in padded:
            attended = length if context == 1 else length // (2 * context)
            buckets.setdefault(length_bucket(attended), []).append(attended)
        tiles, visual, patch_pairs, videos = (sum(getattr(side, name) for side in sides) for name in names)
        attended = sum(len(bucket) * max(bucket) for bucket in buckets.values())
        squares = sum(len(bucket) * max(bucket) ** 2 for bucket in buckets.values())
        # The chunks r and 2c - 1 - r of a sequence have r + 1 and 2c - r chunks of keys.
        queries, keys, masked = (2, 2 * context + 1, squares * (2 * context + 1)) if context > 1 else (1, 1, 0)
        return MicroBatch(
            work=Work(sum(lengths), sum(x * x for x in lengths), tiles, patch_pairs),
            sequences=len(sides),
            context=context,
            videos=videos,
            visual_tokens=-(-visual // context),
            tokens=sum(padded) // context,
            tiles=-(-tiles // context) if splits_tiles else tiles,
            attended=queries * attended,
            keys=keys * attended,
            masked=masked,
        )


@dataclass(frozen=True)
class Chunk:
    """The share of the model on one rank: all of it, a pipeline stage, or one of the chunks of a stage."""

    model: ModelConfig
    layout: ParallelConfig
    layers: int
    """Layers of the decoder."""
    is_first: bool
    """Whether it has vision encoder, projector and token embedding."""
    is_last: bool
    """Whether it has the final norm and pools."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters; with some, the parts that have none and the decoder are in model.freeze (adapters.as_frozen)."""

    @property
    def cost(self) -> VisionCost:
        """Return the formulas of the parts before the decoder."""
        return family_of(self.model).cost

    def sizes(self) -> dict[str, list[int]]:
        """Return the elements of each parameter on one tensor-parallel rank, by group."""
        language, tp = self.model.language, self.layout.tensor
        h, f, kind = language.hidden_size, language.ffn_hidden_size, self.cost.decoder
        q, kv = head_widths(self.model)
        layer = [(q + 2 * kv) * h // tp, h * q // tp, 2 * f * h // tp, f * h // tp, h, h]
        layer += [(q + 2 * kv) // tp] * kind.qkv_bias + [language.head_channels] * 2 * kind.qk_norm
        sizes = {"decoder": layer * self.layers + [h] * self.is_last}
        if self.lora.rank:
            own = [size for adapter in decoder_adapters(self.model, self.lora) for size in adapter.elements(tp)]
            sizes[ADAPTERS] = own * self.layers
        if not self.is_first:
            return sizes
        before = self.cost.parameters(self.model, tp)
        return sizes | before | {"embedding": [padded_vocab_size(language, tp) // tp * h]}

    def buffer(self, data_parallel: int) -> int:
        """Return the elements of the gradient buffer: trained parameters with their starts and the end aligned."""
        trained = [s for group, sizes in self.sizes().items() if is_trained(self.model, group) for s in sizes]
        return round_up(sum(round_up(s, PARAMETER_ALIGNMENT) for s in trained), lcm(data_parallel, BUFFER_ALIGNMENT))

    def activations(self, batch: MicroBatch, on_gpu: bool) -> int:
        """Return the bytes that the backward of a micro batch needs, without features of a frozen vision encoder."""
        model, h, e = self.model, self.model.language.hidden_size, element(self.model)
        kept = self.layers * layer_activations(model, self.layout, batch, on_gpu, model.recompute, self.lora)
        if model.kernels == "local":
            if model.recompute == "full":  # the rotary angles, an input of every layer
                kept += FLOAT * model.language.head_channels * batch.tokens
            elif has_buckets(model, on_gpu):  # indices of the tokens in the buckets
                kept += 8 * (batch.tokens + batch.attended + (batch.keys if batch.context > 1 else 0)) + batch.masked
        kept += self.deepstack_bytes(batch, model.recompute == "full")
        if self.is_first and model.dropout:
            kept += batch.tokens * h * e
        norm = rms_norm_activations(model, h, on_gpu)
        if self.lora.rank and not on_gpu and model.kernels == "local":
            norm -= FLOAT * h
        if self.lora.rank and self.is_first and model.recompute != "full":  # whose input gets no gradient
            kept -= (norm - h * e) * batch.tokens // (self.layout.tensor if self.layout.sequence else 1)
        if self.is_first and not {"vision", "projector"} <= set(model.freeze):
            tp = self.layout.tensor
            kept += self.cost.projector_activations(model, tp, batch.tiles, batch.visual_tokens, on_gpu)
            if "vision" not in model.freeze:
                kept += self.cost.encoder_activations(model, tp, batch.tiles, on_gpu)
        if self.is_last:
            spread = self.layout.tensor if self.layout.sequence else 1
            kept += (norm - h * e) * batch.tokens // spread
            kept += 3 * FLOAT * h * batch.sequences  # pooled and normalised
        return kept

    def deepstack_bytes(self, batch: MicroBatch, is_kept: bool) -> int:
        """Return the bytes of what the first layers add, d rows per token, in the first chunk or received by others.

        Other chunks receive it with the hidden states, in one tensor, which they keep; the first keeps it if `is_kept`.
        """
        number = len(self.model.vision.deepstack_layers)
        if not self.is_first:
            number = max(0, number - stage_chunks(self.model, self.layout, 0)[0].layers)
        spread = self.layout.tensor if self.layout.sequence else 1
        of_one = batch.tokens * self.model.language.hidden_size * element(self.model) // spread
        return number * of_one if is_kept or not self.is_first else 0


def head_widths(model: ModelConfig) -> tuple[int, int]:
    """Return the width of all query heads together, and of all key heads, which is also that of all value heads."""
    language = model.language
    return language.num_heads * language.head_channels, language.num_kv_heads * language.head_channels


def is_trained(model: ModelConfig, group: str) -> bool:
    """Whether a group of parameters gets gradients."""
    return group == ADAPTERS or PART_OF[group] not in model.freeze


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not less than `number`."""
    return -(-number // multiple) * multiple


def layer_activations(
    model: ModelConfig, layout: ParallelConfig, batch: MicroBatch, on_gpu: bool, recompute: str, lora: LoraConfig = NONE
) -> int:
    """Return the bytes that a decoder layer keeps of a micro batch for the backward."""
    language, e, tp = model.language, element(model), layout.tensor
    h, f, t = language.hidden_size, language.ffn_hidden_size, batch.tokens
    q, kv = head_widths(model)
    spread = tp if layout.sequence else 1
    if recompute == "full":
        return t * h * e // spread
    fused, is_selective = model.kernels == "transformer_engine", recompute == "selective"
    # Queries and keys after the rotary embedding, the tensor of all three before it (values are a slice), the output.
    attention = t * e * (q + kv + (q + 2 * kv) + q)
    if not is_selective:
        attention += t * FLOAT * language.num_heads
        if has_buckets(model, on_gpu):  # sequences are copied into buckets and back
            attention = t * e * q + batch.attended * (e * 2 * q + FLOAT * language.num_heads) + batch.keys * e * 2 * kv
            attention += batch.masked * e * tp  # which torch makes of the mask, the same for all heads
        elif not fused and batch.context > 1:  # the keys of each chunk
            attention += t * (2 * batch.context + 1) // 2 * e * 2 * kv
    if family_of(model).cost.decoder.qk_norm:
        attention += qk_norm_activations(model, batch, on_gpu, has_copies=not is_selective)
    # Both halves of the gated MLP, and the product. Where SwiGLU is not one kernel, as on a CPU, also SiLU of the gate,
    # and the other half plus megatron-core's offset.
    mlp = 0 if is_selective else (3 if on_gpu else 5) * f * t * e
    norms = 2 * rms_norm_activations(model, h, on_gpu) * t
    if fused and is_selective:
        norms -= h * e * t  # the second norm is part of the recomputed MLP
    rotary = 0 if fused else 4 * language.head_channels * t * e
    dropped = 2 * h * t * e if model.dropout else 0
    adapters = adapter_activations(model, lora, tp, layout.sequence, t, on_gpu) if lora.rank else 0
    return (attention + mlp) // tp + (norms + dropped) // spread + rotary + adapters


def qk_norm_activations(model: ModelConfig, batch: MicroBatch, on_gpu: bool, has_copies: bool) -> int:
    """Return the bytes that the norms of queries and keys keep beside the tensor of queries, keys and values.

    These are a copy of the queries, and what torch keeps between where a norm is not one kernel. `has_copies`: whether
    the attention may copy the sequences into buckets, so that the tensor of all three is kept for the norms alone.
    """
    (q, kv), e = head_widths(model), element(model)
    kept = q * e + FLOAT * (model.language.num_heads + model.language.num_kv_heads)
    if not on_gpu and model.kernels == "local":
        kept += FLOAT * (q + kv)
    if has_copies and has_buckets(model, on_gpu):
        kept += (q + 2 * kv) * e
    return kept * batch.tokens


def data_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes of the inputs of a micro batch: ids, indices of visual tokens, pixels."""
    pixels = family_of(model).cost.pixel_bytes(model, batch.tiles, batch.videos)
    ids = 8 * batch.tokens * (4 if model.language.mrope_section else 1)  # and their positions on three axes
    return ids + 16 * batch.visual_tokens + pixels + 20 * batch.sequences


def loss_bytes(rows: int, columns: int, dim: int, hard_negatives: int = 0) -> int:
    """Return the bytes at the loss's peak, in its backward pass, all in float32.

    These are the embeddings of b pairs and of their hard negatives; the queries once more, the columns C of all ranks,
    and the gradients of both; b rows of a product or, of several ranks, of the sum of gradients; a chunk of logits.

    Args:
        rows: b, pairs of this rank.
        columns: C, targets and hard negatives of all ranks.
        dim: width of an embedding.
        hard_negatives: those of each of these pairs, and its targets after the first.
    """
    vectors = rows * (5 + hard_negatives) + 2 * columns
    return FLOAT * (vectors * dim + 4 * min(CHUNK, rows) * columns)


def temporary_bytes(chunk: Chunk, batch: MicroBatch, on_gpu: bool) -> int:
    """Return the bytes of the largest temporary tensors."""
    model, e, tp = chunk.model, element(chunk.model), chunk.layout.tensor
    # Gradients in the MLP of a layer, or in a norm of several operations; the layer itself if it is recomputed.
    spread = tp if chunk.layout.sequence else 1
    in_norm = 0 if on_gpu or model.kernels == "transformer_engine" else 4 * model.language.hidden_size * FLOAT // spread
    given = (model, chunk.layout, batch, on_gpu)
    of_layer = [layer_activations(*given, way, chunk.lora) for way in ("none", model.recompute)]
    # Or keys and values of all context ranks, and their gradients.
    gathered = (
        4 * head_widths(model)[1] * e // tp * batch.context if batch.context > 1 and model.kernels == "local" else 0
    )
    largest = max(2 * model.language.ffn_hidden_size * e // tp, in_norm, gathered) * batch.tokens
    # Or what deepstack adds, until the end of the forward pass.
    dense = chunk.deepstack_bytes(batch, is_kept=True) if chunk.is_first and model.recompute != "full" else 0
    in_layer = of_layer[0] - of_layer[1] + max(largest, dense)
    if not chunk.is_first:
        return in_layer
    at_ends = [
        chunk.cost.temporary_bytes(model, tp, batch.tiles, batch.videos, batch.context, on_gpu),
        chunk.sizes()["embedding"][0] * e * is_trained(model, "embedding"),  # its gradient, dense
    ]
    # These tensors exist before the activations of the micro batch are kept, or after they are freed.
    return max(in_layer, max(at_ends) - chunk.activations(batch, on_gpu))


def chunk_order(chunks: int, stages: int, micro_batches: int) -> list[int]:
    """Return the chunks in the order of a stage's forwards: groups of as many micro batches as there are stages."""
    return [k % (stages * chunks) // stages for k in range(micro_batches * chunks)]


def bytes_in_flight(kept: list[int], stage: int, stages: int, micro_batches: int) -> int:
    """Return the most bytes that a stage keeps for later backwards, given what a micro batch leaves in each chunk.

    The schedule is 1F1B, or the interleaved one for several chunks (megatron-core's schedules.py): some forwards first,
    then one forward and one backward in turn.
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


def stage_chunks(model: ModelConfig, layout: ParallelConfig, stage: int, lora: LoraConfig = NONE) -> list[Chunk]:
    """Return the chunks of a pipeline stage."""
    stages, number, first = layout.pipeline, layout.virtual_pipeline, layout.first_stage_layers
    layers = model.language.num_layers // stages
    if first is not None:
        layers = first if stage == 0 else (model.language.num_layers - first) // (stages - 1)
    return [
        Chunk(model, layout, layers // number, stage + i == 0, (stage, i) == (stages - 1, number - 1), lora)
        for i in range(number)
    ]


@dataclass(frozen=True)
class StepShape:
    """How a step is divided over ranks and micro batches."""

    data_parallel: int
    """Number of data-parallel ranks."""
    micro_batches: int
    """Micro batches of each data-parallel rank."""
    rows: int
    """b, pairs of a rank in one loss: those of a step or of a micro batch."""
    columns: int
    """C, pairs and hard negatives of all ranks in one loss."""
    has_embed_pass: bool
    """Whether the step runs its micro batches twice (gradient cache)."""
    batch: MicroBatch
    """The longest micro batch."""
    held: int | None = None
    """Number of micro batches that are on the device at once, with a token budget; None: all of a step."""


def stage_memory(cfg: RunConfig, stage: int, step: StepShape, on_gpu: bool = True) -> dict[str, int]:
    """Return bytes by part on a rank of a pipeline stage; the last part is that of temporary tensors.

    Args:
        cfg: configuration of the run, with the sizes of its model.
        stage: number of the pipeline stage, from 0.
        step: how a step is divided.
        on_gpu: False for a CPU, where norms of torch are several operations.
    """
    cfg = as_frozen(cfg)
    model, e, stages = cfg.model, element(cfg.model), cfg.parallel.pipeline
    chunks = stage_chunks(model, cfg.parallel, stage, cfg.lora)
    sharing = step.data_parallel * cfg.parallel.context  # ranks that share gradients and optimizer
    trained = sum(chunk.buffer(sharing) for chunk in chunks)
    frozen = sum(sum(s) for c in chunks for group, s in c.sizes().items() if not is_trained(model, group))
    kept = [chunk.activations(step.batch, on_gpu) for chunk in chunks]
    is_last, width = stage == stages - 1, model.language.hidden_size
    further = -(-step.columns // (step.rows * step.data_parallel)) - 1  # targets and hard negatives of a pair
    memory = {
        "weights": (trained + frozen) * e,
        "gradients": trained * FLOAT,
        "optimizer": optimizer_bytes(cfg, trained // sharing),
        "activations": bytes_in_flight(kept, stage, stages, step.micro_batches),
        "vision features": _kept_features(cfg, step) if stage == 0 else 0,
        "loss": loss_bytes(step.rows, step.columns, width, further) if is_last else 0,
        "data": data_bytes(model, step.batch) * (step.held or step.micro_batches),
        "temporary": max(temporary_bytes(chunk, step.batch, on_gpu) for chunk in chunks),
    }
    if model.precision == "fp8":  # FP8 copies of the decoder's matrices, and of their transposes
        memory["weights"] += 2 * sum(sum(c.sizes()["decoder"]) for c in chunks)
    if cfg.loss.reward == "ema":  # the average, and a copy of it in the weights' dtype for one pass
        memory["weights"] += trained * (FLOAT + e)
    if cfg.loss.reward == "stored":  # as wide as the model's embeddings; the last stage gathers those of the columns
        memory["data"] += FLOAT * width * step.batch.sequences * step.micro_batches
        memory["loss"] += FLOAT * width * step.columns * is_last
    return memory


def optimizer_bytes(cfg: RunConfig, owned: int) -> int:
    """Return the device bytes of the optimizer's states of so many elements that a rank owns.

    These are two moments, and float32 weights if the model's are less precise, less what is offloaded.
    """
    moments = 2 * (2 if cfg.optimizer.moments == "bf16" else FLOAT)
    main = 0 if element(cfg.model) == FLOAT else FLOAT
    return round((1 - cfg.optimizer.offload_fraction) * owned) * (moments + main)


def _kept_features(cfg: RunConfig, step: StepShape) -> int:
    """Return the bytes of a frozen vision encoder's features, for later passes and for the projector's backward."""
    model, layout = cfg.model, cfg.parallel
    if "vision" not in model.freeze:
        return 0
    of_one = family_of(model).cost.feature_bytes(model, step.batch.tiles)
    if step.held is None and (step.has_embed_pass or cfg.loss.reward == "ema"):
        return step.micro_batches * of_one
    if "projector" in model.freeze:
        return 0
    others = [0] * (layout.virtual_pipeline - 1)
    return bytes_in_flight([of_one, *others], 0, layout.pipeline, step.micro_batches)

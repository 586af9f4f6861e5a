"""How many floating-point operations a step takes, by formula: for the run's TFLOP/s and MFU, and for planning.

A multiply-add counts as two; norms, activations, embeddings and the loss are left out, as usual. Attention is counted
as far as the mask lets it look: half of the decoder's square. What only the way of computing adds (embed pass of the
gradient cache, recomputed activations, padding) is no work of the model's: `step_flops` leaves it out, `extra_flops` is
the part of it that a configuration decides.
Shapes: p patches per tile, l tokens of a sequence, h hidden; b rows of a rank, C columns, d embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_llave.config.model import PARTS, LanguageConfig, ModelConfig, VisionConfig

DENSE_TFLOPS = {
    **{"A100": 312, "A800": 312, "L40S": 362},
    **{"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H200": 989},
    **{"GB200": 2500, "B200": 2250},
}
"""bfloat16 without sparsity, TFLOP/s by part of the device's name, from NVIDIA's data sheets; the first that fits."""
FP8_OVER_BF16 = 2
"""On the devices above that have FP8: all but the A100 and A800."""


@dataclass(frozen=True)
class Work:
    """What a step, or any part of one, passes through the model."""

    tokens: int
    """Of all sequences."""
    squared_lengths: int
    """Sum over sequences of the square of their tokens."""
    tiles: int
    """Pictures' tiles."""


def tower_flops(vision: VisionConfig) -> int:
    """Forward of one tile through the vision tower."""
    p, h = vision.patches_per_side**2, vision.hidden_size
    layer = 2 * p * h * (4 * h + 2 * vision.ffn_hidden_size) + 4 * p * p * h
    return _patch_flops(vision) + vision.num_layers * layer


def _patch_flops(vision: VisionConfig) -> int:
    """Forward of one tile through the patch convolution."""
    return 2 * vision.patches_per_side**2 * 3 * vision.patch_size**2 * vision.hidden_size


def projector_flops(model: ModelConfig) -> tuple[int, int]:
    """Forward of one tile through the projector's two layers."""
    p, h = model.vision.patches_per_side**2, model.language.hidden_size
    return 2 * p * model.vision.hidden_size * h, 2 * p * h * h


def decoder_flops(language: LanguageConfig, tokens: int, squared_lengths: int) -> int:
    """Forward of sequences through the decoder."""
    h = language.hidden_size
    kv = h // language.num_heads * language.num_kv_heads
    per_token = 2 * h * (2 * h + 2 * kv + 3 * language.ffn_hidden_size)
    return language.num_layers * per_token * tokens + _attention_flops(language, squared_lengths)


def _attention_flops(language: LanguageConfig, squared_lengths: int) -> int:
    """Forward of the decoder's two products without weights."""
    return language.num_layers * 2 * squared_lengths * language.hidden_size


def forward_flops(model: ModelConfig, work: Work) -> int:
    """Embedding alone."""
    per_tile = tower_flops(model.vision) + sum(projector_flops(model))
    return per_tile * work.tiles + decoder_flops(model.language, work.tokens, work.squared_lengths)


def step_flops(model: ModelConfig, work: Work) -> int:
    """Forward and backward, of which frozen parts need less.

    A matrix product's backward is two more: for its input, where something before it is trained, and for its weight.
    """
    tower, decoder = tower_flops(model.vision), decoder_flops(model.language, work.tokens, work.squared_lengths)
    first, second = projector_flops(model)
    trains = {part: part not in model.freeze for part in PARTS}
    total = (3 * tower - _patch_flops(model.vision) if trains["vision"] else tower) * work.tiles
    total += (1 + trains["vision"] + trains["projector"]) * first * work.tiles
    total += (1 + (trains["vision"] or trains["projector"]) + trains["projector"]) * second * work.tiles
    if trains["language"]:
        return total + 3 * decoder
    if trains["vision"] or trains["projector"]:  # the gradient passes through; attention has two inputs
        return total + 2 * decoder + _attention_flops(model.language, work.squared_lengths)
    return total + decoder


def extra_flops(model: ModelConfig, work: Work, embed_pass: bool, reward_pass: bool = False) -> int:
    """What the way of computing adds to `step_flops`.

    Args:
        model: of the run.
        work: of the step.
        embed_pass: global-batch negatives with several micro batches per rank: one more forward.
        reward_pass: loss.reward=ema: one more forward.

    Returns:
        Those forwards, in which a frozen tower does not run again, and what model.recompute computes again.
    """
    tower = 0 if "vision" in model.freeze else tower_flops(model.vision)
    decoder = decoder_flops(model.language, work.tokens, work.squared_lengths)
    forward = (tower + sum(projector_flops(model))) * work.tiles + decoder
    return (embed_pass + reward_pass) * forward + _recomputed_flops(model, work)


def _recomputed_flops(model: ModelConfig, work: Work) -> int:
    """The decoder's products that a backward makes again."""
    language = model.language
    if model.recompute == "full":
        return decoder_flops(language, work.tokens, work.squared_lengths)
    if model.recompute == "selective":
        mlp = language.num_layers * 6 * language.hidden_size * language.ffn_hidden_size * work.tokens
        return mlp + _attention_flops(language, work.squared_lengths)
    return 0


def loss_flops(rows: int, columns: int, dims: Sequence[int], has_reward: bool = False) -> int:
    """Forward and backward of the loss on one rank: b rows times C columns, four products of width d.

    Args:
        rows: b, this rank's pairs.
        columns: C, all ranks' pairs and hard negatives.
        dims: width of the embedding, or loss.matryoshka_dims.
        has_reward: whether another model's cosines are made too, in the forward and again in the backward.
    """
    return (4 + 2 * has_reward) * 2 * rows * columns * sum(dims)


def achieved(model: ModelConfig, work: Work, seconds: float, ranks: int, peak: float | None) -> dict[str, float]:
    """`tflops` per device of a step that took so long on all ranks,
    and its share `mfu` of the peak, if that is known.

    Args:
        model: of the run.
        work: of the step, all ranks together.
        seconds: of the step.
        ranks: that shared it.
        peak: TFLOP/s of one device (log.peak_tflops); None: those of the GPU, if it is a known one.
    """
    tflops = step_flops(model, work) / seconds / ranks / 1e12
    peak = peak or peak_tflops(model.precision)
    return {"tflops": tflops} | ({"mfu": tflops / peak} if peak else {})


def peak_tflops(precision: str) -> float | None:
    """Dense TFLOP/s of this process's GPU at a precision; None on a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = [value for part, value in DENSE_TFLOPS.items() if part in name]
    if not known or precision == "fp32":
        return None
    return float(known[0] * (FP8_OVER_BF16 if precision == "fp8" else 1))

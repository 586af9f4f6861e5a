"""Floating-point operations of a step, computed by formula: for the TFLOP/s and MFU of a run, and for planning.

A multiply-add counts as two operations; norms, activation functions, embeddings and the loss are left out, as usual.
Attention counts as far as its mask allows: half of the square for the decoder. Operations that only the way of
computing adds (embed pass of the gradient cache, recomputed activations, padding) are not part of `step_flops`;
`extra_flops` gives those of them that the configuration decides about.
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
"""TFLOP/s in bfloat16 without sparsity, by a part of the device's name (NVIDIA's data sheets). The first match wins."""
FP8_OVER_BF16 = 2
"""Ratio of FP8 to bfloat16 TFLOP/s on the devices above that have FP8, which are all but the A100 and A800."""


@dataclass(frozen=True)
class Work:
    """The amount of input of a step, or of a part of it."""

    tokens: int
    """Tokens of all sequences."""
    squared_lengths: int
    """Sum over the sequences of their squared lengths, tokens squared."""
    tiles: int
    """Tiles of all images."""


def vision_encoder_flops(vision: VisionConfig) -> int:
    """FLOPs of the forward pass of one tile through the vision encoder."""
    p, h = vision.patches_per_side**2, vision.hidden_size
    layer = 2 * p * h * (4 * h + 2 * vision.ffn_hidden_size) + 4 * p * p * h
    return _patch_flops(vision) + vision.num_layers * layer


def _patch_flops(vision: VisionConfig) -> int:
    """FLOPs of the forward pass of one tile through the patch convolution."""
    return 2 * vision.patches_per_side**2 * 3 * vision.patch_size**2 * vision.hidden_size


def projector_flops(model: ModelConfig) -> tuple[int, int]:
    """FLOPs of the forward pass of one tile through each of the projector's two layers."""
    p, h = model.vision.patches_per_side**2, model.language.hidden_size
    return 2 * p * model.vision.hidden_size * h, 2 * p * h * h


def decoder_flops(language: LanguageConfig, tokens: int, squared_lengths: int) -> int:
    """FLOPs of the forward pass of sequences through the decoder."""
    h = language.hidden_size
    kv = h // language.num_heads * language.num_kv_heads
    per_token = 2 * h * (2 * h + 2 * kv + 3 * language.ffn_hidden_size)
    return language.num_layers * per_token * tokens + _attention_flops(language, squared_lengths)


def _attention_flops(language: LanguageConfig, squared_lengths: int) -> int:
    """FLOPs of the forward pass through the decoder's two products without weights."""
    return language.num_layers * 2 * squared_lengths * language.hidden_size


def forward_flops(model: ModelConfig, work: Work) -> int:
    """FLOPs of the forward pass through the complete model."""
    per_tile = vision_encoder_flops(model.vision) + sum(projector_flops(model))
    return per_tile * work.tiles + decoder_flops(model.language, work.tokens, work.squared_lengths)


def step_flops(model: ModelConfig, work: Work) -> int:
    """FLOPs of forward and backward passes, where frozen parts need less.

    The backward pass of a matrix product is two more products: for its input, if something before it is trained, and
    for its weight.
    """
    encoder = vision_encoder_flops(model.vision)
    decoder = decoder_flops(model.language, work.tokens, work.squared_lengths)
    first, second = projector_flops(model)
    trains = {part: part not in model.freeze for part in PARTS}
    total = (3 * encoder - _patch_flops(model.vision) if trains["vision"] else encoder) * work.tiles
    total += (1 + trains["vision"] + trains["projector"]) * first * work.tiles
    total += (1 + (trains["vision"] or trains["projector"]) + trains["projector"]) * second * work.tiles
    if trains["language"]:
        return total + 3 * decoder
    if trains["vision"] or trains["projector"]:  # the gradient passes through the decoder; attention has two inputs
        return total + 2 * decoder + _attention_flops(model.language, work.squared_lengths)
    return total + decoder


def extra_flops(model: ModelConfig, work: Work, embed_pass: bool, reward_pass: bool = False) -> int:
    """FLOPs that the way of computing adds to `step_flops`.

    Args:
        model: the `model` section of the run.
        work: input of the step.
        embed_pass: whether there is one more forward pass, for global-batch negatives of several micro batches.
        reward_pass: whether there is one more forward pass, for loss.reward=ema.

    Returns:
        FLOPs of these forward passes, in which a frozen vision encoder does not run again, and of the activations that
        model.recompute recomputes.
    """
    encoder = 0 if "vision" in model.freeze else vision_encoder_flops(model.vision)
    decoder = decoder_flops(model.language, work.tokens, work.squared_lengths)
    forward = (encoder + sum(projector_flops(model))) * work.tiles + decoder
    return (embed_pass + reward_pass) * forward + _recomputed_flops(model, work)


def _recomputed_flops(model: ModelConfig, work: Work) -> int:
    """FLOPs of the decoder's products that the backward pass recomputes."""
    language = model.language
    if model.recompute == "full":
        return decoder_flops(language, work.tokens, work.squared_lengths)
    if model.recompute == "selective":
        mlp = language.num_layers * 6 * language.hidden_size * language.ffn_hidden_size * work.tokens
        return mlp + _attention_flops(language, work.squared_lengths)
    return 0


def loss_flops(rows: int, columns: int, dims: Sequence[int], has_reward: bool = False) -> int:
    """FLOPs of forward and backward of the loss on one rank: b rows times C columns, four products of width d.

    Args:
        rows: b, pairs of this rank.
        columns: C, pairs and hard negatives of all ranks.
        dims: width of the embedding, or loss.matryoshka_dims.
        has_reward: whether cosines of a second model are computed too, in the forward and again in the backward.
    """
    return (4 + 2 * has_reward) * 2 * rows * columns * sum(dims)


def achieved(model: ModelConfig, work: Work, seconds: float, ranks: int, peak: float | None) -> dict[str, float]:
    """Return `tflops`, the TFLOP/s per device of a step, and `mfu`, their share of the peak, if that is known.

    Args:
        model: the `model` section of the run.
        work: input of the step, of all ranks together.
        seconds: duration of the step.
        ranks: number of ranks that shared the step.
        peak: TFLOP/s of one device (log.peak_tflops); None: those of the GPU, if it is a known one.
    """
    tflops = step_flops(model, work) / seconds / ranks / 1e12
    peak = peak or peak_tflops(model.precision)
    return {"tflops": tflops} | ({"mfu": tflops / peak} if peak else {})


def peak_tflops(precision: str) -> float | None:
    """Return the dense TFLOP/s of this process's GPU at a precision; None on a CPU or for an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = [value for part, value in DENSE_TFLOPS.items() if part in name]
    if not known or precision == "fp32":
        return None
    return float(known[0] * (FP8_OVER_BF16 if precision == "fp8" else 1))

"""Floating-point operations of a step, computed by formula: for the TFLOP/s and MFU of a run, and for planning.

A multiply-add counts as two operations; norms, activation functions, embeddings and the loss are left out, as usual.
Attention counts as far as its mask allows: half of the square for the decoder. Operations that only the way of
computing adds (embed pass of the gradient cache, recomputed activations, padding) are not part of `step_flops`;
`extra_flops` gives those of them that the configuration decides about.
Shapes: h hidden; b rows of a rank, C columns, d embedding.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megatron_llave.config.model import LanguageConfig, ModelConfig
from megatron_llave.models import family_of
from megatron_llave.models.vision_cost import Products

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
    patch_pairs: int = 0
    """What the attention of the vision encoder costs where tiles do not say it (VisionCost.patch_pairs)."""


def _products(model: ModelConfig, work: Work) -> list[Products]:
    """Matrix products of vision encoder and projector."""
    return family_of(model).cost.products(model, work.tiles, work.patch_pairs)


def decoder_flops(language: LanguageConfig, tokens: int, squared_lengths: int) -> int:
    """FLOPs of the forward pass of sequences through the decoder."""
    h, head = language.hidden_size, language.head_channels
    per_token = 2 * h * (2 * head * (language.num_heads + language.num_kv_heads) + 3 * language.ffn_hidden_size)
    return language.num_layers * per_token * tokens + _attention_flops(language, squared_lengths)


def _attention_flops(language: LanguageConfig, squared_lengths: int) -> int:
    """FLOPs of the forward pass through the decoder's two products without weights."""
    return language.num_layers * 2 * squared_lengths * language.num_heads * language.head_channels


def forward_flops(model: ModelConfig, work: Work) -> int:
    """FLOPs of the forward pass through the complete model."""
    vision = sum(products.flops for products in _products(model, work))
    return vision + decoder_flops(model.language, work.tokens, work.squared_lengths)


def step_flops(model: ModelConfig, work: Work, adapted: Collection[str] = ()) -> int:
    """FLOPs of forward and backward passes, where frozen parts need less.

    The backward pass of a matrix product is two more products: for its input, if something before it is trained, and
    for its weight. With LoRA no weight has one; the adapters' own products, a few percent, are left out.

    Args:
        model: the `model` section of the run.
        work: input of the step.
        adapted: the parts of the model that have adapters (LoraConfig.parts); none: all that is not frozen is trained.
    """
    decoder = decoder_flops(model.language, work.tokens, work.squared_lengths)
    if adapted:  # each product that a gradient passes through has one more; attention has two inputs
        passed = sum(p.flops for p in _products(model, work) if {p.part, *p.after} & set(adapted))
        return forward_flops(model, work) + passed + decoder + _attention_flops(model.language, work.squared_lengths)
    total = sum(products.with_backward(model.freeze) for products in _products(model, work))
    if "language" not in model.freeze:
        return total + 3 * decoder
    if not {"vision", "projector"} <= set(model.freeze):  # the gradient passes through it; attention has two inputs
        return total + 2 * decoder + _attention_flops(model.language, work.squared_lengths)
    return total + decoder


def extra_flops(
    model: ModelConfig,
    work: Work,
    embed_pass: bool,
    reward_pass: bool = False,
    vision_copies: int = 1,
    keeps_features: bool = True,
) -> int:
    """FLOPs that the way of computing adds to `step_flops`.

    Args:
        model: the `model` section of the run.
        work: input of the step.
        embed_pass: whether there is one more forward pass, for global-batch negatives of several micro batches.
        reward_pass: whether there is one more forward pass, for loss.reward=ema.
        vision_copies: number of ranks that each encode the same images: 1, or the context ranks of a family whose
            `splits_tiles` is false.
        keeps_features: whether a frozen vision encoder runs in one pass alone, as without a token budget.

    Returns:
        FLOPs of these forward passes and of the activations that model.recompute recomputes.
    """
    run_again = {"vision", "projector"} - ({"vision"} & set(model.freeze) if keeps_features else set())
    vision = _products(model, work)
    again = sum(products.flops for products in vision if products.part in run_again)
    passes, once = embed_pass + reward_pass, sum(products.with_backward(model.freeze) for products in vision)
    total = passes * (again + decoder_flops(model.language, work.tokens, work.squared_lengths))
    return total + (vision_copies - 1) * (once + passes * again) + _recomputed_flops(model, work)


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


def achieved(
    model: ModelConfig,
    work: Work,
    seconds: float,
    ranks: int,
    peak: float | None,
    adapted: Collection[str] = (),
) -> dict[str, float]:
    """Return `tflops`, the TFLOP/s per device of a step, and `mfu`, their share of the peak, if that is known.

    Args:
        model: the `model` section of the run.
        work: input of the step, of all ranks together.
        seconds: duration of the step.
        ranks: number of ranks that shared the step.
        peak: TFLOP/s of one device (log.peak_tflops); None: those of the GPU, if it is a known one.
        adapted: as in `step_flops`.
    """
    tflops = step_flops(model, work, adapted) / seconds / ranks / 1e12
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

"""The section `loss` of the configuration."""

import math
from dataclasses import dataclass, field

from megatron_llave.errors import at_least, one_of, require

HARDNESS = ("in_batch", "hard_negatives", "all")
DIRECTIONS = ("symmetric", "query_to_target")
NEGATIVES = ("global_batch", "micro_batch", "own_micro_batch")


@dataclass
class LossConfig:
    """Hardness-weighted contrastive loss (section 3.2 of the paper)."""

    temperature: float = 0.02
    """Temperature tau, by which the cosine similarities are divided."""
    temperature_start: float | None = None
    """Temperature at step 0, which decreases geometrically to `temperature`; null: no warmup. Random weights collapse
    to one point when they are trained at 0.02 from the first step on."""
    temperature_warmup_steps: int = 0
    """Number of steps of the temperature warmup."""
    alpha: float = 9.0
    """Hardness weight of the negatives; 0 is plain InfoNCE."""
    alpha_warmup_steps: int = 0
    """Number of steps over which alpha rises linearly from 0."""
    negatives: str = "global_batch"
    """Negatives of a pair: global_batch (every other pair of the step, whatever the micro-batch size; costs a second
    forward pass when a rank has several micro batches), micro_batch (its micro batch on all data-parallel ranks, as in
    the official LLaVE repository) or own_micro_batch (its micro batch on its own rank alone, the baseline of the
    paper's ablation)."""
    mask_same_target: bool = False
    """Mask pairs with equal target ids or equal query ids, so that they are not each other's negatives in either
    direction."""
    mask_margin: float | None = None
    """Mask a negative as a false negative if its cosine exceeds that of the positive by more than this; null: mask
    none."""
    hardness: str = "all"
    """Negatives that are weighted by their hardness: in_batch, hard_negatives (those that data.hard_negatives adds) or
    all. The other negatives count as in plain InfoNCE."""
    directions: str = "symmetric"
    """Directions that are compared: symmetric (query to target and back, as in the paper) or query_to_target."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Lengths of embedding prefixes over which the loss is averaged, each renormalised; empty: the complete
    embedding."""
    reward: str = "self"
    """Where the hardness of a negative comes from: self (the cosines of the trained model, as in the paper), ema (the
    cosines of an exponential moving average of its weights) or stored (the cosines of loss.stored_embeddings);
    docs/contrastive_step.md states the costs."""
    stored_embeddings: str | None = None
    """Embeddings of the training inputs by another model: a .npy file with a file of ids beside it, a Parquet file, or
    a folder of such files, as made by tools/embed.py --shards."""
    ema_decay: float = 0.999
    """Decay of the moving average for reward=ema; in the first steps it is (1 + step) / (10 + step) if that is less."""

    def __post_init__(self) -> None:
        """Check names and signs."""
        one_of("loss.negatives", self.negatives, NEGATIVES)
        one_of("loss.directions", self.directions, DIRECTIONS)
        one_of("loss.hardness", self.hardness, HARDNESS)
        one_of("loss.reward", self.reward, ("self", "ema", "stored"))
        missing = "loss.reward=stored needs loss.stored_embeddings, a file or folder made by tools/embed.py --shards"
        require(self.reward != "stored" or self.stored_embeddings is not None, missing)
        unused = f"loss.stored_embeddings={self.stored_embeddings} is not used by loss.reward={self.reward}"
        require(self.reward == "stored" or self.stored_embeddings is None, unused)
        is_margin("loss.mask_margin", self.mask_margin)
        require(0 <= self.ema_decay < 1, f"loss.ema_decay={self.ema_decay} must be at least 0 and below 1")
        dims = self.matryoshka_dims
        ok = dims == sorted(set(dims)) and min(dims, default=1) >= 1
        require(ok, f"loss.matryoshka_dims={dims} must be rising lengths of at least 1")
        for name in ("temperature", "temperature_start"):
            value = getattr(self, name)
            ok = value is None or 0 < value < math.inf
            require(ok, f"loss.{name}={value} must be positive")
        at_least(self, "loss", 0, ("alpha", "temperature_warmup_steps", "alpha_warmup_steps"))


def is_margin(key: str, value: float | None) -> None:
    """Raise a UserError unless a value can be a margin of cosines."""
    ok = value is None or value >= -2  # the smallest difference of two cosines; this is false for nan
    require(ok, f"{key}={value} must be a difference of cosines, or .inf to mask nothing")

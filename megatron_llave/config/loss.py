"""The section `loss` of the configuration."""

import math
from dataclasses import dataclass, field

from megatron_llave.errors import at_least, one_of, require

HARDNESS = ("in_batch", "hard_negatives", "all")
DIRECTIONS = ("symmetric", "query_to_target")
NEGATIVES = ("global_batch", "micro_batch", "own_micro_batch", "own")
WHOLE_STEP = ("global_batch", "own")
"""The values of loss.negatives with which the loss of a pair does not depend on the micro batch that it is in."""
OBJECTIVES = ("contrastive", "cosent")
SOFT_LABELS = ("scores", "stored")
SOFT_LABEL_LOSSES = ("cross_entropy", "symmetric_kl")


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
    temperature_learning: str = "none"
    """Whether the temperature is learned after its warmup, from the temperature of the configuration on: none, one (one
    for all subsets) or subset (one for each)."""
    temperature_learning_rate: float = 1e-3
    """Learning rate of the logarithm of the temperature, by Adam with the betas and epsilon of `optimizer`; it is
    constant."""
    temperature_bounds: list[float] = field(default_factory=lambda: [0.01, 1.0])
    """Lowest and highest learned temperature."""
    alpha: float = 9.0
    """Hardness weight of the negatives; 0 is plain InfoNCE."""
    alpha_warmup_steps: int = 0
    """Number of steps over which alpha rises linearly from 0."""
    negatives: str = "global_batch"
    """Negatives of a pair: global_batch (every other pair of the step, with any micro-batch size; costs a second
    forward pass when a rank has several micro batches), micro_batch (its micro batch on all data-parallel ranks, as in
    the official LLaVE repository), own_micro_batch (its micro batch on its own rank, the baseline of the paper's
    ablation) or own (only its own hard negatives, the rule of Qwen3-VL-Embedding for classification; only from query to
    target)."""
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
    """Embeddings of the training inputs by another model, for reward and soft_labels: a .npy file with a file of ids
    beside it, a Parquet file, or a folder of such files, as made by llave embed --shards."""
    ema_decay: float = 0.999
    """Decay of the moving average for reward=ema; in the first steps it is (1 + step) / (10 + step) if that is less."""

    objective: str = "contrastive"
    """What is trained: contrastive (the loss of the paper) or cosent (the order of the cosines is to be the order of
    the scores of the data, over all pairs that loss.negatives compares; of the other keys it takes the temperature and
    matryoshka_dims)."""
    soft_labels: str | None = None
    """Further loss against soft labels: scores (those of the data, for the targets and hard negatives of a pair),
    stored (the cosines of loss.stored_embeddings) or null (none). A pair without scores adds nothing to it."""
    soft_label_loss: str = "cross_entropy"
    """How the model's softmax over a pair's targets and hard negatives is compared with that of the soft labels:
    cross_entropy (as in Qwen3-VL-Embedding) or symmetric_kl (half the sum of both Kullback-Leibler divergences, as in
    UniME-V2)."""
    soft_label_weight: float = 1.0
    """Factor of the loss against soft labels, which like the contrastive loss is a mean over all pairs."""
    contrastive_weight: float = 1.0
    """Factor of the contrastive loss where there are soft labels; 0 trains only on the soft labels."""
    soft_label_temperature: float = 1.0
    """Temperature by which the scores of the soft labels are divided; cosines need a lower one than the default."""
    soft_label_student_temperature: float | None = None
    """Temperature by which the model's cosines are divided for the soft labels; null: that of the contrastive loss."""

    def __post_init__(self) -> None:
        """Check names and signs."""
        one_of("loss.negatives", self.negatives, NEGATIVES)
        one_of("loss.directions", self.directions, DIRECTIONS)
        one_of("loss.hardness", self.hardness, HARDNESS)
        one_of("loss.reward", self.reward, ("self", "ema", "stored"))
        is_margin("loss.mask_margin", self.mask_margin)
        one_of("loss.objective", self.objective, OBJECTIVES)
        if self.soft_labels is not None:
            one_of("loss.soft_labels", self.soft_labels, SOFT_LABELS)
        one_of("loss.soft_label_loss", self.soft_label_loss, SOFT_LABEL_LOSSES)
        require(0 <= self.ema_decay < 1, f"loss.ema_decay={self.ema_decay} must be at least 0 and below 1")
        dims = self.matryoshka_dims
        ok = dims == sorted(set(dims)) and min(dims, default=1) >= 1
        require(ok, f"loss.matryoshka_dims={dims} must be rising lengths of at least 1")
        self._check_soft_labels()
        temperatures = ("temperature", "temperature_start", "soft_label_temperature", "soft_label_student_temperature")
        for name in temperatures:
            value = getattr(self, name)
            ok = value is None or 0 < value < math.inf
            require(ok, f"loss.{name}={value} must be positive")
        at_least(self, "loss", 0, ("alpha", "temperature_warmup_steps", "alpha_warmup_steps"))
        self._check_learned_temperature()

    @property
    def weighs_hardness(self) -> bool:
        """Whether the loss depends on the hardness of negatives, at the end of a warmup."""
        weighs = self.objective == "contrastive" and self.alpha > 0 and self.contrastive_weight > 0
        return weighs and not (self.negatives == "own" and self.hardness == "in_batch")

    @property
    def has_reward_pass(self) -> bool:
        """Whether the reward model embeds all micro batches of a step before the trained model does."""
        return self.reward == "ema" and self.objective == "contrastive"

    def takes_one_pass(self, num_micro_batches: int) -> bool:
        """Whether the loss of each micro batch is part of the schedule, without an embed pass before it."""
        return self.negatives not in WHOLE_STEP or num_micro_batches == 1

    def _check_learned_temperature(self) -> None:
        one_of("loss.temperature_learning", self.temperature_learning, ("none", "one", "subset"))
        bounds, rate = self.temperature_bounds, self.temperature_learning_rate
        ok = len(bounds) == 2 and 0 < bounds[0] < bounds[1] < math.inf
        require(ok, f"loss.temperature_bounds={bounds} must be [lowest, highest], both positive")
        require(0 < rate < math.inf, f"loss.temperature_learning_rate={rate} must be positive")

    def _check_soft_labels(self) -> None:
        """Refuse a weight that weighs nothing, and weights that leave nothing to train."""
        at_least(self, "loss", 0, ("contrastive_weight",))
        ok = 0 < self.soft_label_weight < math.inf
        require(ok, f"loss.soft_label_weight={self.soft_label_weight} must be positive; soft_labels=null has none")
        ok = self.contrastive_weight == 1 or self.soft_labels is not None
        require(ok, f"loss.contrastive_weight={self.contrastive_weight} is for a loss with loss.soft_labels; use 1")
        ok = self.objective != "cosent" or (self.negatives != "own" and self.soft_labels is None)
        require(
            ok, "loss.objective=cosent has no negatives and no soft labels: leave out negatives=own and soft_labels"
        )


def is_margin(key: str, value: float | None) -> None:
    """Raise a UserError unless a value can be a margin of cosines."""
    ok = value is None or value >= -2  # the smallest difference of two cosines; this is false for nan
    require(ok, f"{key}={value} must be a difference of cosines, or .inf to mask nothing")

"""The section `optimizer` of the configuration."""

import math
from dataclasses import dataclass, field

from megatron_llave.config.model import PARTS
from megatron_llave.errors import at_least, one_of, require


@dataclass
class OptimizerConfig:
    """AdamW in megatron-core's distributed optimizer, with a cosine schedule."""

    learning_rate: float = 1e-5
    """Peak learning rate, reached at the end of the warmup."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Number of steps of linear warmup from 0."""
    warmup_fraction: float = 0.0
    """Length of the warmup as a fraction of the run's steps, used if warmup_steps is 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices. Vectors (biases and norms) are not decayed."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.999
    """Decay rate of the second moment."""
    epsilon: float = 1e-8
    """Constant that is added to the square root of the second moment."""
    clip_gradient: float = 1.0
    """Maximum norm of the global gradient; 0 turns clipping off."""
    moments: str = "fp32"
    """Number format of both moments: fp32 or bf16, which takes half of their memory. bf16 needs Transformer Engine and
    model.precision=bf16 or fp8; the weights that are updated stay float32."""
    offload_fraction: float = 0.0
    """Share of the optimizer's float32 weights and moments that lies in the memory of the host, whose CPU updates them,
    in whole parameters. It needs a GPU, Transformer Engine, and model.precision=bf16 or fp8."""
    offload_overlap: bool = False
    """Copy and update what is offloaded parameter by parameter, so that copies and updates go on at the same time."""
    part_learning_rates: dict[str, float] = field(default_factory=dict)
    """Peak learning rates of vision, projector or language where they differ from learning_rate. A rate of 0 does not
    save the gradient's computation; model.freeze does."""
    part_start_steps: dict[str, int] = field(default_factory=dict)
    """First step (counted from 0) at which vision, projector or language is trained. Before it the learning rate of
    that part is 0, but its gradient counts in the norm that is clipped."""
    vision_layer_decay: float = 1.0
    """Factor of the vision encoder's learning rate for each of its layers that lies above: its last layer has the rate
    of the part, the one before it this factor of that, the embeddings of the patches this factor to the power of the
    number of layers. 1: all have the same rate."""

    def __post_init__(self) -> None:
        """Check ranges."""
        names = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "epsilon", "clip_gradient")
        at_least(self, "optimizer", 0, names)
        rates = f"optimizer.min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}"
        require(self.min_learning_rate <= self.learning_rate, rates)
        require(0 <= self.warmup_fraction <= 1, f"optimizer.warmup_fraction={self.warmup_fraction} must be in 0 to 1")
        one_of("optimizer.moments", self.moments, ("fp32", "bf16"))
        share = f"optimizer.offload_fraction={self.offload_fraction}"
        require(0 <= self.offload_fraction <= 1, f"{share} must be in 0 to 1")
        ok = self.offload_fraction == 0 or self.moments == "fp32"
        require(ok, f"{share} needs optimizer.moments=fp32: what the host updates is float32")
        ok = self.offload_fraction > 0 or not self.offload_overlap
        require(ok, f"optimizer.offload_overlap=true has nothing to overlap: {share}")
        decay = self.vision_layer_decay
        require(0 < decay <= 1, f"optimizer.vision_layer_decay={decay} must be above 0 and at most 1")
        for part, rate in self.part_learning_rates.items():
            one_of("optimizer.part_learning_rates", part, PARTS)
            require(0 <= rate < math.inf, f"optimizer.part_learning_rates.{part}={rate} must be at least 0")
        for part, step in self.part_start_steps.items():
            one_of("optimizer.part_start_steps", part, PARTS)
            require(step >= 0, f"optimizer.part_start_steps.{part}={step} must be at least 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1")

"""The section `lora` of the configuration."""

import math
from dataclasses import dataclass, field

from megatron_llave.config.model import PARTS
from megatron_llave.errors import at_least, one_of, require

INITS = ("kaiming", "gaussian")


@dataclass
class LoraConfig:
    """LoRA (arXiv 2106.09685): small adapters are trained beside frozen weights, which checkpoint.init names."""

    rank: int = 0
    """Rank r of the adapters; 0: none, and the weights themselves are trained. Otherwise only adapters are trained:
    each is A [r, inputs] and B [outputs, r] beside a linear layer."""
    alpha: float = 32.0
    """The output of the adapters is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability with which a channel of the input of A is set to 0 in training."""
    targets: list[str] = field(default_factory=lambda: ["language"])
    """Which linear layers have adapters: a part (language, projector, vision) for all of its layers; or a layer's name
    in Hugging Face folders, such as q_proj or down_proj of the decoder, or vision.q_proj of another part. Embeddings
    of tokens and of patches have none."""
    init: str = "kaiming"
    """Initial values of A: kaiming (uniform within 1 / sqrt(inputs), the default of PEFT) or gaussian (normal with
    standard deviation 1 / rank). B begins at 0, so that the first step has the weights of the base."""
    base: str | None = None
    """Folder of the frozen weights, where checkpoint.init has adapters whose base has been moved; null: where it was
    when they were trained. Other weights are refused."""
    save_base: bool = False
    """Whether checkpoints hold the frozen weights too. Otherwise they hold the adapters, where the base was and a hash
    of it, and a run that resumes loads the base from checkpoint.init again."""

    def __post_init__(self) -> None:
        """Check ranges and names; which layers there are depends on the model."""
        at_least(self, "lora", 0, ("rank",))
        require(0 < self.alpha < math.inf, f"lora.alpha={self.alpha} must be a finite number above 0")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must be at least 0 and below 1")
        one_of("lora.init", self.init, INITS)
        require(bool(self.targets), "lora.targets=[] gives no layer an adapter; name parts or layers")
        require(len(set(self.targets)) == len(self.targets), f"lora.targets={self.targets} names a layer twice")

    @property
    def leaves_out_base(self) -> bool:
        """Whether checkpoints hold adapters without the weights that they are for."""
        return self.rank > 0 and not self.save_base

    @property
    def parts(self) -> set[str]:
        """Parts of the model that have adapters."""
        return {part_of_target(target) for target in self.targets} if self.rank else set()

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / self.rank


def part_of_target(target: str) -> str:
    """Return the part of the model that one of lora.targets lies in."""
    part = target.partition(".")[0]
    return part if part in PARTS else "language"

"""The one configuration tree: RunConfig, a dataclass per section, and what a section's own values must satisfy.

config_file.py reads it from YAML and the command line, config_checks.py looks at the sections together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_llave.errors import ConfigError

PARTS = ("vision", "projector", "language")
HARDNESS = ("in_batch", "hard_negatives", "all")
DIRECTIONS = ("symmetric", "query_to_target")


def require(ok: bool, message: str) -> None:
    """Raise ConfigError(message) unless `ok`."""
    if not ok:
        raise ConfigError(message)


def _at_least(section: Any, prefix: str, lowest: float, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(section, name)
        ok = value is None or (math.isfinite(value) and value >= lowest)
        require(ok, f"{prefix}.{name}={value} must be a number of at least {lowest}")


def _is_margin(key: str, value: float | None) -> None:
    ok = value is None or value >= -2  # the least difference of two cosines; of nan this is false
    require(ok, f"{key}={value} must be a difference of cosines, or .inf to mask nothing")


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the key unless its value is among the allowed ones."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(allowed)}")


@dataclass
class VisionConfig:
    """SigLIP vision tower."""

    hidden_size: int = 0
    """Width of the tower."""
    num_layers: int = 0
    """Layers that are run; for so400m 26 of the 27 pretrained ones."""
    num_heads: int = 0
    """Attention heads; divisible by parallel.tensor."""
    ffn_hidden_size: int = 0
    """Width of the tower's MLP."""
    image_size: int = 0
    """Side of one square tile, pixels."""
    patch_size: int = 14
    """Side of one patch, pixels. A rest of image_size / patch_size is not seen by the convolution."""

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass
class LanguageConfig:
    """Qwen2 decoder up to its final norm."""

    hidden_size: int = 0
    """Width of the decoder, and size of the embedding."""
    num_layers: int = 0
    """Decoder layers over all pipeline stages."""
    num_heads: int = 0
    """Query heads; divisible by parallel.tensor."""
    num_kv_heads: int = 0
    """Key/value heads (grouped-query attention); divisible by parallel.tensor."""
    ffn_hidden_size: int = 0
    """Width of the gated MLP."""
    vocab_size: int = 0
    """Token ids the embedding has rows for, before padding for tensor parallel."""
    rope_theta: float = 1000000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Epsilon of the RMS norms."""


@dataclass
class ModelConfig:
    """The whole embedder."""

    preset: str | None = None
    """Sizes to start from: tiny, 0.5b, 2b or 7b (presets.py); keys given beside it win."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Vision tower."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Decoder."""
    image_grids: list[list[int]] = field(default_factory=list)
    """Anyres tile grids [columns, rows] to choose from, the first of equals wins; empty: one squashed tile."""
    anyres_max_tiles: int | None = 9
    """A picture's feature map of more than 1.21 times this many tiles is interpolated down to them (the 9 of
    anyres_max_9; never happens with grids up to 2x2); null: every patch is kept."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: any of vision, projector, language. image_newline goes with the projector."""
    kernels: str = "local"
    """Layer implementation: local (torch) or transformer_engine."""
    precision: str = "fp32"
    """Parameters and activations: fp32 or bf16. Gradients, optimizer and loss are float32 in both."""
    dropout: float = 0.0
    """Share of the decoder's hidden channels set to 0 in training, after the embedding and after every sublayer."""

    def __post_init__(self) -> None:
        """Check what can be said without the other sections."""
        for part in self.freeze:
            one_of("model.freeze", part, PARTS)
        one_of("model.kernels", self.kernels, ("local", "transformer_engine"))
        one_of("model.precision", self.precision, ("fp32", "bf16"))
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout} must be at least 0 and below 1")
        for grid in self.image_grids:
            ok = len(grid) == 2 and min(grid) >= 1
            require(ok, f"model.image_grids: {grid} is not a pair of [columns, rows], both at least 1")
        _at_least(self, "model", 1, ("anyres_max_tiles",))


@dataclass
class ParallelConfig:
    """How the processes are laid out; data parallel is what is left over."""

    tensor: int = 1
    """Tensor-parallel ranks: each layer's matrices are split over them."""
    pipeline: int = 1
    """Pipeline stages: the decoder's layers are split over them; tower and projector are on the first."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallel: norms and residuals split over the tensor-parallel ranks."""
    context: int = 1
    """Context-parallel ranks: each sequence split over them."""
    first_stage_layers: int | None = None
    """Decoder layers on the first pipeline stage, fewer than elsewhere since the tower is there too; null: even."""
    timeout_seconds: int = 600
    """A collective that waits longer than this ends the run, in seconds."""

    def __post_init__(self) -> None:
        """Every size is at least 1."""
        _at_least(self, "parallel", 1, ("tensor", "pipeline", "virtual_pipeline", "context", "timeout_seconds"))


@dataclass
class SubsetConfig:
    """One subset of the training mixture."""

    weight: float | None = None
    """Share of the batches this subset gets, relative to the others; null: its pairs to the power data.size_power."""
    start_step: int = 0
    """First step (from 0) at which the subset is drawn: a curriculum for models trained from scratch."""
    mask_same_target: bool | None = None
    """loss.mask_same_target in this subset's steps; null: as there."""
    mask_margin: float | None = None
    """loss.mask_margin in this subset's steps, .inf to mask nothing; null: as there."""


@dataclass
class DataConfig:
    """Training pairs."""

    path: str = ""
    """Folder of WebDataset shards with its index.json (tools/prepare_data.py makes one); or where such a folder is on
    the network: http(s)://HOST/FOLDER, or pipe:COMMAND with {file} in it: pipe:aws s3 cp s3://bucket/pairs/{file} -"""
    cache: str | None = None
    """Local folder for copies of shards from the network; null: one in the system's temporary folder."""
    cache_gb: float = 200.0
    """Gigabytes of copies to keep, per node."""
    retries: int = 5
    """Further attempts when the network fails, after 1, 2, 4, ... seconds."""
    workers: int = 2
    """Processes per reading rank that decode steps ahead; 0: decode in the training process."""
    tokenizer: str | None = None
    """SentencePiece .model or Hugging Face tokenizer.json; null: that of the checkpoint the run starts from, else
    tokenizer.model or tokenizer.json in data.path."""
    prompt: str = "qwen"
    """Prompt template: qwen (the released one) or plain (text and end of sequence)."""
    max_length: int = 4096
    """Longest sequence in tokens; longer text is cut before the template's tail, never the pooled token."""
    image_token_without_image: str = "blank"
    """An image placeholder in a text that has no image, prompt qwen: blank (a tile of zeros, as released, which the
    released weights were trained with) or remove."""
    hard_negatives: int = 0
    """Most hard negatives of a pair that are used, the first in its list; queries see those of all pairs that
    they are compared with."""
    subsets: dict[str, SubsetConfig] = field(default_factory=dict)
    """Mixture by subset name; empty: every subset of the index."""
    size_power: float = 1.0
    """Weight of subsets without one of their own: pairs ** size_power. 1: by size, a pair once per epoch; 0: equal."""
    sub_batches: int = 1
    """Parts of a step's global batch, each of one subset. 1: all negatives are of the pair's own kind."""
    too_long: str = "cut"
    """A pair with a text beyond data.max_length: cut the text, or skip the pair as a bad one."""
    max_image_pixels: int = 89_000_000
    """Larger pictures (width x height) are not decoded: their pairs are bad."""
    max_bad_fraction: float = 0.01
    """Training stops when more of a rank's pairs than this are bad (damaged, missing, empty, too large); fewer are left
    out, counted and logged. The first 1000 pairs count as a whole: 0.01 allows 10 of them."""

    def __post_init__(self) -> None:
        """Check names and sizes."""
        one_of("data.prompt", self.prompt, ("qwen", "plain"))
        one_of("data.image_token_without_image", self.image_token_without_image, ("blank", "remove"))
        require(self.max_length >= 8, f"data.max_length={self.max_length} must be at least 8 tokens")
        one_of("data.too_long", self.too_long, ("cut", "skip"))
        _at_least(self, "data", 0, ("hard_negatives", "cache_gb", "retries", "workers", "size_power"))
        _at_least(self, "data", 1, ("sub_batches", "max_image_pixels"))
        allowed = 0 <= self.max_bad_fraction <= 1
        require(allowed, f"data.max_bad_fraction={self.max_bad_fraction} must be from 0 to 1")
        for name, subset in self.subsets.items():
            ok = subset.weight is None or (math.isfinite(subset.weight) and subset.weight > 0)
            require(ok, f"data.subsets.{name}.weight={subset.weight} must be positive")
            _at_least(subset, f"data.subsets.{name}", 0, ("start_step",))
            _is_margin(f"data.subsets.{name}.mask_margin", subset.mask_margin)


@dataclass
class LossConfig:
    """Hardness-weighted contrastive loss (paper section 3.2)."""

    temperature: float = 0.02
    """Divisor of the cosine similarities, tau."""
    temperature_start: float | None = None
    """Temperature at step 0, lowered geometrically to `temperature`; null: no warmup.

    Random weights collapse to one point under 0.02 from the first step on."""
    temperature_warmup_steps: int = 0
    """Steps the temperature warmup takes."""
    alpha: float = 9.0
    """Hardness weight of the negatives; 0 is plain InfoNCE."""
    alpha_warmup_steps: int = 0
    """Steps over which alpha rises linearly from 0."""
    negatives: str = "global_batch"
    """Negatives of a pair: global_batch (every other pair of the step, at any micro-batch size; costs one more forward
    when a rank has several micro batches) or micro_batch (its micro batch on all data-parallel ranks, as released)."""
    mask_same_target: bool = False
    """Pairs with equal target ids or equal query ids are not each other's negatives, in neither direction."""
    mask_margin: float | None = None
    """A negative whose cosine exceeds the positive's by more than this is taken for a false one; null: none is."""
    hardness: str = "all"
    """Negatives that are weighted by their hardness: in_batch, hard_negatives (those that data.hard_negatives adds) or
    all; the others count as in plain InfoNCE."""
    directions: str = "symmetric"
    """Compare symmetric (query to target and back, as in the paper) or query_to_target alone."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """The loss is the mean over prefixes of the embedding of these lengths, each renormalised; empty: all of it."""
    reward: str = "self"
    """Whose cosines are the hardness: self (the model's own, as in the paper) or ema (those of an exponential moving
    average of its weights; docs/contrastive_step.md says what that costs)."""
    ema_decay: float = 0.999
    """Share of the average that a step keeps, for reward ema; less in the first steps, where it is
    (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        """Check names and signs."""
        one_of("loss.negatives", self.negatives, ("global_batch", "micro_batch"))
        one_of("loss.directions", self.directions, DIRECTIONS)
        one_of("loss.hardness", self.hardness, HARDNESS)
        one_of("loss.reward", self.reward, ("self", "ema"))
        _is_margin("loss.mask_margin", self.mask_margin)
        require(0 <= self.ema_decay < 1, f"loss.ema_decay={self.ema_decay} must be at least 0 and below 1")
        dims = self.matryoshka_dims
        ok = dims == sorted(set(dims)) and min(dims, default=1) >= 1
        require(ok, f"loss.matryoshka_dims={dims} must be rising lengths of at least 1")
        for name in ("temperature", "temperature_start"):
            value = getattr(self, name)
            ok = value is None or 0 < value < math.inf
            require(ok, f"loss.{name}={value} must be positive")
        _at_least(self, "loss", 0, ("alpha", "temperature_warmup_steps", "alpha_warmup_steps"))


@dataclass
class OptimizerConfig:
    """AdamW through megatron-core's distributed optimizer, cosine schedule."""

    learning_rate: float = 1e-5
    """Highest learning rate, reached after the warmup."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (biases, norms) have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_gradient: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        """Check ranges."""
        names = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "epsilon", "clip_gradient")
        _at_least(self, "optimizer", 0, names)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1")


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = 0
    """Optimizer steps of the run."""
    global_batch_size: int = 256
    """Pairs per step over all data-parallel ranks."""
    micro_batch_size: int | None = None
    """Pairs per forward pass of one data-parallel rank; null: the whole step at once."""
    seed: int = 0
    """Seeds weights and data order; the same at every parallel layout."""
    output: str = "runs/default"
    """Folder of the run: config.yaml, log.jsonl, checkpoints/."""

    def __post_init__(self) -> None:
        """Check sizes."""
        _at_least(self, "train", 2, ("global_batch_size",))  # one pair has no negative
        _at_least(self, "train", 1, ("micro_batch_size",))
        _at_least(self, "train", 0, ("steps", "seed"))


@dataclass
class CheckpointConfig:
    """Saving, and what the run starts from."""

    init: str | None = None
    """Folder whose weights the run starts from: a checkpoint (tools/convert_hf.py import makes one), a run, or a
    Hugging Face folder; null: random weights. Sizes that `model` does not give come from there, and the vocabulary's
    always; others that contradict are refused."""
    interval: int = 0
    """Steps between checkpoints; 0: only at the end. The last step is always saved."""

    def __post_init__(self) -> None:
        """Check the range."""
        _at_least(self, "checkpoint", 0, ("interval",))


@dataclass
class LogConfig:
    """Progress."""

    interval: int = 10
    """Steps between progress lines; every step is in log.jsonl. 0: no lines."""
    histogram_interval: int = 100
    """Steps between histograms of the similarities in log.jsonl; 0: none."""

    def __post_init__(self) -> None:
        """Check the range."""
        _at_least(self, "log", 0, ("interval", "histogram_interval"))


@dataclass
class EvaluateConfig:
    """Embedding for evaluation."""

    tokens_per_batch: int = 8192
    """Tokens packed into one forward pass."""

    def __post_init__(self) -> None:
        """Check the range."""
        _at_least(self, "evaluate", 1, ("tokens_per_batch",))


@dataclass
class RunConfig:
    """Everything a run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes, precision, frozen parts."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the processes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pairs and tokenizer."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Contrastive loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    log: LogConfig = field(default_factory=LogConfig)
    """Progress."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""


def loss_of_subset(cfg: RunConfig, subset: str) -> LossConfig:
    """The loss of a step drawn from `subset`: `loss`, with what data.subsets says otherwise."""
    own = cfg.data.subsets.get(subset, SubsetConfig())
    given = {"mask_same_target": own.mask_same_target, "mask_margin": own.mask_margin}
    return replace(cfg.loss, **{name: value for name, value in given.items() if value is not None})

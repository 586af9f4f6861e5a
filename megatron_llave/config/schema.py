"""The one configuration tree: RunConfig, a dataclass per section, and what a section's own values must satisfy.

model.py has the section `model`, load.py reads the tree from YAML and the command line, checks.py
looks at the sections together.
"""

import math
from dataclasses import dataclass, field, replace

from megatron_llave.config.model import PARTS, ModelConfig
from megatron_llave.errors import at_least, one_of, require

HARDNESS = ("in_batch", "hard_negatives", "all")
DIRECTIONS = ("symmetric", "query_to_target")
NEGATIVES = ("global_batch", "micro_batch", "own_micro_batch")


def _is_margin(key: str, value: float | None) -> None:
    ok = value is None or value >= -2  # the least difference of two cosines; of nan this is false
    require(ok, f"{key}={value} must be a difference of cosines, or .inf to mask nothing")


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
    overlap: bool = False
    """Sum gradients over the data-parallel ranks while the backward goes on, and gather the updated weights while the
    next forward does."""
    timeout_seconds: int = 600
    """A step without any progress for this long ends the run, and so does a collective that waits longer; seconds."""

    def __post_init__(self) -> None:
        """Every size is at least 1."""
        at_least(self, "parallel", 1, ("tensor", "pipeline", "virtual_pipeline", "context", "timeout_seconds"))


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
    video_newline: str = "one_token"
    """Where image_newline stands among a video's tokens: one_token (after the last), grid (after each row of each
    frame), frame (after each frame) or no_token: mm_newline_position of the released configuration."""
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
        one_of("data.video_newline", self.video_newline, ("one_token", "grid", "frame", "no_token"))
        one_of("data.too_long", self.too_long, ("cut", "skip"))
        at_least(self, "data", 0, ("hard_negatives", "cache_gb", "retries", "workers", "size_power"))
        at_least(self, "data", 1, ("sub_batches", "max_image_pixels"))
        allowed = 0 <= self.max_bad_fraction <= 1
        require(allowed, f"data.max_bad_fraction={self.max_bad_fraction} must be from 0 to 1")
        for name, subset in self.subsets.items():
            ok = subset.weight is None or (math.isfinite(subset.weight) and subset.weight > 0)
            require(ok, f"data.subsets.{name}.weight={subset.weight} must be positive")
            at_least(subset, f"data.subsets.{name}", 0, ("start_step",))
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
    when a rank has several micro batches), micro_batch (its micro batch on all data-parallel ranks, as released) or
    own_micro_batch (its micro batch on its own rank alone: the paper's ablation, what gathering is compared with)."""
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
        one_of("loss.negatives", self.negatives, NEGATIVES)
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
        at_least(self, "loss", 0, ("alpha", "temperature_warmup_steps", "alpha_warmup_steps"))


@dataclass
class OptimizerConfig:
    """AdamW through megatron-core's distributed optimizer, cosine schedule."""

    learning_rate: float = 1e-5
    """Highest learning rate, reached after the warmup."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warmup from 0."""
    warmup_fraction: float = 0.0
    """The same as a share of the run's steps, where warmup_steps is 0."""
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
    part_learning_rates: dict[str, float] = field(default_factory=dict)
    """Highest learning rate of vision, projector or language, where it is not learning_rate. 0 is not frozen: the
    gradient is still computed; see model.freeze."""
    part_start_steps: dict[str, int] = field(default_factory=dict)
    """First step (from 0) in which vision, projector or language is trained: before it its learning rate is 0, though
    its gradient counts in the norm that is clipped."""

    def __post_init__(self) -> None:
        """Check ranges."""
        names = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "epsilon", "clip_gradient")
        at_least(self, "optimizer", 0, names)
        require(0 <= self.warmup_fraction <= 1, f"optimizer.warmup_fraction={self.warmup_fraction} must be in 0 to 1")
        for part, rate in self.part_learning_rates.items():
            one_of("optimizer.part_learning_rates", part, PARTS)
            require(0 <= rate < math.inf, f"optimizer.part_learning_rates.{part}={rate} must be at least 0")
        for part, step in self.part_start_steps.items():
            one_of("optimizer.part_start_steps", part, PARTS)
            require(step >= 0, f"optimizer.part_start_steps.{part}={step} must be at least 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be at least 0 and below 1")


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = 0
    """Optimizer steps of the run; 0: as many as train.epochs has."""
    epochs: float = 0.0
    """Epochs of the mixture (as many batches as its subsets have pairs for), where train.steps is 0."""
    global_batch_size: int = 256
    """Pairs per step over all data-parallel ranks."""
    micro_batch_size: int | None = None
    """Pairs per forward pass of one data-parallel rank; null: the whole step at once."""
    seed: int = 0
    """Seeds weights and data order; the same at every parallel layout."""
    output: str = "runs/default"
    """Folder of the run: config.yaml, log.jsonl, checkpoints/."""
    time_limit_minutes: float | None = None
    """Save and stop when the process has run this long; null: never."""
    max_bad_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, and which are therefore skipped, before the run stops."""

    def __post_init__(self) -> None:
        """Check sizes."""
        at_least(self, "train", 2, ("global_batch_size",))  # one pair has no negative
        at_least(self, "train", 1, ("micro_batch_size",))
        at_least(self, "train", 0, ("steps", "epochs", "seed", "time_limit_minutes", "max_bad_steps"))


@dataclass
class CheckpointConfig:
    """Saving, and what the run starts from."""

    init: str | None = None
    """Folder whose weights the run starts from: a checkpoint (tools/convert_hf.py import makes one), a run, or a
    Hugging Face folder; null: random weights. Sizes that `model` does not give come from there, and the vocabulary's
    always; others that contradict are refused."""
    interval: int = 0
    """Steps between checkpoints; 0: only at the end. The last step is always saved."""
    resume: str | None = None
    """Go on with a run: auto (from the newest usable checkpoint in train.output, or from the beginning where there is
    none) or a checkpoint's folder; null: begin anew, and refuse a folder that has checkpoints."""
    asynchronous: bool = True
    """Write checkpoints beside the training, from a copy of the weights."""
    keep_last: int = 2
    """Newest checkpoints that are kept; 0: all."""
    keep_every: int = 0
    """Besides, checkpoints at multiples of this many steps are kept for ever; 0: none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, "checkpoint", 0, ("interval", "keep_last", "keep_every"))


@dataclass
class LogConfig:
    """Progress."""

    interval: int = 10
    """Steps between progress lines; every step is in log.jsonl. 0: no lines."""
    histogram_interval: int = 100
    """Steps between histograms of the similarities in log.jsonl; 0: none."""
    tensorboard: bool = False
    """Write the same numbers for TensorBoard into train.output/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; null: none."""
    peak_tflops: float | None = None
    """Dense TFLOP/s of one device at the run's precision, for the model FLOPs utilisation; null: known GPUs' own."""

    def __post_init__(self) -> None:
        """Check the range."""
        at_least(self, "log", 0, ("interval", "histogram_interval"))
        peak = self.peak_tflops
        require(peak is None or peak > 0, f"log.peak_tflops={peak} must be above 0, or null")


@dataclass
class EvaluateConfig:
    """Embedding for evaluation."""

    tokens_per_batch: int = 8192
    """Tokens packed into one forward pass."""
    interval: int = 0
    """Steps between evaluations while training; 0: none."""
    threads: int = 2
    """Threads per process that read and decode the inputs of MMEB ahead."""
    path: str | None = None
    """Folder of the evaluation sets while training: one that tools/prepare_data.py made, or MMEB-eval; null:
    data.path."""
    images: str | None = None
    """Folder that the image paths of MMEB-eval start from; null: evaluate.path."""
    sets: list[str] = field(default_factory=list)
    """Names of the sets to evaluate on while training; empty: all there are."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, "evaluate", 1, ("tokens_per_batch", "threads"))
        at_least(self, "evaluate", 0, ("interval",))


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


def row_multiple(cfg: RunConfig) -> int:
    """Tokens that a packed row's length must be a multiple of: sequence parallel splits it, FP8 works in blocks."""
    blocks = {"mxfp8": 32, "blockwise": 128}
    block = blocks.get(cfg.model.fp8_recipe, 16) if cfg.model.precision == "fp8" else 1
    return block * (cfg.parallel.tensor if cfg.parallel.sequence else 1)

"""The configuration tree: RunConfig, a dataclass per section, and the checks of a section's own values.

model.py has the section `model`, load.py reads the tree from YAML and the command line, and checks.py checks the
sections against each other.
"""

import math
from dataclasses import dataclass, field, replace

from megatron_llave.config.model import PARTS, ModelConfig
from megatron_llave.errors import at_least, one_of, require

HARDNESS = ("in_batch", "hard_negatives", "all")
DIRECTIONS = ("symmetric", "query_to_target")
NEGATIVES = ("global_batch", "micro_batch", "own_micro_batch")
IMAGE_CORRECTIONS = ("exif_rotation", "bit_depth")
VIDEO_NEWLINES = ("one_token", "grid", "frame", "no_token")
PROMPTS = ("qwen", "plain", "vlm2vec_v2", "gme", "qwen3_vl_embedding")


def _is_margin(key: str, value: float | None) -> None:
    ok = value is None or value >= -2  # the smallest difference of two cosines; this is false for nan
    require(ok, f"{key}={value} must be a difference of cosines, or .inf to mask nothing")


@dataclass
class ParallelConfig:
    """The parallel layout. All ranks that the keys below do not use are data parallel."""

    tensor: int = 1
    """Number of tensor-parallel ranks, over which the matrices of each layer are split."""
    pipeline: int = 1
    """Number of pipeline stages, over which the decoder's layers are split. Vision encoder and projector are on the
    first stage."""
    virtual_pipeline: int = 1
    """Number of model chunks per pipeline stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallel: split norms and residuals over the tensor-parallel ranks."""
    context: int = 1
    """Number of context-parallel ranks, over which the tokens of each sequence are split, and the tiles of a row where
    images consist of tiles."""
    first_stage_layers: int | None = None
    """Number of decoder layers on the first pipeline stage; fewer than on the others balance the vision encoder, which
    is on that stage too. null: all stages have the same number."""
    overlap: bool = False
    """Overlap the reduction of the gradients with the backward pass, and the all-gather of the updated weights with the
    next forward pass."""
    timeout_seconds: int = 600
    """The run ends when a step makes no progress, or a collective waits, for longer than this many seconds."""

    def __post_init__(self) -> None:
        """Check that every size is at least 1."""
        at_least(self, "parallel", 1, ("tensor", "pipeline", "virtual_pipeline", "context", "timeout_seconds"))


@dataclass
class SubsetConfig:
    """One subset of the training mixture."""

    weight: float | None = None
    """Share of the batches that this subset gets, relative to the other subsets. null: its number of pairs to the power
    of data.size_power."""
    start_step: int = 0
    """First step (counted from 0) at which the subset is drawn. This makes a curriculum for models that are trained
    from scratch."""
    mask_same_target: bool | None = None
    """Value of loss.mask_same_target in the steps of this subset; null: that of `loss`."""
    mask_margin: float | None = None
    """Value of loss.mask_margin in the steps of this subset, .inf to mask nothing; null: that of `loss`."""


@dataclass
class DataConfig:
    """Training pairs."""

    path: str = ""
    """Folder of WebDataset shards with an index.json, as made by tools/prepare_data.py. On the network:
    http(s)://HOST/FOLDER, or pipe:COMMAND with {file} in the command, such as pipe:aws s3 cp s3://bucket/pairs/{file}
    -"""
    cache: str | None = None
    """Local folder for copies of the shards on the network, in which each user's are private; null: a folder of the
    user in the system's temporary folder."""
    cache_gb: float = 200.0
    """Gigabytes of shard copies that are kept on each node."""
    retries: int = 5
    """Number of further attempts after a network failure; they wait 1, 2, 4, ... seconds."""
    workers: int = 2
    """Number of worker processes that decode coming steps, per rank that reads data; 0: the training process
    decodes."""
    tokenizer: str | None = None
    """SentencePiece .model or Hugging Face tokenizer.json. null: the tokenizer of the checkpoint that the run starts
    from, else the tokenizer.json in data.path, or the tokenizer.model where data.path has no tokenizer.json."""
    prompt: str = "qwen"
    """Prompt template: qwen (that of the released models), plain (text and end-of-sequence token), or for the Qwen-VL
    families that of an embedding model: vlm2vec_v2, gme or qwen3_vl_embedding (docs/qwen_vl.md)."""
    max_length: int = 4096
    """Maximum sequence length in tokens. Longer text is cut before the end of the template, so the pooled token is
    never lost."""
    image_token_without_image: str = "blank"
    """What an image placeholder in a text without an image becomes, in llava_onevision with prompt=qwen: blank (a tile
    of zeros, with which the released weights were trained) or remove."""
    video_newline: str = "one_token"
    """Where image_newline is inserted among the tokens of a video: one_token (after the last token), grid (after each
    row of each frame), frame (after each frame) or no_token. This is mm_newline_position of the official LLaVE
    repository."""
    hard_negatives: int = 0
    """Maximum number of hard negatives that are used per pair, taken from the start of its list. Each query is compared
    with the hard negatives of all pairs that it is compared with."""
    subsets: dict[str, SubsetConfig] = field(default_factory=dict)
    """Mixture: subset name -> its settings. Empty: every subset of the index."""
    size_power: float = 1.0
    """Exponent of the weights of subsets without a weight of their own: pairs ** size_power. 1: weighted by size, so
    that an epoch has each pair once; 0: equal weights."""
    sub_batches: int = 1
    """Number of parts of a global batch, each of which is drawn from one subset. 1: all negatives of a pair are from
    its own subset."""
    too_long: str = "cut"
    """What happens to a pair with a text beyond data.max_length: cut the text, or skip the pair like a bad one."""
    min_pixels: int | None = None
    """Images of the Qwen-VL families with fewer pixels are enlarged; null: the pixels of 4 visual tokens."""
    max_pixels: int | None = None
    """Images of the Qwen-VL families with more pixels are shrunk; null: the pixels of 1280 visual tokens."""
    max_image_pixels: int = 89_000_000
    """Images with more pixels (width x height) than this are not decoded, and their pairs are bad. A side may have at
    most 1,000,000 pixels."""
    image_background: list[int] | None = field(default_factory=lambda: [255, 255, 255])
    """Colour (red, green, blue; 0 to 255) that transparent pixels are blended onto. null: alpha is dropped, as in the
    official LLaVE repository, which shows the colour that is stored under it, often black."""
    image_corrections: list[str] = field(default_factory=lambda: list(IMAGE_CORRECTIONS))
    """What is done beyond the official repository when an image is read: exif_rotation (images are rotated and mirrored
    as their EXIF orientation says) and bit_depth (16-bit grey, 32-bit integers and floats are scaled to 8 bits, as
    docs/data.md says; without it, values above 255 become white)."""
    max_bad_fraction: float = 0.01
    """Training stops when a larger fraction of a rank's pairs is bad (damaged, missing, empty or too large). Fewer bad
    pairs are dropped, counted and logged. The fraction is taken of at least 1000 pairs, so 0.01 always allows 10 of
    them."""

    def __post_init__(self) -> None:
        """Check names and sizes."""
        one_of("data.prompt", self.prompt, PROMPTS)
        one_of("data.image_token_without_image", self.image_token_without_image, ("blank", "remove"))
        require(self.max_length >= 8, f"data.max_length={self.max_length} must be at least 8 tokens")
        one_of("data.video_newline", self.video_newline, VIDEO_NEWLINES)
        one_of("data.too_long", self.too_long, ("cut", "skip"))
        for correction in self.image_corrections:
            one_of("data.image_corrections", correction, IMAGE_CORRECTIONS)
        colour = self.image_background
        ok = colour is None or (len(colour) == 3 and all(0 <= value <= 255 for value in colour))
        require(ok, f"data.image_background={colour} must be null or [red, green, blue], each from 0 to 255")
        at_least(self, "data", 0, ("hard_negatives", "cache_gb", "retries", "workers", "size_power"))
        at_least(self, "data", 1, ("sub_batches", "max_image_pixels", "min_pixels", "max_pixels"))
        ok = None in (self.min_pixels, self.max_pixels) or self.min_pixels <= self.max_pixels
        require(ok, f"data.min_pixels={self.min_pixels} is above data.max_pixels={self.max_pixels}")
        allowed = 0 <= self.max_bad_fraction <= 1
        require(allowed, f"data.max_bad_fraction={self.max_bad_fraction} must be from 0 to 1")
        for name, subset in self.subsets.items():
            ok = subset.weight is None or (math.isfinite(subset.weight) and subset.weight > 0)
            require(ok, f"data.subsets.{name}.weight={subset.weight} must be positive")
            at_least(subset, f"data.subsets.{name}", 0, ("start_step",))
            _is_margin(f"data.subsets.{name}.mask_margin", subset.mask_margin)


EARLIER = {"data": {"image_background": None, "image_corrections": []}}
"""What earlier versions did where a key did not exist yet; a configuration that they saved lacks it."""


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
    """Where the hardness of a negative comes from: self (the cosines of the trained model, as in the paper) or ema (the
    cosines of an exponential moving average of its weights; docs/contrastive_step.md states the cost)."""
    ema_decay: float = 0.999
    """Decay of the moving average for reward=ema; in the first steps it is (1 + step) / (10 + step) if that is less."""

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
    part_learning_rates: dict[str, float] = field(default_factory=dict)
    """Peak learning rates of vision, projector or language where they differ from learning_rate. A rate of 0 does not
    save the gradient's computation; model.freeze does."""
    part_start_steps: dict[str, int] = field(default_factory=dict)
    """First step (counted from 0) at which vision, projector or language is trained. Before it the learning rate of
    that part is 0, but its gradient counts in the norm that is clipped."""

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
    """Number of optimizer steps; 0: as many as train.epochs needs."""
    epochs: float = 0.0
    """Number of epochs, used if train.steps is 0. An epoch has as many batches as the subsets of the mixture have pairs
    for."""
    global_batch_size: int = 256
    """Pairs per step over all data-parallel ranks."""
    micro_batch_size: int | None = None
    """Pairs per forward pass of one data-parallel rank; null: all pairs of the rank's step at once."""
    seed: int = 0
    """Seed of the initial weights and of the data order; both are the same at every parallel layout."""
    output: str = "runs/default"
    """Output directory of the run: config.yaml, log.jsonl, checkpoints/."""
    time_limit_minutes: float | None = None
    """Save and stop when the process has run for this many minutes; null: no limit."""
    max_bad_steps: int = 10
    """Maximum number of consecutive steps with a non-finite loss or gradient; one more ends the run. Each such step is
    skipped."""

    def __post_init__(self) -> None:
        """Check sizes."""
        at_least(self, "train", 2, ("global_batch_size",))  # a single pair has no negative
        at_least(self, "train", 1, ("micro_batch_size",))
        at_least(self, "train", 0, ("steps", "epochs", "seed", "time_limit_minutes", "max_bad_steps"))


@dataclass
class CheckpointConfig:
    """Checkpoints, and the weights that a run starts from."""

    init: str | None = None
    """Folder with the initial weights: a checkpoint (for example from tools/convert_hf.py import), an output directory,
    or a Hugging Face folder; null: random weights. Sizes that `model` does not set are taken from it, the vocabulary
    size always; other contradictions are an error."""
    interval: int = 0
    """Number of steps between checkpoints; 0: only at the end. The last step is always saved."""
    resume: str | None = None
    """Resume a run: auto (from the newest usable checkpoint in train.output, or start if it has none) or the folder of
    a checkpoint. null: start a new run, and refuse an output directory that has checkpoints."""
    asynchronous: bool = True
    """Write checkpoints in a background process from a copy of the weights, while training continues."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept as well, for ever; 0: none."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, "checkpoint", 0, ("interval", "keep_last", "keep_every"))


@dataclass
class LogConfig:
    """Logging."""

    interval: int = 10
    """Number of steps between progress lines; 0: no lines. log.jsonl always has every step."""
    histogram_interval: int = 100
    """Number of steps between histograms of the similarities in log.jsonl; 0: none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into train.output/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project to which the metrics are logged; null: none."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device at the run's precision, for the model FLOPs utilisation; null: looked up for
    known GPUs."""

    def __post_init__(self) -> None:
        """Check the range."""
        at_least(self, "log", 0, ("interval", "histogram_interval"))
        peak = self.peak_tflops
        require(peak is None or peak > 0, f"log.peak_tflops={peak} must be above 0, or null")


@dataclass
class EvaluateConfig:
    """Evaluation, also while training."""

    tokens_per_batch: int = 8192
    """Number of tokens that are packed into one forward pass."""
    interval: int = 0
    """Number of steps between evaluations while training; 0: none."""
    threads: int = 2
    """Threads per process that read and decode the inputs of MMEB ahead of the model."""
    path: str | None = None
    """Folder of the evaluation sets while training: one that tools/prepare_data.py made, or MMEB-eval; null:
    data.path."""
    images: str | None = None
    """Folder that the image paths of MMEB-eval are relative to; null: evaluate.path."""
    sets: list[str] = field(default_factory=list)
    """Names of the evaluation sets that are used while training; empty: all sets in the folder."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, "evaluate", 1, ("tokens_per_batch", "threads"))
        at_least(self, "evaluate", 0, ("interval",))


@dataclass
class RunConfig:
    """The complete configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes, precision, frozen parts."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallel layout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training pairs and tokenizer."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Contrastive loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints and initial weights."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""


def loss_of_subset(cfg: RunConfig, subset: str) -> LossConfig:
    """The loss of a step that is drawn from `subset`: the section `loss`, overridden by data.subsets."""
    settings = cfg.data.subsets.get(subset, SubsetConfig())
    masks = {"mask_same_target": settings.mask_same_target, "mask_margin": settings.mask_margin}
    return replace(cfg.loss, **{name: value for name, value in masks.items() if value is not None})

"""The configuration tree: RunConfig, and the sections that have no file of their own.

Each section checks its own values. model.py, lora.py, data.py, mining.py, loss.py and optimizer.py have the section of
their name, load.py reads the tree from YAML and the command line, and checks.py checks the sections against each other.
"""

from dataclasses import dataclass, field, replace

from megatron_llave.config.data import DataConfig, SubsetConfig
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.mining import MiningConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.optimizer import OptimizerConfig
from megatron_llave.errors import at_least, require


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
    tokens_per_micro_batch: int | None = None
    """Instead of micro_batch_size: the most tokens of a micro batch, so that each step needs the same memory whatever
    its images (docs/contrastive_step.md). A tile of an image counts as the tokens that need as much memory as it does
    in the vision encoder, beside its visual tokens. Only where the loss does not depend on the micro batch of a pair:
    loss.negatives global_batch or own. A pair beyond it is left out like a bad one. null: no budget."""
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
        at_least(self, "train", 1, ("micro_batch_size", "tokens_per_micro_batch"))
        both = f"train.micro_batch_size={self.micro_batch_size} and train.tokens_per_micro_batch"
        ok = None in (self.micro_batch_size, self.tokens_per_micro_batch)
        require(ok, f"{both}={self.tokens_per_micro_batch} exclude each other; set one of them to null")
        at_least(self, "train", 0, ("steps", "epochs", "seed", "time_limit_minutes", "max_bad_steps"))


@dataclass
class CheckpointConfig:
    """Checkpoints, and the weights that a run starts from."""

    init: str | None = None
    """Folder with the initial weights: a checkpoint (for example from llave convert import), an output directory,
    or a Hugging Face folder; or the name of a model on the hub, org/name or org/name@revision, to which the run adds
    the commit; null: random weights. Sizes that `model` does not set are taken from it, the vocabulary
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
    """Number of steps between progress lines, on the terminal and in progress.log; 0: no lines. log.jsonl always has
    every step."""
    histogram_interval: int = 100
    """Number of steps between histograms of the similarities and of the negatives' weights, in log.jsonl and in the
    trackers that have some; 0: none."""
    montage_queries: int = 0
    """Number of queries of each evaluation set that are drawn, at every evaluation while training, beside their best
    candidates and the right one: train.output/montages/step-N.png, which the trackers get too. 0: none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into train.output/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project to which the metrics are logged; null: none."""
    mlflow_experiment: str | None = None
    """MLflow experiment to which the metrics are logged; null: none."""
    mlflow_uri: str | None = None
    """Address of MLflow's server, or of its store; null: where MLflow itself writes, which the variable
    MLFLOW_TRACKING_URI of the environment says."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device at the run's precision, for the model FLOPs utilisation; null: looked up for
    known GPUs."""

    def __post_init__(self) -> None:
        """Check the range."""
        at_least(self, "log", 0, ("interval", "histogram_interval", "montage_queries"))
        ok = self.mlflow_uri is None or self.mlflow_experiment is not None
        require(ok, "log.mlflow_uri is used by nothing without log.mlflow_experiment; set that too, or this to null")
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
    """Folder of the evaluation sets while training: one that llave prepare made, or MMEB-eval; null:
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
    mining: MiningConfig = field(default_factory=MiningConfig)
    """Mining while training."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Contrastive loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints and initial weights."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""


EARLIER = {"data": {"image_background": None, "image_corrections": []}}
"""What earlier versions did where a key did not exist yet; a configuration that they saved lacks it."""


LOSS_OF_SUBSET = ("mask_same_target", "mask_margin", "negatives", "objective", "alpha", "temperature")
"""Keys of `loss` that a subset can override."""


def loss_of_subset(cfg: RunConfig, subset: str) -> LossConfig:
    """The loss of a step that is drawn from `subset`: the section `loss`, overridden by data.subsets."""
    settings = cfg.data.subsets.get(subset, SubsetConfig())
    own = {name: getattr(settings, name) for name in LOSS_OF_SUBSET}
    own = {name: value for name, value in own.items() if value is not None}
    if own.get("objective") == "cosent":  # to which the soft labels and own negatives of other subsets do not apply
        plain = LossConfig()
        own |= {"soft_labels": None, "contrastive_weight": plain.contrastive_weight}
        own |= {"negatives": plain.negatives} if cfg.loss.negatives == "own" and settings.negatives is None else {}
    return replace(cfg.loss, **own)

"""Defines the studies: their variants, and what a variant changes of the base configuration. Nothing is run here.

This is the first step of a study: `plan` lists its runs, queue.py runs them, and findings.py compares them. A variant
that is trained is a list of overrides; a variant that is merged averages the weights of two others.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llave.config.model import PARTS
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.mined_negatives import MANIFEST_FILE, is_complete
from megatron_llave.data.stored_vectors import SUFFIXES
from megatron_llave.errors import require

ALPHAS = (0, 0.5, 1, 2, 5, 9, 12, 15)
"""Hardness weights of the sweep: those of the paper's figure 7, and larger ones."""
MERGES = (0.25, 0.5, 0.75)
"""Shares of the weights of the run with a frozen vision encoder in a merge with the trained one."""
BATCH_FACTORS = (0.25, 0.5, 2.0)
"""Batch sizes of study `negatives`, relative to that of the base configuration."""
SLOW_VISION = 0.1
"""Learning rate of the vision encoder relative to the rest."""
LORA_RATES, ALL_RATES = (1 / 3, 1.0, 3.0), (1 / 10, 1 / 3, 1.0)
"""Learning rates of adapters and of all weights in study `lora`, relative to that of the base configuration."""
GLOBAL_BATCH = "global batch"
UNMINED = "no mining"
UNTRAINED = "before training"
START = "start"


@dataclass(frozen=True)
class Variant:
    """One setting of a study."""

    name: str
    overrides: tuple[str, ...] = ()
    """Overrides section.key=value, which follow those of the base configuration."""
    merge: tuple[tuple[str, float], ...] = ()
    """Variants whose weights are merged, each with its share; empty for a variant that is trained."""
    compared_with: str | None = None
    """Name of the variant that it is compared with; None: the study's reference."""


@dataclass(frozen=True)
class Contrast:
    """A sum and difference of variants with the same seed, for what two of them do not tell."""

    name: str
    terms: tuple[tuple[str, int], ...]
    """Variants, each with the factor of its value."""


@dataclass(frozen=True)
class Study:
    """A question, and the variants that answer it."""

    name: str
    question: str
    reference: str
    """Name of the variant that the others are compared with, seed by seed, unless they name another one."""
    variants: tuple[Variant, ...]
    needs_weights: bool = False
    """Whether its runs must start from trained weights, because random ones would say nothing."""
    contrasts: tuple[Contrast, ...] = ()

    def reference_of(self, variant: str) -> str:
        """Name of the variant that `variant` is compared with."""
        return next((v.compared_with for v in self.variants if v.name == variant), None) or self.reference


@dataclass(frozen=True)
class Run:
    """One variant with one seed, which has a folder of its own."""

    variant: Variant
    seed: int
    start: str | None = None
    """Name of the run whose weights it starts from."""

    @property
    def name(self) -> str:
        """Name of its folder, which the tables use too."""
        return run_name(self.variant.name, self.seed)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs that must be finished before it."""
        merged = tuple(run_name(variant, self.seed) for variant, _ in self.variant.merge)
        return merged + ((self.start,) if self.start else ())


def run_name(variant: str, seed: int) -> str:
    """Folder name of a variant with a seed: `alpha 0.5` and 3 give alpha-0.5-seed3."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', variant.lower()).strip('-')}-seed{seed}"


def negatives(cfg: RunConfig, ranks: int) -> Study:
    """Study of the number of negatives (of the own micro batch, gathered, global batch) and of the batch size."""
    size, total = cfg.train.micro_batch_size, cfg.train.global_batch_size
    require(
        size is not None and 2 <= size < total // ranks and ranks > 1 and total % (size * ranks) == 0,
        f"study negatives: {ranks} data-parallel ranks with train.micro_batch_size={size} of {total} pairs do not tell "
        "its variants apart: set at least 2 ranks, and several micro batches of at least 2 pairs on each",
    )
    titles = {"own_micro_batch": "own micro batch", "micro_batch": "gathered", "global_batch": GLOBAL_BATCH}
    variants = [Variant(title, (f"loss.negatives={key}",)) for key, title in titles.items()]
    for factor in BATCH_FACTORS:
        batch, rest = divmod(total * factor, ranks)
        if rest == 0 and batch >= 1:
            variants += _batch_size(cfg, round(total * factor), ranks, factor)
    return Study("negatives", "What are more negatives worth?", variants[0].name, tuple(variants))


def _batch_size(cfg: RunConfig, batch: int, ranks: int, factor: float) -> list[Variant]:
    """Variants of another batch size with negatives of the global batch, as in the variant they are compared with."""
    share = batch // ranks
    micro = max(size for size in range(1, min(cfg.train.micro_batch_size, share) + 1) if share % size == 0)
    sizes = (f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}", "loss.negatives=global_batch")
    variants = [
        Variant(f"batch {batch}, equal pairs", (*sizes, *_stretched(cfg, 1 / factor)), compared_with=GLOBAL_BATCH)
    ]
    if factor < 1:
        variants.append(
            Variant(f"batch {batch}, equal updates", (*sizes, *_epochs(cfg, factor)), compared_with=GLOBAL_BATCH)
        )
    return variants


def _epochs(cfg: RunConfig, factor: float) -> tuple[str, ...]:
    return () if cfg.train.steps else (f"train.epochs={cfg.train.epochs * factor:g}",)


def _stretched(cfg: RunConfig, factor: float) -> tuple[str, ...]:
    """Overrides of a run with `factor` times as many steps, which scale everything that is counted in steps."""
    counts = {
        "train.steps": cfg.train.steps,
        "optimizer.warmup_steps": cfg.optimizer.warmup_steps,
        "loss.temperature_warmup_steps": cfg.loss.temperature_warmup_steps,
        "loss.alpha_warmup_steps": cfg.loss.alpha_warmup_steps,
    }
    counts |= {f"data.subsets.{name}.start_step": subset.start_step for name, subset in cfg.data.subsets.items()}
    return tuple(f"{key}={round(count * factor)}" for key, count in counts.items() if count)


def hardness(cfg: RunConfig, ranks: int) -> Study:
    """Study of the hardness weight, up to values that are unstable."""
    variants = [Variant(f"alpha {alpha:g}", (f"loss.alpha={alpha:g}",)) for alpha in ALPHAS]
    question = "Does hardness weighting beat plain InfoNCE (alpha 0), and at which alpha?"
    return Study("hardness", question, variants[0].name, tuple(variants))


def hardness_modes(cfg: RunConfig, ranks: int) -> Study:
    """Study of which negatives are weighted, which are masked as likely false ones, and who judges hardness."""
    require(cfg.loss.alpha > 0, "study hardness_modes: loss.alpha=0 weights nothing; set it above 0")
    require(
        cfg.data.hard_negatives > 0,
        "study hardness_modes: data.hard_negatives=0; set it to at least 1, with data that has hard negatives "
        "(docs/data.md; llave prepare openmoji --hard-negatives 2)",
    )
    plain = ("loss.hardness=all", "loss.mask_same_target=false", "loss.mask_margin=null", "loss.reward=self")
    variants = [
        Variant("all negatives weighted", plain),
        Variant("in-batch negatives weighted", (*plain, "loss.hardness=in_batch")),
        Variant("hard negatives weighted", (*plain, "loss.hardness=hard_negatives")),
        Variant("none weighted", (*plain, "loss.alpha=0")),
        Variant("all weighted, equal targets masked", (*plain, "loss.mask_same_target=true")),
        Variant("all weighted, margin 0.1 masked", (*plain, "loss.mask_margin=0.1")),
        Variant("all weighted by the average", (*plain, "loss.reward=ema", "loss.ema_decay=0.99")),
    ]
    question = "Which negatives should be weighted, and by whose judgement?"
    return Study("hardness_modes", question, variants[0].name, tuple(variants))


def reward(cfg: RunConfig, ranks: int) -> Study:
    """Study of who judges hardness: the model itself, its average, and every file of stored embeddings in a folder."""
    stored = cfg.loss.stored_embeddings
    require(
        cfg.loss.reward == "stored" and stored is not None and Path(stored).suffix in SUFFIXES,
        "study reward: set loss.reward=stored and loss.stored_embeddings=FOLDER/FILE.npy (or .parquet); every such "
        f"file in FOLDER is a variant. They are {cfg.loss.reward} and {stored}",
    )
    files = sorted(file for file in Path(stored).parent.glob("*") if file.suffix in SUFFIXES)
    require(Path(stored) in files, f"study reward: loss.stored_embeddings={stored} does not exist")
    twice = [str(file) for file in files if file.with_suffix(".parquet") in files and file.suffix != ".parquet"]
    require(
        not twice, f"study reward: {''.join(twice[:1])} and a .parquet file of this name give one variant; move one"
    )
    variants = [
        Variant("self", ("loss.reward=self", "loss.stored_embeddings=null")),
        Variant("ema", ("loss.reward=ema", "loss.ema_decay=0.99", "loss.stored_embeddings=null")),
    ]
    for file in files:
        variants.append(Variant(f"stored, {file.stem}", (f"loss.stored_embeddings={_quoted(file)}",)))
    question = "Does a separate reward model judge hardness better than the model itself?"
    return Study("reward", question, variants[0].name, tuple(variants))


def mining(cfg: RunConfig, ranks: int) -> Study:
    """Study of mined negatives, hard batches and both, each without and with hardness weighting.

    Every folder of mined negatives beside data.negatives is a variant. Both are data.negatives and data.order.
    """
    folder, alpha = cfg.data.negatives, cfg.loss.alpha
    require(
        folder is not None and (Path(folder) / MANIFEST_FILE).is_file(),
        f"study mining: set data.negatives=FOLDER/NAME to a local folder of llave mine negatives; every such folder in "
        f"FOLDER is a variant. It is {folder}",
    )
    require(cfg.data.order is not None, "study mining: set data.order to an order (llave mine batches)")
    require(alpha > 0, "study mining: loss.alpha=0 weights nothing; set it above 0, and each variant runs with 0 too")
    without, ordered = "data.negatives=null", f"data.order={_quoted(cfg.data.order)}"
    folders = sorted(path.parent for path in Path(folder).parent.glob(f"*/{MANIFEST_FILE}"))
    unfinished = [str(one) for one in folders if not is_complete(one)]
    require(not unfinished, f"study mining: the mining of {''.join(unfinished[:1])} has not ended; end it, or move it")
    kinds = {UNMINED: (without, "data.order=null")}
    kinds |= {f"{one.name} negatives": (f"data.negatives={_quoted(one)}", "data.order=null") for one in folders}
    kinds |= {"hard batches": (without, ordered)}
    kinds |= {f"hard batches, {Path(folder).name} negatives": (f"data.negatives={_quoted(folder)}", ordered)}
    variants, contrasts = [], []
    for kind, overrides in kinds.items():
        plain, weighted = (f"{kind}, alpha {value:g}" for value in (0, alpha))
        for name, value in ((plain, 0), (weighted, alpha)):
            against = None if kind == UNMINED else f"{UNMINED}, alpha {value:g}"
            variants.append(Variant(name, (*overrides, f"loss.alpha={value:g}"), compared_with=against))
        if kind != UNMINED:
            gain = ((weighted, 1), (plain, -1))
            contrasts.append(Contrast(f"weighting with {kind}", gain))
            beyond = ((f"{UNMINED}, alpha {alpha:g}", -1), (f"{UNMINED}, alpha 0", 1))
            contrasts.append(Contrast(f"weighting with {kind}, minus weighting with {UNMINED}", (*gain, *beyond)))
    question = "What do mined negatives and hard batches bring, and does weighting help more, or less, with them?"
    return Study("mining", question, variants[0].name, tuple(variants), True, tuple(contrasts))


def _quoted(path: str | Path) -> str:
    """A path as an override's value."""
    return json.dumps(str(path), ensure_ascii=False)


def freezing(cfg: RunConfig, ranks: int) -> Study:
    """Study of frozen parts, with three ways between a frozen and a trained vision encoder."""
    steps = cfg.train.steps
    require(steps > 0, "study freezing: train.steps=0; a vision encoder that is trained late needs the number of steps")
    parts = cfg.optimizer.part_learning_rates or cfg.optimizer.part_start_steps
    require(
        not parts,
        f"study freezing: the base configuration has rates or first steps of parts, {parts}; its variants set them",
    )
    slow = SLOW_VISION * cfg.optimizer.learning_rate
    free, frozen = "nothing frozen", "vision frozen"
    variants = [
        Variant(free, ("model.freeze=[]",)),
        Variant(frozen, ("model.freeze=[vision]",)),
        Variant("projector frozen", ("model.freeze=[projector]",)),
        Variant("vision and projector frozen", ("model.freeze=[vision,projector]",)),
        Variant("vision at a tenth", ("model.freeze=[]", f"optimizer.part_learning_rates.vision={slow:g}")),
        Variant("vision from the middle", ("model.freeze=[]", f"optimizer.part_start_steps.vision={steps // 2}")),
    ]
    for share in MERGES:
        name = f"merged, {round(100 * share)} % of frozen"
        variants.append(Variant(name, merge=((frozen, share), (free, 1 - share))))
    question = "What does a frozen vision encoder cost in distribution, and bring out of distribution?"
    return Study("freezing", question, free, tuple(variants), needs_weights=True)


def lora(cfg: RunConfig, ranks: int) -> Study:
    """Study of LoRA, on the decoder and on all parts that are not frozen, beside all weights, at three rates each."""
    require(cfg.lora.rank > 0, "study lora: lora.rank=0; set the rank of the adapters")
    parts = cfg.optimizer.part_learning_rates
    require(not parts, f"study lora: the base configuration has rates of parts, {parts}; its variants set one rate")
    decay = cfg.optimizer.vision_layer_decay
    require(
        decay == 1, f"study lora: optimizer.vision_layer_decay={decay}, which adapters of the decoder have no use for"
    )
    trained = ",".join(part for part in PARTS if part not in cfg.model.freeze)
    kinds = {
        "all weights": ("lora.rank=0", ALL_RATES),
        "LoRA of the decoder": ("lora.targets=[language]", LORA_RATES),
        "LoRA of all parts": (f"lora.targets=[{trained}]", LORA_RATES),
    }
    variants = []
    for kind, (override, factors) in kinds.items():
        for rate in (factor * cfg.optimizer.learning_rate for factor in factors):
            variants.append(Variant(f"{kind}, rate {rate:g}", (override, f"optimizer.learning_rate={rate:g}")))
    question = "What do adapters cost and keep, beside the training of all weights?"
    return Study("lora", question, variants[1].name, tuple(variants), needs_weights=True)


STUDIES: dict[str, Callable[[RunConfig, int], Study]] = {
    "negatives": negatives,
    "hardness": hardness,
    "hardness_modes": hardness_modes,
    "reward": reward,
    "mining": mining,
    "freezing": freezing,
    "lora": lora,
}
"""Name -> function that makes the study of a base configuration and a number of data-parallel ranks of a run."""


def plan(
    study: Study, cfg: RunConfig, seeds: Sequence[int], variants: Sequence[str] = (), trained_start: bool = False
) -> list[Run]:
    """List the runs of a study; a run comes after those that it needs.

    Args:
        study: made by one of STUDIES.
        cfg: the base configuration.
        seeds: each variant has a run with each seed.
        variants: names of the variants to run, to which those that they need and the reference are added; empty: all.
        trained_start: for each seed, one run with another configuration is trained first, and the others start from it.

    Raises:
        ConfigError: the study has no such variant, or it needs trained weights and there are none.
    """
    require(
        trained_start or cfg.checkpoint.init is not None or not study.needs_weights,
        f"study {study.name} needs trained weights to start from: checkpoint.init, or --start with a configuration",
    )
    known = {variant.name: variant for variant in study.variants}
    for name in variants:
        require(name in known, f"--variant {name!r} is none of study {study.name}'s: {', '.join(map(repr, known))}")
    wanted = {study.reference, *variants, *map(study.reference_of, variants)} if variants else set(known)
    wanted |= {merged for name in wanted for merged, _ in known[name].merge}
    runs = []
    for seed in seeds:
        start = run_name(START, seed) if trained_start else None
        if trained_start:
            runs.append(Run(Variant(START), seed))
        elif seed == seeds[0]:
            runs.append(Run(_untrained(cfg), seed))
        runs += [
            Run(variant, seed, None if variant.merge else start) for variant in study.variants if variant.name in wanted
        ]
    return sorted(runs, key=lambda run: bool(run.variant.merge))


def _untrained(cfg: RunConfig) -> Variant:
    """The weights that all runs start from, as a run of one step with a learning rate of 0."""
    rates = [f"optimizer.part_learning_rates.{part}=0" for part in cfg.optimizer.part_learning_rates]
    overrides = ("train.steps=1", "optimizer.learning_rate=0", "optimizer.min_learning_rate=0", *rates)
    return Variant(UNTRAINED, overrides)

"""The studies: which arms each has, and what an arm changes of the base configuration. Nothing is run here.

First step of a study: `plan` gives its runs, which queue.py runs and findings.py compares. An arm that trains is a list
of overrides; one that only merges is made of the weights of two others.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import require

ALPHAS = (0, 0.5, 1, 2, 5, 9, 12, 15)
"""Hardness weights of the sweep: those of the paper's figure 7, and beyond."""
MERGES = (0.25, 0.5, 0.75)
"""Shares of the weights of the run with a frozen tower in a merge of the two."""
BATCH_FACTORS = (0.25, 0.5, 2.0)
SLOW_TOWER = 0.1
"""Learning rate of the tower relative to the rest."""
WHOLE = "global batch"
UNTRAINED = "before training"
START = "start"


@dataclass(frozen=True)
class Arm:
    """One treatment of a study."""

    name: str
    overrides: tuple[str, ...] = ()
    """section.key=value, after those of the base configuration."""
    merge: tuple[tuple[str, float], ...] = ()
    """(arm, share) of the weights it is merged of; then it is not trained."""
    compared_with: str | None = None
    """Arm that differs from it in one thing; None: the study's reference."""


@dataclass(frozen=True)
class Study:
    """A question, and the arms that answer it."""

    name: str
    question: str
    reference: str
    """Arm that the others are compared with, seed by seed, unless they name another."""
    arms: tuple[Arm, ...]
    needs_weights: bool = False
    """Says nothing about runs that start from random weights."""

    def reference_of(self, arm: str) -> str:
        """What an arm is compared with."""
        return next((one.compared_with for one in self.arms if one.name == arm), None) or self.reference


@dataclass(frozen=True)
class Run:
    """One arm with one seed: a folder of its own."""

    arm: Arm
    seed: int
    start: str | None = None
    """Name of the run whose weights it starts from."""

    @property
    def name(self) -> str:
        """Folder, and what the tables call it."""
        return run_name(self.arm.name, self.seed)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs that must be finished before."""
        merged = tuple(run_name(arm, self.seed) for arm, _ in self.arm.merge)
        return merged + ((self.start,) if self.start else ())


def run_name(arm: str, seed: int) -> str:
    """`alpha 0.5`, 3 -> alpha-0.5-seed3."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', arm.lower()).strip('-')}-seed{seed}"


def negatives(cfg: RunConfig, ranks: int) -> Study:
    """How many negatives: a rank's micro batch, gathered, the global batch; and the batch size."""
    size, total = cfg.train.micro_batch_size, cfg.train.global_batch_size
    require(
        size is not None and 2 <= size < total // ranks and ranks > 1 and total % (size * ranks) == 0,
        f"study negatives: {ranks} data-parallel ranks with train.micro_batch_size={size} of {total} pairs do not tell "
        "its arms apart: needed are at least 2 ranks, and several whole micro batches of at least 2 pairs on each",
    )
    titles = {"own_micro_batch": "own micro batch", "micro_batch": "gathered", "global_batch": WHOLE}
    arms = [Arm(title, (f"loss.negatives={key}",)) for key, title in titles.items()]
    for factor in BATCH_FACTORS:
        batch, rest = divmod(total * factor, ranks)
        if rest == 0 and batch >= 1:
            arms += _batch_size(cfg, round(total * factor), ranks, factor)
    return Study("negatives", "What are more negatives worth?", arms[0].name, tuple(arms))


def _batch_size(cfg: RunConfig, batch: int, ranks: int, factor: float) -> list[Arm]:
    """Arms of another batch size: all of it negatives, so that it is compared with the base's global batch."""
    share = batch // ranks
    micro = max(size for size in range(1, min(cfg.train.micro_batch_size, share) + 1) if share % size == 0)
    sizes = (f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}", "loss.negatives=global_batch")
    arms = [Arm(f"batch {batch}, equal pairs", (*sizes, *_stretched(cfg, 1 / factor)), compared_with=WHOLE)]
    if factor < 1:
        arms.append(Arm(f"batch {batch}, equal updates", (*sizes, *_epochs(cfg, factor)), compared_with=WHOLE))
    return arms


def _epochs(cfg: RunConfig, factor: float) -> tuple[str, ...]:
    return () if cfg.train.steps else (f"train.epochs={cfg.train.epochs * factor:g}",)


def _stretched(cfg: RunConfig, factor: float) -> tuple[str, ...]:
    """A run of `factor` times as many steps: everything that is counted in steps is stretched with it."""
    counts = {
        "train.steps": cfg.train.steps,
        "optimizer.warmup_steps": cfg.optimizer.warmup_steps,
        "loss.temperature_warmup_steps": cfg.loss.temperature_warmup_steps,
        "loss.alpha_warmup_steps": cfg.loss.alpha_warmup_steps,
    }
    counts |= {f"data.subsets.{name}.start_step": subset.start_step for name, subset in cfg.data.subsets.items()}
    return tuple(f"{key}={round(count * factor)}" for key, count in counts.items() if count)


def hardness(cfg: RunConfig, ranks: int) -> Study:
    """How strongly hard negatives are weighted, the unstable ends included."""
    arms = [Arm(f"alpha {alpha:g}", (f"loss.alpha={alpha:g}",)) for alpha in ALPHAS]
    question = "Does hardness weighting beat plain InfoNCE (alpha 0), and at which alpha?"
    return Study("hardness", question, arms[0].name, tuple(arms))


def hardness_modes(cfg: RunConfig, ranks: int) -> Study:
    """Which negatives are weighted, whether likely false ones are masked, and whose judgement is used."""
    require(cfg.loss.alpha > 0, "study hardness_modes: loss.alpha=0 weights nothing; set it above 0")
    require(
        cfg.data.hard_negatives > 0,
        "study hardness_modes: data.hard_negatives=0; set it to at least 1, with data that has hard negatives "
        "(docs/data.md; tools/prepare_data.py openmoji --hard-negatives 2)",
    )
    plain = ("loss.hardness=all", "loss.mask_same_target=false", "loss.mask_margin=null", "loss.reward=self")
    arms = [
        Arm("all negatives weighted", plain),
        Arm("in-batch negatives weighted", (*plain, "loss.hardness=in_batch")),
        Arm("hard negatives weighted", (*plain, "loss.hardness=hard_negatives")),
        Arm("none weighted", (*plain, "loss.alpha=0")),
        Arm("all weighted, equal targets masked", (*plain, "loss.mask_same_target=true")),
        Arm("all weighted, margin 0.1 masked", (*plain, "loss.mask_margin=0.1")),
        Arm("all weighted by the average", (*plain, "loss.reward=ema", "loss.ema_decay=0.99")),
    ]
    question = "Which negatives should be weighted, and by whose judgement?"
    return Study("hardness_modes", question, arms[0].name, tuple(arms))


def freezing(cfg: RunConfig, ranks: int) -> Study:
    """Frozen parts, and three ways between a frozen and a trained tower."""
    steps = cfg.train.steps
    require(steps > 0, "study freezing: train.steps=0; the tower that is trained late needs the number of steps")
    own = cfg.optimizer.part_learning_rates or cfg.optimizer.part_start_steps
    require(
        not own, f"study freezing: the base configuration has rates or first steps of parts, {own}; its arms set them"
    )
    slow = SLOW_TOWER * cfg.optimizer.learning_rate
    free, frozen = "nothing frozen", "vision frozen"
    arms = [
        Arm(free, ("model.freeze=[]",)),
        Arm(frozen, ("model.freeze=[vision]",)),
        Arm("projector frozen", ("model.freeze=[projector]",)),
        Arm("vision and projector frozen", ("model.freeze=[vision,projector]",)),
        Arm("vision at a tenth", ("model.freeze=[]", f"optimizer.part_learning_rates.vision={slow:g}")),
        Arm("vision from the middle", ("model.freeze=[]", f"optimizer.part_start_steps.vision={steps // 2}")),
    ]
    for share in MERGES:
        name = f"merged, {round(100 * share)} % of frozen"
        arms.append(Arm(name, merge=((frozen, share), (free, 1 - share))))
    question = "What does a frozen vision tower cost in distribution, and bring out of it?"
    return Study("freezing", question, free, tuple(arms), needs_weights=True)


STUDIES: dict[str, Callable[[RunConfig, int], Study]] = {
    "negatives": negatives,
    "hardness": hardness,
    "hardness_modes": hardness_modes,
    "freezing": freezing,
}
"""Name -> study, of the base configuration and the number of data-parallel ranks of a run."""


def plan(
    study: Study, cfg: RunConfig, seeds: Sequence[int], arms: Sequence[str] = (), trained_start: bool = False
) -> list[Run]:
    """The runs of a study, those that others need first.

    Args:
        study: of STUDIES.
        cfg: the base configuration.
        seeds: each arm has a run with each.
        arms: names of the arms to take, with those they are made of and the reference; none: all.
        trained_start: every seed's runs start from a run of its own, of another configuration.

    Raises:
        ConfigError: an arm that the study does not have, or nothing to start from where it needs that.
    """
    require(
        trained_start or cfg.checkpoint.init is not None or not study.needs_weights,
        f"study {study.name} needs trained weights to start from: checkpoint.init, or --start with a configuration",
    )
    known = {arm.name: arm for arm in study.arms}
    for name in arms:
        require(name in known, f"--arm {name!r} is none of study {study.name}'s: {', '.join(map(repr, known))}")
    wanted = {study.reference, *arms, *map(study.reference_of, arms)} if arms else set(known)
    wanted |= {name for one in wanted for name, _ in known[one].merge}
    runs = []
    for seed in seeds:
        start = run_name(START, seed) if trained_start else None
        if trained_start:
            runs.append(Run(Arm(START), seed))
        elif seed == seeds[0]:
            runs.append(Run(_untrained(cfg), seed))
        runs += [Run(arm, seed, None if arm.merge else start) for arm in study.arms if arm.name in wanted]
    return sorted(runs, key=lambda run: bool(run.arm.merge))


def _untrained(cfg: RunConfig) -> Arm:
    """The weights that all runs start from, as a run that changes nothing: one step at a learning rate of 0."""
    rates = [f"optimizer.part_learning_rates.{part}=0" for part in cfg.optimizer.part_learning_rates]
    overrides = ("train.steps=1", "optimizer.learning_rate=0", "optimizer.min_learning_rate=0", *rates)
    return Arm(UNTRAINED, overrides)

"""Chooses the subset of each batch, as a pure function of mixture and seed: ranks need no communication for this.

An epoch has as many batches as the pairs of all subsets fill. The share of each subset is exact to one batch, and the
order of the batches is shuffled. With weights by size every pair comes once per epoch. Pairs that do not fill a batch
come first in the next epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import numpy as np

from megatron_llave.config.data import SubsetConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.index import Index
from megatron_llave.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """The settings of one subset in the mixture."""

    pairs: int
    weight: float
    start_step: int
    """The first step that may draw from this subset."""


@dataclass(frozen=True)
class Mixture:
    """What batches are drawn from. A batch is a sub-batch of a step here: all its pairs are from one subset."""

    sources: dict[str, Source]
    """The subsets by name, sorted."""
    batch_size: int
    """Number of pairs in a batch."""
    batches_per_step: int
    seed: int


def build_mixture(cfg: RunConfig, index: Index) -> Mixture:
    """Return the mixture of a run: the subsets that its configuration names, or all subsets of the index.

    Raises:
        ConfigError: a subset is not in the index, or has fewer pairs than a batch.
    """
    batch_size = cfg.train.global_batch_size // cfg.data.sub_batches
    subsets = cfg.data.subsets or {name: SubsetConfig() for name, s in index.subsets.items() if s.pairs}
    sources = {}
    for name in sorted(subsets):
        if name not in index.subsets:
            raise ConfigError(
                f"data.subsets.{name} is not in the index, which has {', '.join(sorted(index.subsets))[:200]}; "
                "data.subsets={} uses all of them, and data.subsets.NAME.weight=1 adds one by name"
            )
        pairs, weight = index.subsets[name].pairs, subsets[name].weight
        if pairs < batch_size:
            sub = f" / data.sub_batches={cfg.data.sub_batches}" if cfg.data.sub_batches > 1 else ""
            raise ConfigError(
                f"subset {name} has {pairs} pairs, fewer than train.global_batch_size={cfg.train.global_batch_size}"
                f"{sub}: a batch would hold pairs twice; lower it or leave the subset out of data.subsets"
            )
        weight = float(pairs) ** cfg.data.size_power if weight is None else weight
        sources[name] = Source(pairs, weight, subsets[name].start_step)
    return Mixture(sources, batch_size, cfg.data.sub_batches, cfg.train.seed)


def draw_subsets(mixture: Mixture) -> Iterator[str]:
    """Yield the name of the subset of each batch, without end."""
    starts = sorted({source.start_step for source in mixture.sources.values()})
    for number, start in enumerate(starts):
        active = {name: source for name, source in mixture.sources.items() if source.start_step <= start}
        drawn = _draw(active, mixture.batch_size, (mixture.seed, number))
        is_last = number + 1 == len(starts)
        yield from islice(drawn, None if is_last else (starts[number + 1] - start) * mixture.batches_per_step)


def _draw(active: dict[str, Source], batch_size: int, seed: tuple[int, int]) -> Iterator[str]:
    """Yield names for endless epochs over subsets that have all started."""
    names = list(active)
    batches = Fraction(sum(source.pairs for source in active.values()), batch_size)  # per epoch
    total = sum(Fraction(source.weight) for source in active.values())
    shares = [Fraction(source.weight) / total * batches for source in active.values()]
    epoch, before = 0, [0] * len(names)
    while True:
        until = [int((epoch + 1) * share) for share in shares]
        counts = [after - done for after, done in zip(until, before)]
        order = np.random.default_rng([*seed, epoch]).permutation(np.repeat(np.arange(len(names)), counts))
        yield from (names[i] for i in order.tolist())
        epoch, before = epoch + 1, until

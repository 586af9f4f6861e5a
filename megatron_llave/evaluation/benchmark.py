"""The registry of benchmarks: each one is a command of llave evaluate.

A benchmark that ranks with Precision@1 yields tasks, which are embedded, scored and reported alike. One with other
scores brings a function of its own.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_llave.batch import Side
from megatron_llave.config.schema import RunConfig
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.evaluation.task import Task
from megatron_llave.options.evaluate import Command


@dataclass(frozen=True)
class ScoreTable:
    """A table of a report."""

    title: str
    note: str
    """What it shows."""
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    means: list[tuple[str, ...]] = field(default_factory=list)
    """Rows below the others, in bold."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation with other scores than Precision@1 has found; it has written its scores itself."""

    lines: list[str]
    """To print."""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    """Rows of the report's table: the name of a score, its value, and its value by chance, in percent."""
    examples: list[tuple[Side, list[tuple[Side, bool]]]] = field(default_factory=list)
    """Some queries with their best candidates and whether each is right; without any there is no such report."""
    tables: list[ScoreTable] = field(default_factory=list)
    """Tables of a report without examples; without any there is no such report."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What report.json has of these tables."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the report says about the evaluation beside what all of them say, by name."""
    failure: str = ""
    """The error that the command ends with after the report; "" where all went well."""


Evaluate = Callable[[CachedEmbedder], Evaluation]
"""Embeds and scores, and writes scores into the embedder's folder."""


@dataclass(frozen=True)
class Benchmark:
    """A command of llave evaluate. Of `read_tasks` and `read_evaluation` it has exactly one.

    Both take the parsed command line, and read and check the data before the model is loaded.
    """

    name: str
    """Name of the command."""
    about: str
    """One line for --help."""
    add_options: Callable[[argparse.ArgumentParser], None]
    """Adds the options that name the data; --checkpoint, --average, --out, --ties and overrides are there already."""
    read_tasks: Callable[[argparse.Namespace], list[Task]] | None = None
    """For a benchmark that ranks with Precision@1."""
    read_evaluation: Callable[[argparse.Namespace], Evaluate] | None = None
    """For a benchmark with other scores."""
    ties: str | None = "strict"
    """Default tie rule, a key of options.evaluate.TIES; only with `read_tasks`."""
    is_kept: bool = True
    """Whether embeddings and results stay in --out, which must then be given and lets the same command resume."""
    overrides: Callable[[argparse.Namespace], list[str]] = lambda args: []
    """Configuration that the benchmark needs, as section.key=value; the user's overrides win over it."""
    published: Callable[[RunConfig], Mapping[str, float] | None] = lambda cfg: None
    """Published means for a model of this configuration, to show beside the results; None where there are none."""

    @property
    def command(self) -> Command:
        """What the command line has of it."""
        ties = self.ties if self.read_tasks is not None else None
        return Command(self.name, self.about, self.add_options, ties, self.is_kept)


BENCHMARKS: dict[str, Benchmark] = {}
"""The registered benchmarks by name."""


def register_benchmark(benchmark: Benchmark) -> None:
    """Make a benchmark a command of llave evaluate.

    Raises:
        ValueError: its name is taken, or it has both or neither of `read_tasks` and `read_evaluation`.
    """
    if benchmark.name in BENCHMARKS:
        raise ValueError(f"benchmark {benchmark.name!r} is registered already")
    if (benchmark.read_tasks is None) == (benchmark.read_evaluation is None):
        raise ValueError(f"benchmark {benchmark.name!r} must have either read_tasks or read_evaluation")
    BENCHMARKS[benchmark.name] = benchmark

"""The rules of mining hard negatives and hard batches, and the section `mining` of a run that mines while it trains.

docs/mining.md has the rules as formulas. mining/rules.py applies those of negatives, mining/graph.py and
mining/clusters.py those of batches.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from megatron_llave.errors import at_least, key_of, one_of, require

PICKS = ("hardest", "random")
CLUSTERINGS = ("metis", "greedy")
SEARCHES = ("exact", "faiss")


@dataclass(frozen=True)
class Search:
    """How the nearest targets of a query are searched, for negatives and for batches."""

    kind: str = "exact"
    """One of SEARCHES; faiss is approximate (mining/approximate.py)."""
    probes: int = 64
    """Number of lists of targets that faiss searches for a query."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, "--", 1, ("probes",))
        one_of("--search", self.kind, SEARCHES)
        ok = self.kind == "faiss" or self.probes == Search.probes
        require(ok, f"--probes={self.probes} has no effect without --search faiss; give that too, or leave it out")

    @property
    def plan(self) -> dict[str, Any] | None:
        """What the files of a mining say of the search; None if it is exact, as in files without a word of it."""
        return None if self.kind == "exact" else asdict(self)


@dataclass
class Rules:
    """The rules of a mining; each is left out where it is None."""

    prefix: ClassVar[str] = "--"
    """How messages name the rules: as options of the command, or as keys of the section (errors.key_of)."""
    negatives: int = 5
    """The most mined negatives of a query."""
    depth: int = 100
    """Candidates of a query that are looked at: ranks 1 to depth."""
    skip: int = 0
    """Ranks 1 to skip are left out."""
    ratio: float | None = 0.95
    """A negative is less similar than this share of the similarity of the query's least similar positive."""
    margin: float | None = None
    """A negative is less similar than the query's least similar positive by more than this."""
    mean_margin: float | None = None
    """A negative is less similar than the mean of the query's positives by more than this."""
    floor: float | None = None
    """Smallest similarity of a negative."""
    ceiling: float | None = None
    """Largest similarity of a negative."""
    min_positive: float | None = None
    """A query gets negatives only if its most similar positive is more similar than this."""
    max_uses: int | None = None
    """The most queries that one target becomes a negative of; the first queries get it."""
    votes: int = 1
    """Number of models by whose rules a negative must be one."""
    pick: str = "hardest"
    """Which of the candidates that pass all rules become negatives: hardest (the first ones) or random (any)."""
    seed: int = 0
    """Seed of pick=random."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, self.prefix, 1, ("negatives", "depth", "max_uses", "votes"))
        at_least(self, self.prefix, 0, ("skip", "seed"))
        one_of(key_of(self.prefix, "pick"), self.pick, PICKS)
        at_least(self, self.prefix, -2, ("margin", "mean_margin", "floor", "ceiling", "min_positive", "ratio"))
        ok = self.skip + self.negatives <= self.depth
        named = f"{self._named('depth')}, {self._named('skip')}, {self._named('negatives')}"
        what = f"{named}: the candidates that are left are fewer than the negatives"
        require(ok, f"{what}; raise {key_of(self.prefix, 'depth')}")
        ok = self.floor is None or self.ceiling is None or self.floor <= self.ceiling
        require(ok, f"{self._named('floor')} is above {self._named('ceiling')}: no candidate lies between")

    def _named(self, name: str) -> str:
        return f"{key_of(self.prefix, name)}={getattr(self, name)}"


@dataclass
class MiningConfig(Rules):
    """Mining of hard negatives while training (docs/mining.md), by the rules of `llave mine negatives`."""

    prefix: ClassVar[str] = "mining"
    """Of its keys in messages."""
    interval: int = 0
    """Number of steps between minings, a multiple of checkpoint.interval; 0: nothing is mined. After every `interval`
    steps, that checkpoint is mined in the background. From `interval` steps later on its negatives are used in place of
    those before, the first of which are data.negatives."""
    processes: int = 1
    """Processes that mine beside the training, on the node of the first rank: a multiple of parallel.tensor, by which
    they share the model as the run does. 0: the run prints the command instead and waits for its result, so that other
    machines can mine."""

    search: str = Search.kind
    """How the nearest targets are found: exact, or faiss (approximately, with a measured recall)."""
    probes: int = Search.probes
    """Number of lists of targets that search=faiss looks into for a query; more find more."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        one_of("mining.search", self.search, SEARCHES)
        at_least(self, "mining", 1, ("probes",))
        at_least(self, "mining", 0, ("interval", "processes"))
        require(self.votes == 1, f"mining.votes={self.votes}: a run mines with one checkpoint at a time; leave it at 1")

    @property
    def options(self) -> dict[str, Any]:
        """The rules and the search, by the names that they have as options of `llave mine negatives`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("interval", "processes")}


@dataclass(frozen=True)
class Grouping:
    """How pairs are grouped into clusters, of which batches are made."""

    cluster_size: int = 32
    """Pairs of a cluster; a batch is made of whole clusters."""
    skip: int = 30
    """Ranks 1 to skip of a query's candidates are left out, as likely right answers."""
    take: int = 100
    """The pair of a query is connected with those of this many candidates after them."""
    clustering: str = "metis"
    """One of CLUSTERINGS."""
    seed: int = 0
    """Of the order of equal choices, and of METIS."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least(self, "--", 2, ("cluster_size",))
        at_least(self, "--", 1, ("take",))
        at_least(self, "--", 0, ("skip", "seed"))
        one_of("--clustering", self.clustering, CLUSTERINGS)

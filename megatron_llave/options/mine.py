"""The options of `llave mine`."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields

from megatron_llave.config.mining import CLUSTERINGS, PICKS, SEARCHES, Grouping, Rules, Search
from megatron_llave.errors import OneLineParser
from megatron_llave.launch import procs

ABOUT = """Mine hard negatives or hard batches for a folder of training shards, which stay as they are.

llave mine negatives --checkpoint CKPT --data SHARDS --out NEGATIVES [--ratio 0.95 ...]
llave train ... data.path=SHARDS data.negatives=NEGATIVES data.hard_negatives=5
llave mine report NEGATIVES --data SHARDS

llave mine batches --checkpoint CKPT --data SHARDS --out ORDER [--cluster-size 32 ...]
llave train ... data.path=SHARDS data.order=ORDER

CKPT is a checkpoint, a run's output directory or a Hugging Face folder; several of them vote on negatives. Each query's
negatives are targets of its own subset, and a batch is made of clusters of pairs that are hard for each other.
docs/mining.md has the rules as formulas. A command that was interrupted continues when it is given again.
"""
HELP = {
    "--negatives": "the most negatives of a query",
    "--depth": "candidates of a query that are looked at, the most similar ones first",
    "--skip": "leave out the first N candidates",
    "--ratio": "a negative is less similar than this share of the similarity of the least similar positive",
    "--margin": "a negative is less similar than the least similar positive by more than this",
    "--mean-margin": "a negative is less similar than the mean of the positives by more than this",
    "--floor": "smallest similarity of a negative",
    "--ceiling": "largest similarity of a negative",
    "--min-positive": "a query gets negatives only if a positive is more similar than this",
    "--max-uses": "the most queries that one target becomes a negative of",
    "--votes": "number of checkpoints by whose rules a negative must be one",
    "--pick": "which of the candidates that pass become negatives, hardest or random",
    "--seed": "of --pick random",
}
"""What each rule does, in a line; config/mining.py says more."""
CLUSTERS = {
    "--cluster-size": "pairs of a cluster; the batch size of a run is a multiple of it",
    "--skip": "leave out the first N candidates of a query, as likely right answers",
    "--take": "connect a query's pair with those of N candidates after them",
    "--seed": "of the choice between equals",
}
"""What decides the clusters; config/mining.py says more."""
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")
"""An override of the configuration, among the words of an option that takes a list."""
COUNTS = ("negatives", "depth", "skip", "max_uses", "votes", "seed")
"""The rules that are whole numbers; the others are similarities, but for `pick`."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    negatives = commands.add_parser("negatives", help="mine hard negatives and write them beside the shards")
    add = negatives.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="CKPT", help="the model, or several models that vote")
    add("--out", required=True, metavar="FOLDER", help="folder for the negatives, the value of data.negatives")
    _add_common(negatives, "negatives that were mined otherwise")
    rules = negatives.add_argument_group("rules", "'none' switches a rule off that may be off")
    defaults = {field.name: field.default for field in fields(Rules)}
    for flag, does in HELP.items():
        name = flag.removeprefix("--").replace("-", "_")
        rules.add_argument(
            flag,
            type=str if name == "pick" else _type_of(defaults[name], name in COUNTS),
            choices=PICKS if name == "pick" else None,
            default=defaults[name],
            metavar="PICK" if name == "pick" else "N" if name in COUNTS else "S",
            help=f"{does} ({'off' if defaults[name] is None else defaults[name]})",
        )
    report = commands.add_parser("report", help="write the HTML report of mined negatives again, without embedding")
    report.add_argument("out", metavar="NEGATIVES", help="the folder that `mine negatives` has written")
    report.add_argument("--data", required=True, metavar="SHARDS", help="local folder of the shards they are for")
    batches = commands.add_parser("batches", help="mine an order of the pairs in which batches are hard")
    batches.add_argument("--checkpoint", required=True, metavar="CKPT", help="the model")
    batches.add_argument("--out", required=True, metavar="FOLDER", help="folder for the order, the value of data.order")
    _add_common(batches, "an order that was mined otherwise")
    grouping = batches.add_argument_group("clusters")
    for flag, does in CLUSTERS.items():
        default = getattr(Grouping, flag.removeprefix("--").replace("-", "_"))
        grouping.add_argument(flag, type=int, default=default, metavar="N", help=f"{does} ({default})")
    help_text = "how pairs are divided into clusters (metis where pymetis is installed, else greedy)"
    grouping.add_argument("--clustering", choices=CLUSTERINGS, help=help_text)
    return parser


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="SHARDS", help="local folder of training shards")
    add("--store", metavar="FOLDER", help="folder that keeps the embeddings for other rules (OUT.embeddings)")
    add("--subsets", nargs="+", metavar="NAME", help="mine these subsets only")
    help_text = "how the nearest targets are found: exactly, or approximately by FAISS with a measured recall (exact)"
    add("--search", choices=SEARCHES, default=Search.kind, help=help_text)
    help_text = f"lists of targets that --search faiss looks into for a query; more find more ({Search.probes})"
    add("--probes", type=int, default=Search.probes, metavar="N", help=help_text)
    add("--average", action="store_true", help="the averaged weights of runs with loss.reward=ema")
    add("--overwrite", action="store_true", help=f"replace {what}")
    add("overrides", nargs="*", default=[], help="section.key=value, such as parallel.tensor=2")
    procs.add_option(parser)


def _type_of(default: float | None, is_count: bool) -> Callable[[str], float | None]:
    """What reads the value of a rule; a count that is not off by default cannot be off."""
    if is_count and default is not None:
        return int

    def read(text: str) -> float | None:
        try:
            return None if text == "none" else int(text) if is_count else float(text)
        except ValueError:
            what = "a whole number" if is_count else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} must be {what}, or none") from None

    return read


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process.

    Overrides behind `--subsets` or `--checkpoint`, which take all words up to the next option, are overrides too.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("subsets", "checkpoint"):
        words = getattr(args, name, None)
        if isinstance(words, list):
            args.overrides = [*args.overrides, *filter(OVERRIDE.match, words)]
            setattr(args, name, [word for word in words if not OVERRIDE.match(word)])
            if not getattr(args, name):
                parser.error(f"argument --{name}: expected at least one argument before {words[0]}")
    return args


def rules_of(args: argparse.Namespace) -> Rules:
    """The rules that a command line gives.

    Raises:
        ConfigError: they are impossible.
    """
    return Rules(**{field.name: getattr(args, field.name) for field in fields(Rules)})


def search_of(args: argparse.Namespace) -> Search:
    """How a command line asks for targets to be searched.

    Raises:
        ConfigError: it is impossible.
    """
    return Search(args.search, args.probes)


def grouping_of(args: argparse.Namespace, clustering: str) -> Grouping:
    """The clusters that a command line asks for; `clustering` if it does not say how they are found.

    Raises:
        ConfigError: they are impossible.
    """
    return Grouping(args.cluster_size, args.skip, args.take, args.clustering or clustering, args.seed)

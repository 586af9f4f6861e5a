"""The options of `llave plot`."""

import argparse
from collections.abc import Sequence

from megatron_llave.errors import OneLineParser

ABOUT = """Draw the curves of one or several runs: loss, also by subset, learning rate, similarities, throughput,
scores.

llave plot runs/a runs/b [--out runs.png | --out runs.html | --html] [--along step|pairs|hours]

An HTML page has the values under the pointer, zoom and a table of final values, and needs no network.

The tool only reads log.jsonl and evaluations.jsonl in the output directories, so it works while a run is training too.
"""
ALONG = ("step", "pairs", "hours")
"""What the horizontal axis may be."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a run (train.output)")
    parser.add_argument(
        "--out", help=".png or .html file; default: curves.png in the run, or here if there are several"
    )
    parser.add_argument("--html", action="store_true", help="write a page: curves.html, unless --out names it")
    parser.add_argument("--along", choices=ALONG, default="step", help="horizontal axis")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)

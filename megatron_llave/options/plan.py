"""The options of `llave plan`."""

import argparse
from collections.abc import Sequence

from megatron_llave.config.packaged import complete_config
from megatron_llave.errors import OneLineParser

ABOUT = """Plan a run before it is started: parameters, FLOPs, memory of each rank by part, communication,
and whether it fits.

llave plan --config RUN.yaml --gpus 8 --gpu-memory 80 [section.key=value ...]

The plan is computed; it needs no GPU, data or weights. Without --data or --pair-tokens, pairs are assumed to be like
those of MMEB. If the run does not fit, the tool tries other parallel layouts, micro batches and recomputation, and
prints the first combination that fits. docs/planner.md says what is counted and how well it was checked.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = parser.add_argument("--config", required=True, help="YAML file with the configuration of the run")
    config.completer = complete_config
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs of all nodes together")
    parser.add_argument("--gpu-memory", type=float, required=True, help="GB (2^30 bytes) of one GPU, such as 80")
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--data", help="folder of shards whose pairs are measured; no image is decoded")
    pairs.add_argument(
        "--pair-tokens", type=int, nargs=2, metavar=("QUERY", "TARGET"), help="tokens, visual ones included"
    )
    parser.add_argument("--pair-tiles", type=int, nargs=2, metavar=("QUERY", "TARGET"), help="with --pair-tokens (0 0)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, overrides of the file")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)

"""The options of `llave merge`."""

import argparse
from collections.abc import Sequence

from megatron_llave.errors import OneLineParser

ABOUT = """Compute the weighted mean of the weights of several checkpoints of one model, and write it as a checkpoint.

llave merge runs/frozen=0.5 runs/trained=0.5 --to runs/merged

The result can be evaluated, exported (llave convert) or trained further (checkpoint.init) like any checkpoint. A
Hugging Face folder has to be imported before it can be merged. Checkpoints of LoRA adapters alone, for one base, become
one of adapters that change the base by the mean of what they change (docs/lora.md).
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", metavar="CKPT=SHARE", help="checkpoint or output directory, and its weight")
    parser.add_argument("--to", required=True, dest="out", help="checkpoint folder to write")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)

"""The options of `llave preflight`."""

import argparse
from collections.abc import Sequence

from megatron_llave.config.packaged import complete_config
from megatron_llave.errors import OneLineParser
from megatron_llave.launch import procs

ABOUT = """Check the nodes before a run: their speed, clocks, disks, memory and versions, in one table and one line per
fault.

llave preflight --config RUN.yaml [--megabytes 256] [section.key=value ...]

Start it as the run itself is started, with the same processes, environment and overrides, on every node; it takes some
seconds. It writes to `train.output` and leaves it as it was. The exit status is 1 if there is a fault.
docs/clusters.md explains the columns.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = parser.add_argument("--config", required=True, help="YAML file with the configuration of the run")
    config.completer = complete_config
    parser.add_argument("--megabytes", type=int, default=256, help="written per node, and reduced between GPUs (256)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, overrides of the file")
    procs.add_option(parser, without_gpu="two")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)

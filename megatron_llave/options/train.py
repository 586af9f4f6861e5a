"""The options of `llave train` and of `python -m megatron_llave.train`."""

import argparse
from collections.abc import Sequence

from megatron_llave.config.packaged import complete_config
from megatron_llave.errors import OneLineParser
from megatron_llave.launch import procs

ABOUT = """Train an embedding model, on one process per GPU, or two without a GPU.

llave train --config tiny data.path=DIR train.output=runs/mine
llave train --config my.yaml --resume auto section.key=value ...

docs/configuration.md lists every section.key, docs/running.md explains runs. `llave config list` names the examples.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = parser.add_argument("--config", required=True, help="YAML file of the run, or the name of an example")
    config.completer = complete_config
    parser.add_argument("--resume", metavar="auto|DIR", help="resume a run: checkpoint.resume")
    procs.add_option(parser, without_gpu="two")
    parser.add_argument("overrides", nargs="*", help="section.key=value, which overrides the file")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_intermixed_args(argv)

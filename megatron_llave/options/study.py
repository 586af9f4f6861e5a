"""The options of `llave study`."""

import argparse
from collections.abc import Sequence

from megatron_llave.config.packaged import complete_config
from megatron_llave.errors import OneLineParser

ABOUT = """Run one of the paper's experiments: its variants, each with several seeds, then tables and figures.

llave study hardness --config studies/tiny --seeds 0,1,2 --out DIR [section.key=value ...]

If the command is repeated, it runs only what is missing and writes the report again. See docs/studies.md.
"""
NAMES = ("negatives", "hardness", "hardness_modes", "reward", "mining", "freezing", "lora")
"""The studies of study/variants.py."""


def seeds(text: str) -> tuple[int, ...]:
    """Parse `0,1,2`; argparse reports a ValueError."""
    numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    if not all(0 <= seed < 2**31 for seed in numbers):
        raise ValueError
    return numbers


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=NAMES)
    config = parser.add_argument("--config", required=True, help="configuration that all runs share")
    config.completer = complete_config
    parser.add_argument("--seeds", type=seeds, default=(0, 1, 2), metavar="0,1,2", help="each variant runs with each")
    parser.add_argument("--out", required=True, help="folder of the runs and of the report; the same folder resumes")
    parser.add_argument(
        "--variant", action="append", default=[], help="run this variant and the reference only; may be repeated"
    )
    parser.add_argument("--start", metavar="FILE", help="configuration of a run that each seed's runs start from")
    parser.add_argument("--processes", type=int, default=2, help="processes of all runs at a time (2)")
    parser.add_argument("--per-run", type=int, default=1, help="processes of one run (1)")
    parser.add_argument(
        "--task", metavar="N|list", help="run only number N of the list, for a job array; or print the list"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_intermixed_args(argv)

"""List the example configurations that come with the package, or print one, to be copied and changed.

llave config list
llave config show tiny > my.yaml

`--config NAME` of any command takes an example as it is.
"""

import argparse

from megatron_llave.config.packaged import complete, find_config, first_words, names
from megatron_llave.errors import OneLineParser, exit_with_one_line


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="print the name of each example, and what it is")
    show = commands.add_parser("show", help="print an example")
    show.add_argument("name", metavar="NAME", help="name that `llave config list` prints").completer = complete
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the list, or one example."""
    args = build_parser().parse_args(argv)
    with exit_with_one_line():
        if args.command == "show":
            print(find_config(args.name).read_text(), end="")
            return
        width = max(map(len, names()))
        for name in names():
            print(f"{name:{width}}  {first_words(name)}")

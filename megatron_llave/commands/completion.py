"""Print the script with which bash, zsh or fish completes the commands and options of llave.

bash: eval "$(llave completion bash)"                                       (in ~/.bashrc)
zsh:  eval "$(llave completion zsh)"                                        (in ~/.zshrc, after compinit)
fish: llave completion fish > ~/.config/fish/completions/llave.fish

It needs the Python package argcomplete: `pip install argcomplete`.
"""

import argparse
import os
from collections.abc import Callable
from types import ModuleType

from megatron_llave.errors import OneLineParser, exit_with_one_line, import_optional

SHELLS = ("bash", "zsh", "fish")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the script."""
    args = build_parser().parse_args(argv)
    with exit_with_one_line():
        print(_argcomplete().shellcode(["llave"], shell=args.shell))


def complete(overview: argparse.ArgumentParser, parser_of: Callable[[str], argparse.ArgumentParser]) -> None:
    """Print completions of the line in COMP_LINE, as argcomplete's script asks for them, and end the process.

    Args:
        overview: the parser whose first argument is the name of a command.
        parser_of: makes the parser of a command, which is made only if the line names it.
    """
    with exit_with_one_line():
        argcomplete = _argcomplete()
    before = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    words = [word for word in before[1:-1] if word]
    names = next(action.choices for action in overview._actions if action.choices)
    if words and words[0] in names:
        os.environ["_ARGCOMPLETE"] = "2"  # the name is a part of what is completed for
        argcomplete.autocomplete(parser_of(words[0]), always_complete_options=False)
    argcomplete.autocomplete(overview, always_complete_options=False)


def _argcomplete() -> ModuleType:
    return import_optional("argcomplete", "completion needs", "pip install argcomplete")

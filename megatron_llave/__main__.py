"""The console command: `llave COMMAND ...`, or `python -m megatron_llave COMMAND ...`.

Only the command that is asked for is imported, and only its options, in megatron_llave/options/, for help, a wrong
argument and completion: these need no second. The ranks that `llave evaluate --procs 8` starts run it again, with the
variables of torchrun.
"""

import argparse
import difflib
import gc
import importlib
import importlib.util
import os
import sys
from types import ModuleType

from megatron_llave import __version__
from megatron_llave.errors import OneLineParser, exit_with_one_line
from megatron_llave.launch import procs, start
from megatron_llave.processes import without_garbage_collection

COMMANDS = {
    "train": "train a model, on one process per GPU",
    "prepare": "make training shards from your data or the demo's; inspect and verify them",
    "convert": "convert from and to Hugging Face and PEFT folders; inspect and verify checkpoints",
    "evaluate": "evaluate a checkpoint on a benchmark",
    "embed": "embed texts and images, from the command line or from files",
    "mine": "mine hard negatives or hard batches for training shards with a checkpoint",
    "merge": "compute the weighted mean of several checkpoints",
    "plan": "compute memory, FLOPs and a layout that fits, before a run",
    "preflight": "check speed, disks and clocks of the nodes before a run",
    "plot": "draw the curves of one or several runs",
    "study": "repeat one of the paper's experiments, with several seeds",
    "search": "search in your own images by text or image, also as a local web page",
    "config": "list, or print, the example configurations that come with the package",
    "completion": "print the script that lets bash, zsh or fish complete commands and options",
}
"""Every command with a line about it; the module of a command is megatron_llave/commands/NAME.py."""
RANKED = {
    "evaluate": (),
    "mine negatives": (),
    "mine batches": (),
    "preflight": (),
    "embed": ("--jsonl", "--shards"),
    "search build": (),
}
"""Commands that the GPUs share, with the options of which one must be given; otherwise a single process suffices."""


def main() -> int | None:
    """Run the command that sys.argv names; returns its exit status, where it does not end the process itself."""
    sys.argv[0] = "llave"  # for usage lines and for the reports that name their command
    if "_ARGCOMPLETE" in os.environ:
        importlib.import_module("megatron_llave.commands.completion").complete(overview(), command_parser)
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        overview().parse_args(words or ["--help"])
    name, argv = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        print(f"error: {name!r} is not a command of llave; {hint}", file=sys.stderr)
        return 2
    options = options_of(name)
    if options is not None:
        options.parse(argv)  # ends at once with --help, or with a wrong argument
    needed = RANKED.get(name, RANKED.get(" ".join(words[:2])))
    if needed is not None and not start.is_rank():
        is_shared = not needed or any(word.startswith(needed) for word in argv)
        with exit_with_one_line():
            number = procs.asked_for(argv, is_shared, 2 if name == "preflight" else 1)
        if number > 1 or start.num_nodes() > 1:
            return start.start_ranks([str(start.RANK), name, *argv], number)
    with exit_with_one_line(), without_garbage_collection():
        is_run = name == "train" and start.is_rank()
        module = importlib.import_module("megatron_llave.train" if is_run else f"megatron_llave.commands.{name}")
    gc.freeze()  # what is imported stays to the end, when the collector would go through it once more
    return module.main(argv)


def overview() -> argparse.ArgumentParser:
    """The parser of what stands before the name of a command."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {about}" for name, about in COMMANDS.items())
    parser = OneLineParser(
        prog="llave",
        usage="llave COMMAND [argument ...]",
        description=f"Train, use and evaluate multimodal embedding models.\n\ncommands:\n{lines}",
        epilog="`llave COMMAND --help` explains the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron_llave {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


def options_of(name: str) -> ModuleType | None:
    """The module with the parser of a command, where it stands apart from the command; it loads no torch."""
    module = f"megatron_llave.options.{name}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command, for completion."""
    module = options_of(name) or importlib.import_module(f"megatron_llave.commands.{name}")
    return module.build_parser()


if __name__ == "__main__":
    sys.exit(main())

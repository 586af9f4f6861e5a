"""The option --procs of commands that several processes share: `llave evaluate --procs 8 ...`."""

import argparse
import os
from collections.abc import Sequence

from megatron_llave.errors import ConfigError, OneLineParser, require
from megatron_llave.launch.start import num_processes

HELP = "processes on this machine, which `llave` starts (one per GPU, {} without a GPU); more with parallel.tensor"
MOST = 1024
"""The largest number of processes of a node."""


def add_option(parser: argparse.ArgumentParser, without_gpu: str = "one") -> None:
    """Add --procs to the parser of a command."""
    parser.add_argument("--procs", type=int, metavar="N", help=HELP.format(without_gpu))


def asked_for(argv: Sequence[str], is_shared: bool, without_gpu: int) -> int:
    """The number of processes that a command is to have on this node.

    Args:
        argv: its arguments, of which --procs counts first, then the variable PROCS.
        is_shared: whether there is one process per GPU by default, and not a single one.
        without_gpu: their number by default where there is no GPU.

    Raises:
        ConfigError: --procs is no number of processes.
    """
    parser = OneLineParser(add_help=False)
    add_option(parser)
    asked = parser.parse_known_args(argv)[0].procs
    if asked is not None:
        require(1 <= asked <= MOST, f"--procs {asked} must be at least 1 and at most {MOST}")
        return asked
    return num_processes(without_gpu) if is_shared or "PROCS" in os.environ else 1


def require_as_started(asked: int | None) -> None:
    """Refuse --procs where something else than `llave` has started the processes, and another number of them.

    Raises:
        ConfigError: the numbers differ.
    """
    number = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if asked not in (None, number):
        raise ConfigError(f"--procs {asked}, but {number} was started on this machine; the command `llave` starts N")

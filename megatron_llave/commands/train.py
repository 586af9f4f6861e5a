"""Train as a configuration says, on all GPUs of this node, and of others where NNODES is set.

megatron_llave/launch/start.py says how the processes are started and what a signal does; train.py is what they run.
"""

from megatron_llave.config.packaged import find_config
from megatron_llave.errors import exit_with_one_line
from megatron_llave.launch import procs
from megatron_llave.launch.start import RANK, start_training
from megatron_llave.options import train as options


def main(argv: list[str]) -> int:
    """Start the ranks of a run and wait for them; returns the exit status."""
    args = options.parse(argv)
    with exit_with_one_line():
        config = find_config(args.config)
        number = procs.asked_for(argv, True, 2)
    arguments = ["--config", str(config), *(["--resume", args.resume] if args.resume else []), *args.overrides]
    return start_training([str(RANK), "train", *arguments], config, arguments, number)

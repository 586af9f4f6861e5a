"""Measure cost and benefit of gathering the negatives with 1, 2, 4, ... processes on this machine, and model clusters.

python -m benchmarks.communication --config examples/studies/tiny.yaml --processes 8 --out DIR [section.key=value ...]

Run this command in a checkout of the repository. If it is repeated, it measures only what is missing and writes the
report again. With checkpoint.init=RUN, the effective negatives are measured with the trained weights of that run.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.communication.study import plan_launches, run_communication
from megatron_llave.config.load import load_config
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line, require

PAIRS = 32
"""Number of pairs per process if train.micro_batch_size is null."""
STEPS = 8
"""Number of batches that are measured."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, and write the report."""
    parser = OneLineParser(
        prog="python -m benchmarks.communication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="configuration of model, data and loss")
    parser.add_argument("--out", required=True, help="directory of the results and of the report")
    parser.add_argument("--processes", type=int, default=2, help="largest number of processes (2)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, which overrides the file")
    args = parser.parse_intermixed_args(argv)
    # Turn SIGTERM into an exception, so that the running launch is ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with exit_with_one_line():
        require(args.out != "" and "${" not in args.out, f"--out {args.out!r} is no name for a folder of results")
        require(args.processes >= 1, f"--processes {args.processes} must be at least 1")
        cfg, out = load_config(args.config, args.overrides), Path(args.out).absolute()
        counts = [2**power for power in range(args.processes.bit_length())]
        settings = counts, cfg.train.micro_batch_size or PAIRS, STEPS, cfg.checkpoint.init
        try:
            run_communication(plan_launches(Path(args.config), args.overrides, out, *settings), out, say)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            raise ConfigError(f"--out {args.out}: {error.filename} cannot be written: {error.strerror}") from error


def say(line: str) -> None:
    """Print a line and flush it, so that it appears at once even if stdout is a file."""
    print(line, flush=True)


if __name__ == "__main__":
    main()

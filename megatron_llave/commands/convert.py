"""Convert between Hugging Face folders and checkpoints (import, export), inspect one, or compare two (verify).

`llave convert --help` explains the command; megatron_llave/options/convert.py has its options.
"""

import argparse
import sys

from megatron_llave import __version__
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.convert import hf, peft_folders
from megatron_llave.convert.inspect import inspect
from megatron_llave.convert.verify import verify
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import ConfigError, exit_with_one_line, one_of, require
from megatron_llave.hub import Destination
from megatron_llave.models import FAMILIES
from megatron_llave.options.convert import parse
from megatron_llave.training.logger import quiet_dependencies

TIMEOUT_SECONDS = 600
PUSHED = f"Exported by megatron_llave {__version__}"
"""Message of the commit that --push makes."""


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    formats = [family.hf for family in FAMILIES.values()]
    for option, kind in (("format", "layouts"), ("preset", "presets")):
        if getattr(args, option, None) is not None:
            one_of(f"--{option}", getattr(args, option), tuple(name for hf in formats for name in getattr(hf, kind)))
    if args.command == "verify":
        return verify(args.hf, args.checkpoint, args.text, args.image)
    groups = process_groups.initialize_model_parallel(ParallelConfig())
    if args.command == "inspect":
        return inspect(args.folder, groups)
    if args.command == "import":
        if args.keep_adapter:
            out = peft_folders.import_adapter(args.source, args.out, groups, args.preset, args.base, print)
        else:
            out = hf.import_hf(args.source, args.out, groups, args.preset, args.base, print)
        print(f"checkpoint: {out}")
        return 0
    require(args.push is not None or not args.public, "--public goes with --push")
    destination = Destination(args.push, args.public) if args.push else None  # before the work
    if args.adapter:
        for option, value in (("--base", args.base), ("--shard-size", args.shard_size)):
            require(value is None, f"{option} is for complete weights; leave it out with --adapter")
        peft_folders.export_adapter(args.source, args.out, groups, args.format, args.dtype, args.average)
        print(f"adapters for PEFT: {args.out}")
    else:
        size = 5.0 if args.shard_size is None else args.shard_size
        require(0 < size < 1e6, f"--shard-size {size:g} must be a number of gigabytes above 0 and below a million")
        options = (args.format, args.dtype, args.average, int(size * 1e9), args.base)
        notes = hf.export_hf(args.source, args.out, groups, *options)
        print("\n".join([f"Hugging Face folder: {args.out}", *notes]))
    if destination is not None:
        print(f"pushed: {destination.push(args.out, PUSHED)}")
    return 0


def main(argv: list[str] | None = None) -> None:
    """Run one command, in this process alone."""
    args = parse(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        if process_groups.initialize_distributed(TIMEOUT_SECONDS) > 1:
            raise ConfigError("`llave convert` runs in one process; do not start it with torchrun")
        status = run(args)
        process_groups.destroy_distributed()
    sys.exit(status)

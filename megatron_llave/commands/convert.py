"""Convert between Hugging Face folders and checkpoints (import, export), inspect one, or compare two (verify).

llave convert import --from HF_DIR --to CKPT [--preset 7b]
llave convert import --from ADAPTER_DIR --to CKPT [--base HF_DIR]
llave convert import --from ADAPTER_DIR --to CKPT --keep-adapter [--base HF_DIR]
llave convert export --from CKPT --to HF_DIR [--format llava_onevision]
llave convert export --from CKPT --to ADAPTER_DIR --adapter
llave convert export --from CKPT --to HF_DIR --push ORG/NAME
llave convert inspect DIR
llave convert verify --hf HF_DIR --checkpoint CKPT

A folder that is read may be the name of a model on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION.

docs/conversion.md has the details.
"""

import argparse
import sys

from megatron_llave import __version__
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.convert import hf, peft_folders
from megatron_llave.convert.inspect import inspect
from megatron_llave.convert.verify import verify
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line, require
from megatron_llave.hub import Destination
from megatron_llave.models import FAMILIES
from megatron_llave.training.logger import quiet_dependencies

TIMEOUT_SECONDS = 600
PUSHED = f"Exported by megatron_llave {__version__}"
"""Message of the commit that --push makes."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    formats = [family.hf for family in FAMILIES.values()]
    layouts, presets = ([name for hf in formats for name in getattr(hf, kind)] for kind in ("layouts", "presets"))
    command = commands.add_parser("import", help="convert a Hugging Face folder to a checkpoint")
    command.add_argument("--from", required=True, dest="source", help="folder with config.json and safetensors")
    command.add_argument("--to", required=True, dest="out", help="checkpoint folder to write")
    command.add_argument("--preset", choices=presets, help="fail if it is another model")
    command.add_argument("--base", help="folder of the weights that an adapter is for; default: the one it names")
    command.add_argument("--keep-adapter", action="store_true", help="a checkpoint of adapters, which are not merged")
    command = commands.add_parser("export", help="convert a checkpoint to a Hugging Face folder")
    command.add_argument("--from", required=True, dest="source", help="checkpoint or output directory (its newest)")
    command.add_argument("--to", required=True, dest="out", help="Hugging Face folder to write")
    command.add_argument("--format", choices=layouts, help="default: the format that was imported")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the imported dtypes")
    command.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    command.add_argument("--shard-size", type=float, help="maximum gigabytes per file of weights (5)")
    command.add_argument("--adapter", action="store_true", help="adapters alone, for PEFT; default: merged")
    command.add_argument("--base", help="folder of the weights that adapters are for; default: where it was")
    command.add_argument("--push", metavar="ORG/NAME[@BRANCH]", help="also push the folder to the hub, as one commit")
    command.add_argument("--public", action="store_true", help="of a repository that --push makes; default: private")
    command = commands.add_parser("inspect", help="print what a folder holds and whether it is complete")
    command.add_argument("folder")
    command = commands.add_parser("verify", help="embed a text and an image with both, and print the difference")
    command.add_argument("--hf", required=True, help="Hugging Face folder, for transformers")
    command.add_argument("--checkpoint", required=True, help="a checkpoint, or an output directory")
    command.add_argument("--text", default="A cat and a dog", help="text to embed")
    command.add_argument("--image", help="image to embed; default: a generated one")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
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
    args = build_parser().parse_args(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        if process_groups.initialize_distributed(TIMEOUT_SECONDS) > 1:
            raise ConfigError("`llave convert` runs in one process; do not start it with torchrun")
        status = run(args)
        process_groups.destroy_distributed()
    sys.exit(status)

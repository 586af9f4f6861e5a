"""The options of `llave convert`."""

import argparse
from collections.abc import Sequence

from megatron_llave.errors import OneLineParser

ABOUT = """Convert between Hugging Face folders and checkpoints (import, export), inspect one, or compare two (verify).

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


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="convert a Hugging Face folder to a checkpoint")
    command.add_argument("--from", required=True, dest="source", help="folder with config.json and safetensors")
    command.add_argument("--to", required=True, dest="out", help="checkpoint folder to write")
    command.add_argument("--preset", metavar="NAME", help="fail if it is another model than 7b, qwen2vl_2b, ...")
    command.add_argument("--base", help="folder of the weights that an adapter is for; default: the one it names")
    command.add_argument("--keep-adapter", action="store_true", help="a checkpoint of adapters, which are not merged")
    command = commands.add_parser("export", help="convert a checkpoint to a Hugging Face folder")
    command.add_argument("--from", required=True, dest="source", help="checkpoint or output directory (its newest)")
    command.add_argument("--to", required=True, dest="out", help="Hugging Face folder to write")
    command.add_argument("--format", metavar="NAME", help="default: the format that was imported")
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)

"""The options of `llave embed`."""

import argparse
from collections.abc import Sequence

from megatron_llave.errors import OneLineParser
from megatron_llave.launch import procs

ABOUT = """Embed texts and images with a checkpoint, or all inputs of a JSONL file or of a folder of training shards.

llave embed --checkpoint CKPT --text "A cat and a dog" --image cat.jpg      (a JSON line for each)
llave embed --checkpoint CKPT --jsonl IN.jsonl --out OUT.npy                (or OUT.parquet)
llave embed --checkpoint CKPT --shards DATA --out OUT.npy                   (for loss.reward=stored)

CKPT is a checkpoint, a run's output directory or a Hugging Face folder. A line of the JSONL is
{"text": ..., "image": FILE or [FILES], "id": ...}, with files relative to its folder; see docs/data.md. A command that
was interrupted continues when it is given again.
"""

INSTRUCTION = "<image>\nRepresent the given image."
"""Default of --instruction."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint, a run's output directory, a Hugging Face folder, or the name of a model on the hub",
    )
    parser.add_argument("--text", action="append", default=[], help="a text to embed; may be repeated")
    parser.add_argument("--image", action="append", default=[], help="an image to embed; may be repeated")
    parser.add_argument("--instruction", default=INSTRUCTION, help="text that goes with each --image")
    parser.add_argument("--jsonl", help="file of inputs, instead of --text and --image; needs --out")
    parser.add_argument("--shards", help="folder of training shards, all inputs of which are embedded; needs --out")
    parser.add_argument("--out", help="file to write, .npy or .parquet")
    parser.add_argument("--skip-bad", action="store_true", help="leave inputs out that cannot be read, and list them")
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    procs.add_option(parser)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)

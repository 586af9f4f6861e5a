"""The options of `llave search`."""

import argparse
from collections.abc import Sequence

from megatron_llave.errors import OneLineParser
from megatron_llave.launch import procs

ABOUT = """Search in your own images by text, by image, or by both.

llave search build --checkpoint CKPT --pictures DIR --out INDEX      (the same command brings INDEX up to date)
llave search query INDEX "red bicycle" [--image F] [--top 10] [--json]
llave search serve INDEX [--port 8765]                               (a local web page)
llave search recall INDEX                                            (what int8 and shorter vectors would find)

CKPT is a checkpoint, a run's output directory or a Hugging Face folder. Each command has its own --help. docs/search.md
has the details.
"""
PORT = 8765
KINDS = ("float32", "int8")
"""The forms of vectors in search/vectors.py."""
PROMPTS = {
    "--image-prompt": "text that goes with each image of the index; another one needs --rebuild",
    "--text-prompt": "text of a query by text, {} stands for the words",
    "--like-prompt": "text of a query by an image alone",
    "--both-prompt": "text of a query by an image and words, {} stands for the words",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for add in (add_build, add_query, add_serve, add_recall, add_demo_images):
        add(commands)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: that of this process."""
    return build_parser().parse_args(argv)


def add_build(commands: argparse._SubParsersAction) -> None:
    """Add the command that builds an index."""
    about_it = "Embed the images of a folder, or those that are new or changed since the last build."
    parser = commands.add_parser("build", help=about_it, description=about_it)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, run's output directory, Hugging Face folder")
    parser.add_argument("--pictures", required=True, help="folder of the images; folders in it are read too")
    parser.add_argument("--out", required=True, metavar="INDEX", help="folder of the index; the same command resumes")
    parser.add_argument("--vectors", choices=KINDS, help="what is searched: float32, exact; or int8, with its recall")
    parser.add_argument("--dims", type=int, help="search the first numbers of each vector alone, with their recall")
    parser.add_argument("--rebuild", action="store_true", help="embed all images again, as for another checkpoint")
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    add_prompts(parser, PROMPTS)
    procs.add_option(parser)
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as model.precision=bf16")


def add_query(commands: argparse._SubParsersAction) -> None:
    """Add the command that asks an index once."""
    about_it = "Print the images that are most similar to a text, an image, or both."
    parser = commands.add_parser("query", help=about_it, description=about_it)
    parser.add_argument("index", metavar="INDEX", help="folder of the index")
    parser.add_argument("text", nargs="?", default="", help="the words that are looked for")
    parser.add_argument("--image", help="file of an image that is looked for; with words, both are one query")
    parser.add_argument("--top", type=int, default=10, help="how many images are printed; default: 10")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model(parser)


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add the command that serves the web page."""
    about_it = "Serve a web page for searches, on this machine alone unless --host says otherwise."
    parser = commands.add_parser("serve", help=about_it, description=about_it)
    parser.add_argument("index", metavar="INDEX", help="folder of the index")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0: any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1")
    parser.add_argument("--pictures", help="where the folder of the images is now, if it has moved")
    add_model(parser)


def add_recall(commands: argparse._SubParsersAction) -> None:
    """Add the command that compares the forms of vectors."""
    about_it = (
        "Measure which share of the exact nearest images int8 and shorter vectors find. The index stays as it is."
    )
    parser = commands.add_parser("recall", help=about_it, description=about_it)
    parser.add_argument("index", metavar="INDEX", help="folder of the index")
    parser.add_argument("--dims", type=int, action="append", help="numbers of each vector; may be repeated")


def add_demo_images(commands: argparse._SubParsersAction) -> None:
    """Add the command that writes the images of `make search`."""
    about_it = "Write the OpenMoji images that the demo's model knows by name as files, to search in them."
    parser = commands.add_parser("demo-images", help=about_it, description=about_it)
    parser.add_argument("--out", required=True, help="folder to write")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that load the model of an index."""
    parser.add_argument("--checkpoint", help="where the model of the index is now, if it has moved")
    add_prompts(parser, {option: text for option, text in PROMPTS.items() if option != "--image-prompt"})
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override")


def add_prompts(parser: argparse.ArgumentParser, prompts: dict[str, str]) -> None:
    """Add an option for each prompt."""
    for option, text in prompts.items():
        parser.add_argument(option, help=f"{text}; default: as in the index, or that of the model's family")

"""Embed texts and images with a checkpoint, or all inputs of a JSONL file.

python tools/embed.py --checkpoint CKPT --text "A cat and a dog" --image cat.jpg      (a JSON line for each)
torchrun --nproc-per-node 8 tools/embed.py --checkpoint CKPT --jsonl IN.jsonl --out OUT.npy    (or OUT.parquet)

CKPT is a checkpoint, a run's output directory or a Hugging Face folder. A line of the JSONL is
{"text": ..., "image": FILE or [FILES], "id": ...}, with files relative to its folder; see docs/data.md.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from rich.progress import track

from megatron_llave.batch import Side
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import LoadedModel, embed, load_model
from megatron_llave.embedding.jsonl import count_lines, read_parts
from megatron_llave.embedding.vector_files import embedding_file
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line
from megatron_llave.training.logger import quiet_dependencies

INSTRUCTION = "<image>\nRepresent the given image."
PART = 4096
"""Number of inputs of a JSONL file that are embedded together."""


def main() -> None:
    """Load the model at the parallel layout asked for and embed; the first rank prints or writes."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="a checkpoint, a run's output directory, or a Hugging Face folder"
    )
    parser.add_argument("--text", action="append", default=[], help="a text to embed; may be repeated")
    parser.add_argument("--image", action="append", default=[], help="an image to embed; may be repeated")
    parser.add_argument("--instruction", default=INSTRUCTION, help="text that goes with each --image")
    parser.add_argument("--jsonl", help="file of inputs, instead of --text and --image; needs --out")
    parser.add_argument("--out", help="file to write, .npy or .parquet")
    parser.add_argument("--average", action="store_true", help="the averaged weights of a run with loss.reward=ema")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        if bool(args.jsonl) == bool(args.text or args.image):
            raise ConfigError("give either --jsonl, or --text and --image, as many as you like")
        if args.jsonl and not args.out:
            raise ConfigError("--jsonl needs --out FILE.npy or FILE.parquet")
        num_rows = count_lines(args.jsonl) if args.jsonl else len(args.text) + len(args.image)
        model = load_model(args.checkpoint, overrides=args.overrides, average=args.average)
        parts = embedded_file(model, args.jsonl, num_rows) if args.jsonl else embedded_arguments(model, args)
        write_parts(parts, args.out, num_rows, model, args.checkpoint)
        process_groups.destroy_distributed()


def embedded_file(model: LoadedModel, path: str, num_rows: int) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Ids and embeddings of a JSONL file, part by part."""
    parts = read_parts(path, PART)
    if dist.get_rank() == 0:
        parts = track(parts, "embedding", total=-(-num_rows // PART))
    for part in parts:
        yield [line.id for line in part.entries], embed(model, part)


def embedded_arguments(model: LoadedModel, args: argparse.Namespace) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The command line's inputs as one part: the texts, then the images."""
    names = [*args.text, *args.image]
    sides = [Side(text, []) for text in args.text] + [Side.read(args.instruction, image) for image in args.image]
    yield names, embed(model, {f"{index} ({name})": side for index, (name, side) in enumerate(zip(names, sides), 1)})


def write_parts(
    parts: Iterator[tuple[list[str], torch.Tensor]], out: str | None, num_rows: int, model: LoadedModel, source: str
) -> None:
    """Write or print the embeddings on the first rank; all ranks iterate over the parts, since they embed them."""
    is_writer = dist.get_rank() == 0
    width = model.cfg.model.language.hidden_size
    with embedding_file(out, num_rows, width, source) if out and is_writer else nullcontext() as write:
        for ids, embeddings in parts:
            if write is not None:
                write(ids, embeddings)
            elif is_writer:
                for name, row in zip(ids, embeddings.tolist()):
                    print(json.dumps({"input": name, "embedding": row}, ensure_ascii=False))
    if out and is_writer:
        print(f"{num_rows} embeddings of {width} numbers: {out}")


if __name__ == "__main__":
    main()

"""The first check with the released weights: does LLaVE-0.5B give the scores in the README of the official repository?

    python examples/first_check.py --checkpoint LLaVE-0.5B --image figures/example.jpg

--checkpoint is the Hugging Face folder of the model, or a checkpoint that tools/convert_hf.py made of it. --image
is the image in the official LLaVE repository (DeepLearnXMU/LLaVE). The exit status is 0 if both scores agree.
"""

import argparse
import sys

from megatron_llave.batch import Side
from megatron_llave.distributed import process_groups
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import OneLineParser, exit_with_one_line, require
from megatron_llave.training.logger import quiet_dependencies

QUERY = "<image> Represent the given image with the following question: What is in the image"
RELEASED = {"A cat and a dog": 0.4802, "A cat and a tiger": 0.3413}
"""Cosines that the README of the official repository prints; they are from a bfloat16 run."""
TOLERANCE = 0.01
"""bfloat16 turned the embeddings of a small model by cosines of 0.9993 to 0.9998 from float32 (tests/golden), which
moves a score by some thousandths in most directions and by at most 0.04; the two scores are 0.14 apart."""


def main() -> None:
    """Compute the scores, compare them, and print both."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="LLaVE-0.5B: a Hugging Face folder or a checkpoint")
    parser.add_argument("--image", required=True, help="figures/example.jpg of the official LLaVE repository")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as model.precision=bf16")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        query = Side.read(QUERY, args.image)
        model = load_model(args.checkpoint, overrides=args.overrides)
        family = model.cfg.model.family
        require(family == "llava_onevision", f"{args.checkpoint} is a {family}; this check is of LLaVE-0.5B alone")
        embeddings = model.embed([query, *RELEASED])
        scores = (embeddings[1:] @ embeddings[0]).tolist()
        process_groups.destroy_distributed()
    agrees = True
    for (text, released), score in zip(RELEASED.items(), scores):
        print(f"{text}: {score:.4f}, released {released:.4f}")
        agrees &= abs(score - released) <= TOLERANCE
    print(f"{'as released' if agrees else 'NOT as released'} (tolerance {TOLERANCE})")
    sys.exit(not agrees)


if __name__ == "__main__":
    main()

"""Measure embeddings per second of an evaluation, beside the official way to embed on transformers' modules.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation [--layers 1] [--queries 8] [--per-query 5] [--repeats 3]

The model is a reduced 0.5b in one CPU process: it has the real widths, heads, tiles and lengths, but few layers and a
small vocabulary. The four data sets resemble those of MMEB: images with labels, images with captions, questions about
images with answers, captions with images. Each has --queries queries, and for each query --per-query text candidates or
one image.

The official way embeds queries or candidates in batches of four in their order, padded to the longest, with a blank
image for every text. Ours packs them, sorted by length, in rows of evaluate.tokens_per_batch. Both have the same
weights, and their embeddings are compared first. `FLOPs` is the ratio by formula, and `reached` is the measured ratio
divided by it. The variants take turns; each time is the median. The result is a Markdown table.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks import released_step
from benchmarks.released_step import PaddedSides, Side, make_side
from benchmarks.training_step import build_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.embedding.embedder import LoadedModel, embed_encoded
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import build_model
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor
from megatron_llave.planning.flops import Work, forward_flops
from megatron_llave.training.logger import quiet_dependencies

SETS = {"labels": (True, False), "captions": (True, False), "answers": (True, False), "images": (False, True)}
"""Name of a set -> whether its queries and its candidates have images."""
BATCH = 4
TOLERANCE = 1e-4


def make_sets(cfg: RunConfig, queries: int, per_query: int) -> dict[str, tuple[list[Side], list[Side]]]:
    """Queries and candidates of each set."""
    rng, sets = np.random.default_rng(0), {}
    for name, (query_has_image, candidate_has_image) in SETS.items():
        count = queries if candidate_has_image else queries * per_query
        sets[name] = (
            [make_side(cfg.model, query_has_image, rng) for _ in range(queries)],
            [make_side(cfg.model, candidate_has_image, rng) for _ in range(count)],
        )
    return sets


def batches_of(sides: Sequence[Side]) -> list[Sequence[Side]]:
    """Batches as the loader of the official code makes them."""
    return [sides[start : start + BATCH] for start in range(0, len(sides), BATCH)]


def embed_released(model: torch.nn.Module, cfg: RunConfig, sides: Sequence[Side]) -> torch.Tensor:
    """Embeddings [n, h] computed the official way."""
    with torch.no_grad():
        device = process_groups.device()
        padded = (PaddedSides.of(batch, cfg.model, device, torch.float32) for batch in batches_of(sides))
        return torch.cat([released_step.embed(model, batch) for batch in padded])


def embed_ours(model: LoadedModel, sides: Sequence[Side]) -> torch.Tensor:
    """Embeddings [n, h] computed by this package."""
    with torch.no_grad():
        return embed_encoded(model, [side.sequence for side in sides])


def work_of(sides: Sequence[Side], is_padded: bool) -> Work:
    """The work for the model, either padded and with blank images, or packed."""
    total = Work(0, 0, 0)
    for batch in batches_of(sides) if is_padded else [[side] for side in sides]:
        lengths = [side.sequence.length for side in batch]
        lengths = [max(lengths)] * len(lengths)
        tiles = sum(side.num_tiles or int(is_padded) for side in batch)
        total = Work(
            total.tokens + sum(lengths), total.squared_lengths + sum(n * n for n in lengths), total.tiles + tiles
        )
    return total


def main() -> None:
    """Parse the command line, compare, time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 1), ("queries", 8), ("per-query", 5), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        run(args)
        process_groups.destroy_distributed()


def run(args: argparse.Namespace) -> None:
    """Print a row per set, and one for all sets."""
    cfg = build_config(args.layers, BATCH, args.overrides)
    process_groups.initialize_distributed(600)
    groups = process_groups.initialize_model_parallel(cfg.parallel, 0)
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=0)
    vision = cfg.model.vision
    encoder = LlavaOnevisionProcessor(None, "qwen", cfg.data.max_length, (), vision.image_size, vision.patch_size)
    ours = LoadedModel(cfg, chunks, encoder, groups)
    released = released_step.build_released(cfg.model)
    released_step.copy_weights(chunks[0], released, cfg.model)
    print(f"{torch.get_num_threads()} thread(s), {args.layers} encoder and decoder layer(s), {args.repeats} repeats\n")
    heads = ["set", "inputs", "with images", "ours /s", "released /s", "ratio", "FLOPs", "reached", "apart"]
    print("|", " | ".join(heads), "|\n|---" + "|---:" * (len(heads) - 1) + "|", flush=True)
    rows = []
    for name, sides in make_sets(cfg, args.queries, args.per_query).items():
        rows.append(measure(cfg, ours, released, sides, args.repeats))
        print_row(name, *rows[-1])
    print_row("all", *(sum(column) for column in list(zip(*rows))[:6]), max(row[6] for row in rows))


def measure(
    cfg: RunConfig, ours: LoadedModel, released: torch.nn.Module, sides: tuple[list[Side], list[Side]], repeats: int
) -> tuple[int, int, float, float, int, int, float]:
    """Inputs, those with images, seconds of ours and of the official way, FLOPs of both, and the largest difference."""
    variants = {
        "ours": lambda: torch.cat([embed_ours(ours, side) for side in sides]),
        "released": lambda: torch.cat([embed_released(released, cfg, side) for side in sides]),
    }
    apart = (variants["ours"]() - variants["released"]()).abs().max().item()  # this also warms up
    assert apart < TOLERANCE, f"embeddings are {apart} apart, more than {TOLERANCE}"
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, embed in variants.items():
            started = time.perf_counter()
            embed()
            seconds[variant].append(time.perf_counter() - started)
    flops = [sum(forward_flops(cfg.model, work_of(side, padded)) for side in sides) for padded in (False, True)]
    inputs = [side for part in sides for side in part]
    medians = [statistics.median(seconds[variant]) for variant in variants]
    return len(inputs), sum(side.size is not None for side in inputs), *medians, *flops, apart


def print_row(
    name: str, inputs: int, images: int, ours: float, released: float, own_flops: int, padded_flops: int, apart: float
) -> None:
    """Print one row of the table that the module describes."""
    ratio, flops = released / ours, padded_flops / own_flops
    cells = [name, str(inputs), str(images), f"{inputs / ours:.2f}", f"{inputs / released:.2f}", f"{ratio:.2f}"]
    print("|", " | ".join([*cells, f"{flops:.2f}", f"{100 * ratio / flops:.0f} %", f"{apart:.1e}"]), "|", flush=True)


if __name__ == "__main__":
    main()

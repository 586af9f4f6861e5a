"""Compute what packing saves: tokens, attention and tiles, beside padding as in the official LLaVE repository.

    python benchmarks/packing.py [--mix benchmarks/length_mixes.yaml | --data DIR --tokenizer FILE] [--steps 50]

Only lengths are computed; no model runs. An input has tokens (template, text, visual tokens of its tile grid) and
tiles, as this package counts them. Ours concatenates queries and targets of a micro batch without padding. The official
code has one forward pass for queries and one for targets, each padded to the longest, and every input without an image
sends a blank tile through the vision encoder, whose features are discarded. A second table has the imbalance of micro
batches and ranks (longest over mean), for equal numbers of pairs and as data/balance.py distributes them. The result is
Markdown tables.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import ModelConfig
from megatron_llave.data.balance import balance_micro_batches
from megatron_llave.data.index import read_index
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models.llava_onevision.anyres import num_visual_tokens, select_grid
from megatron_llave.models.llava_onevision.prompt import QWEN_HEAD, QWEN_TAIL
from megatron_llave.planning.pair_lengths import read_descriptions
from megatron_llave.prepare.audit import token_counter

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "tests" / "golden" / "prompts" / "qwen_subset_tokenizer.json"
"""A tokenizer with those of Qwen's merges that the template needs."""
PRESET = "0.5b"  # the grids are the same in all presets


@dataclass(frozen=True)
class SideLength:
    """What a query or target costs."""

    tokens: int
    """Tokens of template, text and images."""
    tiles: int
    """Tiles of its images."""


@dataclass(frozen=True)
class PairLength:
    """What a pair costs."""

    query: SideLength
    target: SideLength

    @property
    def tokens(self) -> int:
        """Tokens of query and target."""
        return self.query.tokens + self.target.tokens


@dataclass
class Subset:
    """Pairs to draw from."""

    share: float
    pairs: list[PairLength]


@dataclass
class Counts:
    """The work of one way to compute, summed over steps."""

    tokens: int = 0
    attention: int = 0
    """Sum of the squared lengths."""
    tiles: int = 0

    def add(self, lengths: Sequence[int], tiles: int) -> None:
        """Add one forward pass over sequences of these lengths."""
        self.tokens += sum(lengths)
        self.attention += sum(length * length for length in lengths)
        self.tiles += tiles


def count_tiles(width: int, height: int, model: ModelConfig) -> int:
    """The number of tiles of an image: base tile and grid."""
    columns, rows = select_grid(width, height, grids_of(model), model.vision.image_size)
    return 1 + columns * rows


def count_visual_tokens(width: int, height: int, model: ModelConfig) -> int:
    """The number of visual tokens of an image when packed."""
    vision = model.vision
    return num_visual_tokens(
        width, height, grids_of(model), vision.image_size, vision.patches_per_side, model.anyres_max_tiles
    )


def grids_of(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The tile grids as hashable tuples."""
    return tuple((columns, rows) for columns, rows in model.image_grids)


def draw_mix(path: Path, model: ModelConfig, num_pairs: int, rng: np.random.Generator) -> dict[str, Subset]:
    """Draw pairs of every subset that a mix describes."""
    mix = yaml.safe_load(path.read_text())
    tokenizer = load_tokenizer(TOKENIZER)
    template = len(tokenizer.encode(QWEN_HEAD)) + len(tokenizer.encode(QWEN_TAIL))

    def draw_side(side: dict) -> SideLength:
        mean, deviation = side["text"]
        variance = np.log(1 + (deviation / mean) ** 2)
        text = max(1, round(rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance))))
        if "image" not in side:
            return SideLength(template + text, 0)
        choices = mix["pictures"][side["image"]]
        weights = np.array([weight for _, _, weight in choices], float)
        width, height, _ = choices[rng.choice(len(choices), p=weights / weights.sum())]
        visual = count_visual_tokens(width, height, model)
        return SideLength(template + text + visual, count_tiles(width, height, model))

    return {
        name: Subset(s["share"], [PairLength(draw_side(s["query"]), draw_side(s["target"])) for _ in range(num_pairs)])
        for name, s in mix["subsets"].items()
    }


def read_folder(folder: Path, tokenizer: Path, model: ModelConfig) -> dict[str, Subset]:
    """Read the lengths of the pairs in a folder of shards; no image is decoded."""
    count_tokens = token_counter(tokenizer, PRESET)

    def measure(side: dict) -> SideLength:
        sizes = side["sizes"]
        return SideLength(count_tokens(side["text"], sizes), sum(count_tiles(*size, model) for size in sizes))

    subsets = {}
    for name, subset in read_index(folder).subsets.items():
        described = (d for shard in subset.shards for d, _ in read_descriptions(folder / shard.file))
        pairs = [PairLength(measure(d["query"]), measure(d["target"])) for d in described]
        subsets[name] = Subset(subset.pairs, pairs)
    return subsets


def draw_steps(
    subsets: dict[str, Subset], batch: int, steps: int, is_mixed: bool, rng: np.random.Generator
) -> Iterator[list[PairLength]]:
    """Draw global batches, each from one subset or from all of them."""
    names = list(subsets)
    shares = np.array([subsets[name].share for name in names], float)
    shares /= shares.sum()
    for _ in range(steps):
        chosen = rng.choice(len(names), batch if is_mixed else 1, p=shares)
        chosen = chosen if is_mixed else chosen.repeat(batch)
        pools = [subsets[names[i]].pairs for i in chosen]
        yield [pool[rng.integers(len(pool))] for pool in pools]


def count_packed(pairs: Sequence[PairLength], counts: Counts) -> None:
    """Count a micro batch whose sequences are concatenated."""
    sides = [side for pair in pairs for side in (pair.query, pair.target)]
    counts.add([side.tokens for side in sides], sum(side.tiles for side in sides))


def count_padded(pairs: Sequence[PairLength], counts: Counts) -> None:
    """Count a micro batch as the official code pads it: one forward pass for queries, one for targets."""
    for sides in ([pair.query for pair in pairs], [pair.target for pair in pairs]):
        longest = max(side.tokens for side in sides)
        counts.add([longest] * len(sides), sum(side.tiles or 1 for side in sides))  # 1 is the blank tile


def padding_table(subsets: dict[str, Subset], args: argparse.Namespace) -> None:
    """Print the ratios of padded to packed work."""
    print("| batches | pairs per micro batch | tokens per pair, packed | tokens | attention | tiles |")
    print("|---|---:|---:|---:|---:|---:|")
    for is_mixed in (False, True):
        for micro in args.micro_batch:
            packed, padded, rng = Counts(), Counts(), np.random.default_rng(args.seed)
            for pairs in draw_steps(subsets, args.batch, args.steps, is_mixed, rng):
                for start in range(0, len(pairs), micro):
                    count_packed(pairs[start : start + micro], packed)
                    count_padded(pairs[start : start + micro], padded)
            ratios = [padded.tokens / packed.tokens, padded.attention / packed.attention]
            ratios.append(padded.tiles / max(1, packed.tiles))
            cells = [f"{packed.tokens / args.batch / args.steps:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
            print("|", " | ".join(["mixed" if is_mixed else "one subset", str(micro), *cells]), "|", flush=True)
    print()


def imbalance_table(subsets: dict[str, Subset], args: argparse.Namespace) -> None:
    """Print the ratios of longest to mean, averaged over steps."""
    heads = ["batches", "ranks", "micro batches of a rank"]
    heads += ["micro batches, equal numbers", "dealt by tokens", "ranks"]
    print("|", " | ".join(heads), "|\n|---" + "|---:" * (len(heads) - 1) + "|")
    for is_mixed in (False, True):
        for ranks in args.ranks:
            share = args.batch // ranks
            for number in sorted({max(1, share // micro) for micro in args.micro_batch}, reverse=True):
                rng = np.random.default_rng(args.seed)
                steps = draw_steps(subsets, args.batch, args.steps, is_mixed, rng)
                means = np.mean([imbalance(pairs, ranks, number) for pairs in steps], axis=0)
                cells = ["mixed" if is_mixed else "one subset", str(ranks), str(number)]
                print("|", " | ".join([*cells, *(f"{mean:.2f}" for mean in means)]), "|", flush=True)
    print()


def imbalance(pairs: Sequence[PairLength], ranks: int, micro_batches: int) -> tuple[float, float, float]:
    """Longest micro batch of a rank over the mean, for equal numbers and for balanced ones; then longest rank over
    mean."""
    equal, dealt, totals = [], [], []
    share = len(pairs) // ranks
    for rank in range(ranks):
        lengths = [pair.tokens for pair in pairs[rank * share : (rank + 1) * share]]
        mean = sum(lengths) / micro_batches
        totals.append(sum(lengths))
        equal.append(max(part.sum() for part in np.array_split(np.array(lengths), micro_batches)) / mean)
        parts = balance_micro_batches(lengths, micro_batches)
        dealt.append(max(sum(lengths[i] for i in part) for part in parts) / mean)
    return float(np.mean(equal)), float(np.mean(dealt)), max(totals) / (sum(totals) / ranks)


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", type=Path, default=HERE / "length_mixes.yaml", help="YAML file of lengths")
    parser.add_argument("--data", type=Path, help="folder of shards, instead of a mix")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="with --data: Qwen's tokenizer.json")
    parser.add_argument("--batch", type=int, default=256, help="pairs per step (256)")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4, 8], help="pairs per micro batch (4 and 8)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], help="data-parallel ranks (8 and 32)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with exit_with_one_line():
        model = config_from_dict({"model": {"preset": PRESET}}).model
        rng = np.random.default_rng(args.seed)
        subsets = (
            read_folder(args.data, args.tokenizer, model) if args.data else draw_mix(args.mix, model, args.batch, rng)
        )
        print("Padded over packed:\n")
        padding_table(subsets, args)
        print("Longest over mean, in tokens:\n")
        imbalance_table(subsets, args)


if __name__ == "__main__":
    main()

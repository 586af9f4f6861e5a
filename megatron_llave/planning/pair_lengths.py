"""Lengths of pairs: tokens and tiles of queries and targets, from a folder of shards or for a mixture like MMEB.

The planner uses them. No image is decoded and no model runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from megatron_llave.config.checks import require_sizes
from megatron_llave.config.data import DataConfig
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.index import Shard, Subset, read_index
from megatron_llave.data.mixture import build_mixture
from megatron_llave.data.shards import described_sides, unpack_json, well_described
from megatron_llave.data.tar_members import TarSample, find_samples, read_sample, unreadable
from megatron_llave.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from megatron_llave.errors import DataError
from megatron_llave.models import family_of, require_prompt

PAIRS_COUNTED = 20_000
"""Pairs of a subset that inspect reads: all of a smaller subset, about this many of a larger one."""

CHUNK = 1 << 20
"""Bytes of a file that are read at a time."""

Sizes = list[list[int]]
"""[width, height] of each image of a query or target, pixels."""


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of a query or target as training packs it, but without a limit to its length."""

    tokenizer: Tokenizer
    data: DataConfig
    model: ModelConfig

    def __call__(self, text: str, sizes: Sizes, is_video: bool = False, seconds: Sequence[float] = ()) -> int:
        """Return the number of tokens, visual ones included.

        The sizes may be those of a video's frames, which were taken at `seconds` if these are known.

        Raises:
            DataError: more placeholders than images.
        """
        count_tokens = family_of(self.model).count_tokens
        return count_tokens(text, sizes, is_video, self.tokenizer, self.data, self.model, seconds)


def sample_shards(subset: Subset) -> list[Shard]:
    """Return all shards of a small subset, or evenly spaced ones of a large subset; always the same ones."""
    shards = subset.shards
    wanted = max(1, -(-len(shards) * PAIRS_COUNTED // max(subset.pairs, 1)))
    if wanted >= len(shards):
        return shards
    return [shards[number * len(shards) // wanted] for number in range(wanted)]


def read_descriptions(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the JSON of each sample, without reading images, and the name of the sample for messages."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        for sample in find_samples(file, path):
            where = f"{path}: sample {sample.key}"
            member = {suffix: place for suffix, place in sample.members.items() if suffix == "json"}
            yield unpack_json(read_sample(file, path, TarSample(sample.key, member, sample.problem)), where), where


PAIRS_READ = 1000
"""Pairs of each subset that planning reads."""
PHOTO, SQUARE = (640, 480), (512, 512)
MMEB_LIKE = [
    (403, (PHOTO, 45), (None, 29)),
    (167, (None, 91), (PHOTO, 30)),
    (76, (PHOTO, 45), (PHOTO, 30)),
    (16, (SQUARE, 34), (SQUARE, 28)),
]
"""Pairs in thousands; then for query and target the size of the image and the tokens of text and template. These are
the 20 training subsets of MMEB as benchmarks/length_mixes.yaml estimates them, grouped by where the images are."""


@dataclass(frozen=True)
class SideShape:
    """Lengths of a query or target."""

    tokens: int
    """Tokens, visual ones included."""
    visual_tokens: int = 0
    tiles: int = 0
    patch_pairs: int = 0
    """See planning.flops.Work."""
    videos: int = 0
    """Number of videos among its images."""


Shape = tuple[SideShape, ...]
"""Lengths of a query and then of its targets, mostly one."""


@dataclass(frozen=True)
class Kind:
    """A kind of pairs that a batch is made of: those of a subset."""

    share: float
    """Share of the batches, relative to those of other kinds."""
    pairs: list[Shape]


def images_shape(sizes: Sizes, data: DataConfig, model: ModelConfig, is_video: bool = False) -> SideShape:
    """Return what images of these sizes, or the frames of a video, add to an input; `tokens` are 0."""
    family = family_of(model)
    if is_video:
        video = (len(sizes), *sizes[0], data, model)
        return SideShape(0, *family.video_lengths(*video), family.cost.video_pairs(*video), 1)
    lengths = [family.image_lengths(*size, data, model) for size in sizes]
    pairs = sum(family.cost.image_pairs(*size, data, model) for size in sizes)
    return SideShape(0, sum(visual for visual, _ in lengths), sum(tiles for _, tiles in lengths), pairs)


def mmeb_like(cfg: RunConfig) -> list[Kind]:
    """Return MMEB_LIKE with the images as the model of a run sees them.

    Raises:
        ConfigError: the configuration does not have the model's sizes.
    """
    require_sizes(cfg)
    data, model = cfg.data, cfg.model

    def shape(image: tuple[int, int] | None, text: int) -> SideShape:
        images = images_shape([list(image)] if image else [], data, model)
        return replace(images, tokens=min(text + images.visual_tokens, data.max_length))

    return [Kind(share, [(shape(*query), shape(*target))]) for share, query, target in MMEB_LIKE]


def read_kinds(folder: str | Path, cfg: RunConfig) -> list[Kind]:
    """Return the kinds of pairs that a run draws from a folder of shards: the first pairs of evenly spaced shards.

    Raises:
        ConfigError: the mixture cannot be drawn from the folder, the configuration does not have the model's sizes, or
            the family has no such prompt.
        DataError: the folder or the tokenizer cannot be used.
    """
    require_sizes(cfg)
    require_prompt(family_of(cfg.model), cfg.data.prompt)
    folder, index = Path(folder), read_index(folder)
    counter = TokenCounter(load_tokenizer(find_tokenizer(cfg.data)), cfg.data, cfg.model)
    kinds = []
    for name, source in build_mixture(cfg, index).sources.items():
        shards = sample_shards(index.subsets[name])
        per_shard = -(-PAIRS_READ // len(shards))
        files = [folder / shard.file for shard in shards]
        described = chain.from_iterable(islice(read_descriptions(file), per_shard) for file in files)
        pairs = list(_shapes(described, counter, cfg.data))
        if not pairs:
            raise DataError(f"{folder}: no pair of subset {name} can be used")
        kinds.append(Kind(source.weight, pairs))
    return kinds


def _shapes(
    described: Iterator[tuple[dict[str, Any], str]], counter: TokenCounter, data: DataConfig
) -> Iterator[Shape]:
    """Yield the lengths of the pairs that training does not leave out."""
    for pair, where in described:
        with well_described(where):
            query, targets, _ = described_sides(pair)
            sides = (query, *targets[: data.positives])
            try:
                shape = tuple(_side_shape(side, counter, data.max_length) for side in sides)
            except DataError:
                continue
        yield shape


def _side_shape(side: dict[str, Any], counter: TokenCounter, max_length: int) -> SideShape:
    sizes, is_video = side["sizes"], side.get("video") is True
    images = images_shape(sizes, counter.data, counter.model, is_video)
    tokens = counter(side["text"], sizes, is_video, side.get("seconds", ()))
    return replace(images, tokens=min(tokens, max_length))


def sides_of(pair: Shape, hard_negatives: int) -> list[SideShape]:
    """Return the sides of a pair with hard negatives, which count like its first target."""
    return [*pair, *[pair[1]] * hard_negatives]


def longest_batch(kinds: list[Kind], pairs: int, hard_negatives: int = 0) -> list[SideShape]:
    """Return the sides of the longest micro batch of `pairs` pairs of one kind."""
    candidates = []
    for kind in kinds:
        sides = [sides_of(pair, hard_negatives) for pair in kind.pairs]
        sides.sort(key=_tokens, reverse=True)
        longest = islice(cycle(sides), pairs)  # a kind may have fewer
        candidates.append(list(chain.from_iterable(longest)))
    return max(candidates, key=_tokens)


def scaled_longest(kinds: list[Kind], tokens: int) -> Shape:
    """Return a pair of `tokens` tokens in the proportions of the longest pair of these kinds, tiles included."""
    longest = max((pair for kind in kinds for pair in kind.pairs), key=_tokens)
    total = _tokens(longest)
    return tuple(SideShape(*(-(-x * tokens // total) for x in astuple(side))) for side in longest)


def targets_per_pair(kinds: list[Kind]) -> float:
    """Return the mean number of targets of the pairs of the kind that has the most of them."""
    return max(sum(len(pair) - 1 for pair in kind.pairs) / len(kind.pairs) for kind in kinds)


def _tokens(sides: Sequence[SideShape]) -> int:
    return sum(side.tokens for side in sides)

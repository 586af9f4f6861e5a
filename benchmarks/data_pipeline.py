"""Measure pairs per second from shards to packed micro batches, beside two plain ways to feed such a model.

    OMP_NUM_THREADS=1 python benchmarks/data_pipeline.py [--pairs 1280] [--batch 32] [--workers 2] [--folder DIR]

The benchmark makes synthetic photos (JPEG, in sizes of COCO, VOC, ImageNet and news images) and pairs of them, whose
modalities are those of the 20 training subsets of MMEB: 13 image with text -> text, 4 text -> image, 3 image -> image.
It then times, in turn, endless shuffled streams:

- ours: the training stream of a 0.5b run, batches from one subset, packed queries and targets, uint8 tiles;
- processor: a torch Dataset of the same files with transformers' LlavaOnevisionProcessor in the collate function;
  queries and targets are each padded to the longest, float32 tiles are padded to the largest number per image. It runs
  once with the image processor for Pillow and, if torchvision is installed, once with that for torchvision. Inputs
  without an image get no blank image;
- webdataset: `webdataset.WebDataset` over the same shards in their order, followed by our processor and packing.

After some warm-up batches, each variant is timed over as many pairs as there are. The result is Markdown tables.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers import AddedToken, ByteLevelBPETokenizer
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from megatron_llave.batch import Pair, PairBatch, Side
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.schema import RunConfig
from megatron_llave.data import readers, shard_reader
from megatron_llave.data.index import Index, read_index, write_index
from megatron_llave.data.packing import Processor, encode_pairs, pack_pairs
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import unpack_pair, write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import build_processor
from megatron_llave.models.llava_onevision import anyres, processor
from megatron_llave.models.llava_onevision.prompt import qwen_prompt, user_content

Variant = Callable[[RunConfig], Iterator[int]]
"""A variant: it yields the number of pairs of each batch that it has made."""

SHARES = {"image_text": 13, "text_image": 4, "image_image": 3}
"""Number of MMEB's 20 training subsets by modality; each gets the same number of pairs."""
META_TASKS = {"image_text": "vqa", "text_image": "retrieval", "image_image": "retrieval"}
SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (375, 500), (500, 333), (1024, 768), (512, 512))
WORDS = "a the cat dog car street woman man red blue large small near under holding riding two three on with".split()
QUERY_WORDS, TARGET_WORDS = 20, 6
PAIRS_PER_SHARD = 64
"""A small number, so that the benchmark has enough shards for webdataset's workers to share."""
JPEG_QUALITY = 90
VOCABULARY = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
WARM_BATCHES = 4
CHECK_EVERY = 40
"""One of this many pairs is compared with the result of the processor."""
MAX_LENGTH = 4096
TIMED = {
    "read a pair": (shard_reader.ShardReader, "read"),
    "decode": (processor, "decode_image"),
    "resize, cut tiles": (anyres, "cut_tiles"),
    "tokenize": (processor, "encode_prompt"),
    "pack": (readers, "pack_pairs"),
    "into one buffer": (readers, "pack_step"),
}
"""Stages of our stream: name -> the function that does the work."""


@dataclass(frozen=True)
class FileSide:
    """A query or target as files, for the variant without shards."""

    text: str
    paths: tuple[Path, ...]

    def read(self) -> Side:
        """Read the bytes of the images."""
        return Side.read(self.text, *self.paths)


@dataclass(frozen=True)
class Sample:
    """A pair as files."""

    query: FileSide
    target: FileSide


def make_photo(path: Path, rng: np.random.Generator) -> None:
    """Write an image of soft shapes with some noise; its file is about as large as that of a photo of its size."""
    width, height = SIZES[rng.integers(len(SIZES))]
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noisy = soft + rng.normal(0, 6, soft.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=JPEG_QUALITY)


def make_data(folder: Path, num_pairs: int) -> dict[str, list[Sample]]:
    """Make images, shards, index and tokenizer; returns the same pairs as files, by subset."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    samples: dict[str, list[Sample]] = {}
    number = itertools.count()

    def side(has_image: bool, num_words: int) -> FileSide:
        text = " ".join(rng.choice(WORDS, num_words))
        if not has_image:
            return FileSide(text, ())
        path = folder / "photos" / f"{next(number):06d}.jpg"
        make_photo(path, rng)
        return FileSide(text, (path,))

    index = Index({})
    for name, share in SHARES.items():
        first, second = name.split("_")
        samples[name] = [
            Sample(side(first == "image", QUERY_WORDS), side(second == "image", TARGET_WORDS))
            for _ in range(num_pairs * share // sum(SHARES.values()))
        ]
        pairs = (
            Pair(f"{name}-{i}", name, sample.query.read(), sample.target.read(), f"q{i}", f"t{i}")
            for i, sample in enumerate(samples[name])
        )
        index.subsets[name] = write_subset(pairs, folder, name, META_TASKS[name], PAIRS_PER_SHARD)
    sides = (side for part in samples.values() for sample in part for side in (sample.query, sample.target))
    make_tokenizer(folder, [side.text for side in sides])
    write_index(folder, index)
    return samples


def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """Write a small byte-level BPE tokenizer with Qwen's special tokens and <image>, which transformers' processor
    needs."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_processor(folder: Path, cfg: RunConfig, backend: str) -> LlavaOnevisionProcessor:
    """transformers' processor with the tile grids of the run, and its image processor for Pillow or torchvision."""
    size = cfg.model.vision.image_size
    grids = [[rows * size, columns * size] for columns, rows in cfg.model.image_grids]
    settings = {"size": {"height": size, "width": size}, "image_grid_pinpoints": grids}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")
    kind = LlavaOnevisionImageProcessorPil
    if backend == "torchvision":
        from transformers import LlavaOnevisionImageProcessor as kind  # this import needs torchvision

    class NoVideo(LlavaOnevisionProcessor):
        """A processor without a video processor, which would need torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            return type(argument)

    aspect = f"anyres_max_{cfg.model.anyres_max_tiles}"
    patches = cfg.model.vision.patches_per_side**2
    return NoVideo(kind(**settings), tokenizer, None, patches, "full", vision_aspect_ratio=aspect)


class FileDataset(Dataset):
    """The plain way: a sample is opened when it is needed."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.samples)

    def __getitem__(self, number: int) -> Sample:
        """A sample; `collate` opens its images in the same process."""
        return self.samples[number]


def collate(samples: list[Sample], processor: LlavaOnevisionProcessor) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Padded queries, padded targets, and the number of pairs."""
    return *(_pad([getattr(s, side) for s in samples], processor) for side in ("query", "target")), len(samples)


def _pad(sides: list[FileSide], processor: LlavaOnevisionProcessor) -> dict[str, Any]:
    texts = [qwen_prompt(user_content(side.text, len(side.paths))) for side in sides]
    images = [Image.open(path).convert("RGB") for side in sides for path in side.paths]
    made = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    return {name: value for name, value in made.items()}


def endless_batches(samples: dict[str, list[Sample]], batch: int) -> Iterator[list[int]]:
    """Shuffled batches of positions in all samples; a batch is from one subset, and the subsets take turns."""
    rng = np.random.default_rng(0)
    bounds = np.cumsum([0, *map(len, samples.values())])
    while True:
        parts = [start + rng.permutation(end - start) for start, end in itertools.pairwise(bounds)]
        batches = [part[i : i + batch].tolist() for part in parts for i in range(0, len(part), batch)]
        yield from (batches[i] for i in rng.permutation(len(batches)))


def processor_variant(cfg: RunConfig, folder: Path, samples: dict[str, list[Sample]], backend: str) -> Iterator[int]:
    """The variant with transformers' processor; yields the pairs of each batch."""
    loader = DataLoader(
        FileDataset(list(itertools.chain(*samples.values()))),
        batch_sampler=endless_batches(samples, cfg.train.global_batch_size),
        collate_fn=partial(collate, processor=make_processor(folder, cfg, backend)),
        num_workers=cfg.data.workers,
    )
    return (num_pairs for _, _, num_pairs in loader)


def webdataset_variant(cfg: RunConfig, encoder: Processor) -> Iterator[int]:
    """The variant with webdataset; yields the pairs of each batch."""
    folder = Path(cfg.data.path)
    shards = [str(folder / s.file) for subset in read_index(folder).subsets.values() for s in subset.shards]
    dataset = webdataset.WebDataset(shards, shardshuffle=False, workersplitter=webdataset.split_by_worker).repeat()
    dataset = dataset.batched(cfg.train.global_batch_size, collation_fn=partial(_encode_samples, encoder=encoder))
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=cfg.data.workers)
    return (batch.num_pairs for batch in loader)


def _encode_samples(samples: list[dict[str, Any]], encoder: Processor) -> PairBatch:
    pairs = [unpack_pair(_without_notes(sample), sample["__url__"]) for sample in samples]
    encoded = encode_pairs(pairs, encoder, 0, print)
    return pack_pairs(encoded, 0, "", 1, encoder.tile_shape)


def _without_notes(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample without the keys that webdataset adds."""
    return {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}


def our_variant(cfg: RunConfig, encoder: Processor) -> Iterator[int]:
    """Our stream; yields the pairs of each step."""
    stream = build_train_stream(cfg, encoder, rank=0, world=1, pad_to_multiple=1)
    return (sum(batch.num_pairs for batch in unpack_step(step).batches) for step in stream)


def pairs_per_second(variant: Iterator[int], num_pairs: int) -> float:
    """Pairs per second over the batches that hold `num_pairs`, after WARM_BATCHES."""
    for _ in range(WARM_BATCHES):
        next(variant)
    done, started = 0, time.perf_counter()
    while done < num_pairs:
        done += next(variant)
    return done / (time.perf_counter() - started)


def check_same_work(folder: Path, samples: list[Sample], cfg: RunConfig, encoder: Processor, backend: str) -> str:
    """Compare lengths and tiles of some inputs; returns a line about the differences."""
    processor = make_processor(folder, cfg, backend)
    worst, other_lengths = 0.0, 0
    for sample in samples:
        for side in (sample.query, sample.target):
            ours = encoder.encode(side.read())
            theirs = _pad([side], processor)
            other_lengths += ours.length != theirs["input_ids"].shape[1]
            if side.paths:
                tiles = torch.from_numpy(np.concatenate(ours.tiles)).float() / 127.5 - 1
                worst = max(worst, (tiles - theirs["pixel_values"][0]).abs().max().item() * 127.5)
    lengths = f"{other_lengths} of {2 * len(samples)} sides are of another length"
    return f"{lengths}, pixels at most {worst:.2f} of 255 levels apart"


def time_stages(cfg: RunConfig, encoder: Processor, num_pairs: int) -> dict[str, float]:
    """Seconds of our stream per stage, in one process; the last entry is everything else."""
    seconds: Counter[str] = Counter()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] += time.perf_counter() - started

        return run

    with ExitStack() as patches:
        for stage, (owner, name) in TIMED.items():
            patches.enter_context(mock.patch.object(owner, name, timed(stage, getattr(owner, name))))
        started = time.perf_counter()
        done = 0
        for made in our_variant(cfg, encoder):
            done += made
            if done >= num_pairs:
                break
        total = time.perf_counter() - started
    return {**{stage: seconds[stage] for stage in TIMED}, "the rest": total - sum(seconds.values())}


def print_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a Markdown table whose first column is text."""
    head = list(head)
    print("|", " | ".join(head), "|\n|---" + "|---:" * (len(head) - 1) + "|")
    for row in rows:
        print("|", " | ".join(row), "|", flush=True)
    print(flush=True)


def time_variants(variants: dict[str, Variant], cfg: RunConfig, num_pairs: int, repeats: int) -> None:
    """Time the variants in turn, and print one row for each."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            speeds[name].append(pairs_per_second(variant(cfg), num_pairs))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    rows = [
        [name, f"{median[name]:.1f}", f"{min(values):.1f} to {max(values):.1f}", f"{median['ours'] / median[name]:.2f}"]
        for name, values in speeds.items()
    ]
    print_table(["variant", "pairs/s", "range", "ours / variant"], rows)


def run(args: argparse.Namespace, folder: Path) -> None:
    """Make the data, time all variants in turn, and print the tables."""
    samples = make_data(folder, args.pairs)
    everything = list(itertools.chain(*samples.values()))
    sizes = [path.stat().st_size for path in (folder / "photos").iterdir()]
    print(f"{len(everything)} pairs, {len(sizes)} images of {statistics.fmean(sizes) / 1e3:.0f} kB on average.\n")
    values = {
        "model": {"preset": "0.5b"},
        "data": {"path": str(folder), "max_length": MAX_LENGTH},
        "train": {"steps": 1, "global_batch_size": args.batch},
    }
    cfg = config_from_dict(values)
    encoder = build_processor(cfg.data, cfg.model)
    variants: dict[str, Variant] = {"ours": partial(our_variant, encoder=encoder)}
    for backend in ("Pillow", "torchvision") if is_torchvision_available() else ("Pillow",):
        same = check_same_work(folder, everything[::CHECK_EVERY], cfg, encoder, backend)
        print(f"Ours beside the processor for {backend}: {same}.\n")
        variants[f"processor, {backend}"] = partial(processor_variant, folder=folder, samples=samples, backend=backend)
    variants["webdataset, our encoder"] = partial(webdataset_variant, encoder=encoder)
    for workers in sorted({0, args.workers}):
        cfg.data.workers = workers
        print(f"{workers} worker processes:\n" if workers else "In one process:\n")
        time_variants(variants, cfg, len(everything), args.repeats)
    cfg.data.workers = 0
    stages = time_stages(cfg, encoder, len(everything))
    total = sum(stages.values())
    rows = [[stage, f"{1e3 * s / len(everything):.2f}", f"{s / total:.0%}"] for stage, s in stages.items()]
    print_table(["stage of ours, in one process", "ms per pair", "share"], rows)


def main() -> None:
    """Parse the command line. Without --folder, the data are in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs",
        type=int,
        default=1280,
        help="number of pairs; a multiple of 20 batches keeps the shares exact (1280)",
    )
    parser.add_argument("--batch", type=int, default=32, help="pairs per batch (32)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the second table (2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="empty folder for the data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with exit_with_one_line(), tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run(args, folder)


if __name__ == "__main__":
    main()

"""Says what a finished folder of shards holds (`prepare_data.py inspect`) and whether it is intact (`verify`).

inspect reads the JSON of the samples and decodes no image; verify reads every byte and decodes every image.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.config.load import config_from_dict
from megatron_llave.data.image_files import (
    MAX_PIXELS,
    BadImageError,
    ImageSettings,
    TooLargeError,
    decode_image,
    open_image,
)
from megatron_llave.data.index import INDEX_FILE, Index, Shard, Subset, check_size, read_index
from megatron_llave.data.mined_negatives import MANIFEST_FILE, parse_manifest
from megatron_llave.data.placeholders import remove_placeholders
from megatron_llave.data.shards import (
    NEGATIVES,
    described_sides,
    unpack_json,
    unpack_list,
    unpack_pair,
    well_described,
)
from megatron_llave.data.tar_members import find_samples, read_sample, unreadable
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import AGAIN, parse_json, read_lines, sha256_of
from megatron_llave.planning.pair_lengths import Sizes, TokenCounter, read_descriptions, sample_shards
from megatron_llave.prepare.shard_jobs import JOBS_PER_WORKER, NOTICED, REPORT_FILE, Progress
from megatron_llave.prepare.worker_pool import run_in_order, worker_pool

SidesOf = Callable[[dict[str, Any], str], tuple[object, list[dict[str, Any]]]]
"""Takes a sample and its name for messages; returns its subset and what its JSON says of each input in it."""


@dataclass
class SubsetCounts:
    """The counts of inspect for one subset."""

    subset: Subset
    """The index's entry for the subset."""
    counted: int = 0
    """Number of pairs that were read; the other counts are of these pairs."""
    query: Counter[str] = field(default_factory=Counter)
    """Number of queries that are `text`, `image` or `both`."""
    target: Counter[str] = field(default_factory=Counter)
    """Number of targets that are `text`, `image` or `both`."""
    with_hard_negatives: int = 0
    with_several_targets: int = 0
    with_scores: int = 0


@dataclass
class Inspection:
    """The result of inspect for a folder."""

    subsets: dict[str, SubsetCounts]
    lengths: dict[str, dict[str, Counter[int]]]
    """The measure (`tokens`, or `characters` and `pixels`) -> query, target or hard negative -> number of inputs by
    length. For pixels the length is the longer edge of an image, and images are counted."""
    not_encodable: int = 0
    """Number of inputs that training could not encode and would drop."""
    noticed: dict[str, Counter[str]] = field(default_factory=dict)
    """What was noticed about images when the folder was made: subset -> note -> number of images."""


@dataclass
class ShardCheck:
    """The result of verify for one shard."""

    problems: list[str] = field(default_factory=list)
    """A line for every problem, with the file and, if there is one, the key of the sample."""
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of the samples' keys."""
    noticed: list[tuple[str, str]] = field(default_factory=list)
    """A note of data.image_files.decode_image, and the key and member of the image, for each note on an image."""


def token_counter(tokenizer: str | Path, preset: str) -> TokenCounter:
    """Return a counter of tokens for a run of this preset with the prompt template that it is trained with.

    Raises:
        ConfigError: the preset does not exist.
        DataError: the tokenizer cannot be read.
    """
    prompt = "plain" if preset.startswith("tiny") else "qwen"
    cfg = config_from_dict({"model": {"preset": preset}, "data": {"prompt": prompt}})
    return TokenCounter(load_tokenizer(tokenizer), cfg.data, cfg.model)


def inspect(
    directory: str | Path,
    tokenizer: str | Path | None = None,
    preset: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Inspection:
    """Count pairs, modalities and lengths.

    Args:
        directory: a finished folder of shards.
        tokenizer: file of the tokenizer; with it and `preset`, lengths are counted in tokens.
        preset: the model whose tokens per image are counted.
        progress: called after each shard.

    Raises:
        ConfigError: only one of tokenizer and preset is given, or the preset is unknown.
        DataError: the folder is not finished, or is damaged.
    """
    if (tokenizer is None) != (preset is None):
        raise ConfigError("token lengths need both --tokenizer and --preset, other lengths neither")
    count_tokens = token_counter(tokenizer, preset) if tokenizer is not None and preset is not None else None
    directory = Path(directory)
    result = Inspection({name: SubsetCounts(subset) for name, subset in read_index(directory).subsets.items()}, {})
    chosen = [(counts, shard) for counts in result.subsets.values() for shard in sample_shards(counts.subset)]
    for done, (counts, shard) in enumerate(chosen, start=1):
        for described, where in read_descriptions(directory / shard.file):
            with well_described(where):
                _count(described, counts, result, count_tokens)
        progress("shards", done, len(chosen))
    result.noticed = read_noticed(directory)
    return result


def read_noticed(directory: str | Path) -> dict[str, Counter[str]]:
    """Return what the report of a folder's preparation noticed about images; empty without a report.

    Raises:
        DataError: the report is damaged.
    """
    file = Path(directory) / REPORT_FILE
    noticed: dict[str, Counter[str]] = {}
    for number, written in read_lines(file) if file.exists() else ():
        line = parse_json(written, f"{file}:{number}")
        try:
            if line["reason"].startswith(NOTICED):
                noticed.setdefault(line["subset"], Counter())[line["reason"].removeprefix(NOTICED)] += 1
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}:{number} must be an object with subset, row, reason and detail") from error
    return noticed


def _count(
    described: dict[str, Any],
    counts: SubsetCounts,
    result: Inspection,
    count_tokens: TokenCounter | None,
) -> None:
    query, targets, negatives = described_sides(described)
    counts.counted += 1
    counts.with_hard_negatives += bool(negatives)
    counts.with_several_targets += len(targets) > 1
    counts.with_scores += "score" in targets[0]
    sides = [("query", query), *(("target", side) for side in targets)]
    for kind, side in sides:
        getattr(counts, kind)[_modality(side["text"], side["sizes"])] += 1
    sides += [("hard negative", side) for side in negatives]
    for kind, side in sides:
        if count_tokens is None:
            _add(result, "characters", kind, len(side["text"]))
            for size in side["sizes"]:
                _add(result, "pixels", kind, max(size))
            continue
        try:
            is_video, seconds = side.get("video") is True, side.get("seconds", ())
            _add(result, "tokens", kind, count_tokens(side["text"], side["sizes"], is_video, seconds))
        except DataError:
            result.not_encodable += 1


def _modality(text: str, sizes: Sizes) -> str:
    """Return text, image or both; a placeholder alone is not a text."""
    if not sizes:
        return "text"
    return "both" if remove_placeholders(text).strip() else "image"


def _add(result: Inspection, measure: str, kind: str, length: int) -> None:
    result.lengths.setdefault(measure, {}).setdefault(kind, Counter())[length] += 1


def histogram(lengths: dict[str, Counter[int]]) -> list[tuple[int, int, dict[str, int]]]:
    """Return (first length, last length, number by kind) for ranges that double, from the first to the last in use."""
    ranges = {kind: Counter() for kind in lengths}
    for kind, counter in lengths.items():
        for length, number in counter.items():
            ranges[kind][length.bit_length()] += number
    used = set().union(*ranges.values())
    return [
        (1 << bits >> 1, (1 << bits) - 1, {kind: counter[bits] for kind, counter in ranges.items()})
        for bits in range(min(used), max(used) + 1)
    ]


def verify(
    directory: str | Path,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[tuple[str, ShardCheck]]:
    """Yield the subset and the check of every shard, in the order of the index.

    Each shard must exist and have the size, the sha256 and the number of pairs that the index says. Each sample must be
    complete and of its subset, and its images must have the CRC-32s (which old shards lack) and sizes in its JSON, and
    be decodable.

    Args:
        directory: a folder of shards, or of mined negatives, which are checked in the same way.
        workers: number of worker processes; 1: no worker processes.
        max_pixels: images with more pixels are a problem.
        progress: called after each shard.

    Raises:
        DataError: the folder has no readable index, or a worker was killed.
    """
    directory = Path(directory)
    index, sides_of = _read_index_or_manifest(directory)
    shards = [(name, shard) for name, subset in index.subsets.items() for shard in subset.shards]
    jobs = [(directory, *named, max_pixels, sides_of) for named in shards]
    keys: dict[str, list[np.ndarray]] = {name: [] for name in index.subsets}
    try:
        with worker_pool(workers) as executor:
            checks = run_in_order(executor, _check_shard, jobs, JOBS_PER_WORKER * workers)
            for done, (name, check) in enumerate(zip([name for name, _ in shards], checks), start=1):
                keys[name].append(check.keys)
                if len(keys[name]) == len(index.subsets[name].shards):
                    check.problems += _repeated(directory, index.subsets[name], keys.pop(name))
                yield name, check
                progress("shards", done, len(jobs))
    except BrokenProcessPool as error:
        raise DataError(f"a worker reading {directory} was killed; use fewer --workers if memory is short") from error


def _read_index_or_manifest(directory: Path) -> tuple[Index, SidesOf]:
    """The index of a folder of shards or of mined negatives, and what reads a sample of it."""
    if (directory / INDEX_FILE).exists() or not (directory / MANIFEST_FILE).is_file():
        return read_index(directory, check_shards=False), _sides_of_pair
    manifest = parse_manifest(directory / MANIFEST_FILE, str(directory / MANIFEST_FILE))
    subsets = {name: Subset("", [one.shard for one in mined]) for name, mined in manifest.subsets.items()}
    return Index(subsets), _sides_of_negatives


def _sides_of_pair(sample: dict[str, Any], where: str) -> tuple[object, list[dict[str, Any]]]:
    pair = unpack_pair(sample, where)
    query, targets, negatives = described_sides(unpack_json(sample, where))
    return pair.subset, [query, *targets, *negatives]


def _sides_of_negatives(sample: dict[str, Any], where: str) -> tuple[object, list[dict[str, Any]]]:
    described = unpack_json(sample, where)
    unpack_list(NEGATIVES, "hard negative", described, sample, where)
    return described.get("subset"), described.get(NEGATIVES, [])


def _check_shard(job: tuple[Path, str, Shard, int, SidesOf]) -> ShardCheck:
    check = ShardCheck()
    check.problems += _shard_problems(*job, check)
    return check


def _repeated(directory: Path, subset: Subset, keys: list[np.ndarray]) -> Iterator[str]:
    """Yield a line for each shard that has samples of an earlier shard of its subset, as a copy packed anew has."""
    is_repeated = np.ones(sum(map(len, keys)), bool)
    is_repeated[np.unique(np.concatenate(keys), return_index=True)[1]] = False
    for shard, part in zip(subset.shards, np.split(is_repeated, np.cumsum([len(own) for own in keys])[:-1])):
        if part.any():
            yield f"{directory / shard.file} has {part.sum()} samples whose keys come before too; a run takes both"


def _shard_problems(
    directory: Path, subset: str, shard: Shard, max_pixels: int, sides_of: SidesOf, check: ShardCheck
) -> Iterator[str]:
    path = directory / shard.file
    try:
        check_size(directory, shard)
    except DataError as error:
        yield str(error)
        if not path.is_file():
            return
    try:
        digest = sha256_of(path)
        if digest != shard.sha256:
            yield f"shard {path}: its sha256 is {digest}, the index says {shard.sha256}; {AGAIN}"
        with open(path, "rb") as file:
            samples = find_samples(file, path)
            if len(samples) != shard.pairs:
                yield f"shard {path} holds {len(samples)} pairs, the index says {shard.pairs}; {AGAIN}"
            hashes = (hashlib.blake2b(sample.key.encode(), digest_size=8).digest() for sample in samples)
            check.keys = np.frombuffer(b"".join(hashes), np.uint64)
            repeated = {key for key, number in Counter(sample.key for sample in samples).items() if number > 1}
            for key in sorted(repeated):
                yield f"{path}: sample {key} comes twice, or other members stand between its own; {AGAIN}"
            for sample in samples:
                try:
                    members = read_sample(file, path, sample)
                except DataError as error:
                    yield str(error)
                    continue
                sample = {"__key__": sample.key, **members}
                yield from _sample_problems(sample, subset, path, max_pixels, check.noticed, sides_of)
    except OSError as error:
        yield str(unreadable(path, error))
    except DataError as error:
        yield str(error)


def _sample_problems(
    sample: dict[str, Any], subset: str, path: Path, max_pixels: int, noticed: list[tuple[str, str]], sides_of: SidesOf
) -> Iterator[str]:
    where = f"{path}: sample {sample['__key__']}"
    try:
        named, sides = sides_of(sample, where)
    except DataError as error:
        yield str(error)
        return
    if named != subset:
        yield f"{where} is of subset {named!r}, the index says {subset!r}; {AGAIN}"
    for side in sides:
        for name, size in zip(side["images"], _sizes_of(side)):
            notes: list[str] = []
            try:
                image = open_image(sample[name], max_pixels)
                if list(image.size) != size:
                    yield f"{where}: member {name} is of size {list(image.size)}, its JSON says {size}; {AGAIN}"
                decode_image(sample[name], ImageSettings(max_pixels), notes)
            except TooLargeError as error:
                yield f"{where}: member {name}: {error}; a run drops its pair unless data.max_image_pixels allows it"
            except BadImageError as error:
                yield f"{where}: member {name} is no readable image ({error}); {AGAIN}"
            noticed += [(note, f"{sample['__key__']} {name}") for note in notes]


def _sizes_of(side: dict[str, Any]) -> list[Any]:
    """Return one size per image; None for images whose size the JSON lacks."""
    sizes = side.get("sizes")
    sizes = sizes if isinstance(sizes, list) else []
    return sizes + [None] * (len(side["images"]) - len(sizes))

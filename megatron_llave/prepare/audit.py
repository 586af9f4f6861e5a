"""What a folder of shards holds, and whether it is what was written: `prepare_data.py inspect` and `verify`.

For the folders of every source, once they are finished. inspect reads the JSON of the samples and decodes no image;
verify reads every byte.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_llave.config.load import config_from_dict
from megatron_llave.data.index import Shard, Subset, check_size, read_index
from megatron_llave.data.placeholders import remove_placeholders
from megatron_llave.data.shards import unpack_json, unpack_pair
from megatron_llave.data.tar_members import find_samples, read_sample, unreadable
from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import AGAIN
from megatron_llave.planning.pair_lengths import CHUNK, Sizes, TokenCounter, read_descriptions, sample_shards
from megatron_llave.prepare.shard_jobs import Progress


@dataclass
class SubsetCounts:
    """What inspect found in one subset."""

    subset: Subset
    """As the index has it."""
    counted: int = 0
    """Pairs that were read; the numbers below are theirs."""
    query: Counter[str] = field(default_factory=Counter)
    """Sides that are `text`, `image` or `both`."""
    target: Counter[str] = field(default_factory=Counter)
    with_hard_negatives: int = 0


@dataclass
class Inspection:
    """What inspect found in a folder."""

    subsets: dict[str, SubsetCounts]
    lengths: dict[str, dict[str, Counter[int]]]
    """What was measured (`tokens`, or `characters` and `pixels`) -> query, target or hard negative -> how many sides
    (of pixels, the longer side of an image: how many images) have which length."""
    not_encodable: int = 0
    """Sides that training could not make tokens of, and would leave out."""


def token_counter(tokenizer: str | Path, preset: str) -> TokenCounter:
    """The lengths that a run of this preset would see, with the prompt template that it is trained with.

    Raises:
        ConfigError: no such preset.
        DataError: no such tokenizer.
    """
    model = config_from_dict({"model": {"preset": preset}}).model
    return TokenCounter(load_tokenizer(tokenizer), model, "plain" if preset == "tiny" else "qwen")


def inspect(
    directory: str | Path,
    tokenizer: str | Path | None = None,
    preset: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Inspection:
    """Count pairs, modalities and lengths.

    Args:
        directory: a finished folder of shards.
        tokenizer: its file; with `preset` lengths are counted in tokens.
        preset: the model whose tile grids apply.
        progress: told after each shard.

    Raises:
        ConfigError: only one of tokenizer and preset, or an unknown preset.
        DataError: the folder is not finished or damaged.
    """
    if (tokenizer is None) != (preset is None):
        raise ConfigError("token lengths need both --tokenizer and --preset, other lengths neither")
    count_tokens = token_counter(tokenizer, preset) if tokenizer is not None and preset is not None else None
    directory = Path(directory)
    found = Inspection({name: SubsetCounts(subset) for name, subset in read_index(directory).subsets.items()}, {})
    chosen = [(counts, shard) for counts in found.subsets.values() for shard in sample_shards(counts.subset)]
    for done, (counts, shard) in enumerate(chosen, start=1):
        for described, where in read_descriptions(directory / shard.file):
            try:
                _count(described, counts, found, count_tokens)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{where}: its .json member is malformed; the command verify says more") from error
        progress("shards", done, len(chosen))
    return found


def _count(
    described: dict[str, Any],
    counts: SubsetCounts,
    found: Inspection,
    count_tokens: Callable[[str, Sizes], int] | None,
) -> None:
    negatives = described.get("hard_negatives", [])
    counts.counted += 1
    counts.with_hard_negatives += bool(negatives)
    sides = [("query", described["query"]), ("target", described["target"])]
    for kind, side in sides:
        getattr(counts, kind)[_modality(side["text"], side["sizes"])] += 1
    sides += [("hard negative", side) for side in negatives]
    for kind, side in sides:
        if count_tokens is None:
            _add(found, "characters", kind, len(side["text"]))
            for size in side["sizes"]:
                _add(found, "pixels", kind, max(size))
            continue
        try:
            _add(found, "tokens", kind, count_tokens(side["text"], side["sizes"]))
        except DataError:
            found.not_encodable += 1


def _modality(text: str, sizes: Sizes) -> str:
    """A placeholder alone is no text."""
    if not sizes:
        return "text"
    return "both" if remove_placeholders(text).strip() else "image"


def _add(found: Inspection, measure: str, kind: str, length: int) -> None:
    found.lengths.setdefault(measure, {}).setdefault(kind, Counter())[length] += 1


def histogram(lengths: dict[str, Counter[int]]) -> list[tuple[int, int, dict[str, int]]]:
    """Lengths in ranges that double: (first, last, number by kind), from the first range in use to the last."""
    ranges = {kind: Counter() for kind in lengths}
    for kind, counter in lengths.items():
        for length, number in counter.items():
            ranges[kind][length.bit_length()] += number
    used = set().union(*ranges.values())
    return [
        (1 << bits >> 1, (1 << bits) - 1, {kind: counter[bits] for kind, counter in ranges.items()})
        for bits in range(min(used), max(used) + 1)
    ]


def verify(directory: str | Path, progress: Progress = lambda what, done, total: None) -> Iterator[str]:
    """A line for every problem, with the file and, where it has one, the key of the sample.

    Checked are each shard's presence, size, sha256 and number of pairs, and of each sample that it is complete and of
    its subset, its images' CRC-32s where it has them, and that their headers give the sizes in its JSON.

    Raises:
        DataError: the folder has no index that can be read.
    """
    directory = Path(directory)
    index = read_index(directory, check_shards=False)
    shards = [(name, shard) for name, subset in index.subsets.items() for shard in subset.shards]
    for done, (name, shard) in enumerate(shards, start=1):
        yield from _shard_problems(directory, name, shard)
        progress("shards", done, len(shards))


def _shard_problems(directory: Path, subset: str, shard: Shard) -> Iterator[str]:
    path = directory / shard.file
    try:
        check_size(directory, shard)
    except DataError as error:
        yield str(error)
        if Path(shard.file).name != shard.file or not path.is_file():
            return
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK):
                digest.update(chunk)
            if digest.hexdigest() != shard.sha256:
                found = digest.hexdigest()
                yield f"shard {path}: its sha256 is {found}, the index says {shard.sha256}; {AGAIN}"
            file.seek(0)
            samples = find_samples(file, path)
            if len(samples) != shard.pairs:
                yield f"shard {path} holds {len(samples)} pairs, the index says {shard.pairs}; {AGAIN}"
            repeated = {key for key, number in Counter(sample.key for sample in samples).items() if number > 1}
            for key in sorted(repeated):
                yield f"{path}: sample {key} comes twice, or other members stand between its own; {AGAIN}"
            for sample in samples:
                try:
                    members = read_sample(file, path, sample)
                except DataError as error:
                    yield str(error)
                    continue
                yield from _sample_problems({"__key__": sample.key, **members}, subset, path)
    except OSError as error:
        yield str(unreadable(path, error))
    except DataError as error:
        yield str(error)


def _sample_problems(sample: dict[str, Any], subset: str, path: Path) -> Iterator[str]:
    where = f"{path}: sample {sample['__key__']}"
    try:
        pair = unpack_pair(sample, where)
    except DataError as error:
        yield str(error)
        return
    if pair.subset != subset:
        yield f"{where} is of subset {pair.subset!r}, the index says {subset!r}; {AGAIN}"
    described = unpack_json(sample, where)
    for side in (described["query"], described["target"], *described.get("hard_negatives", [])):
        for name, size in zip(side["images"], _sizes_of(side)):
            try:
                with Image.open(io.BytesIO(sample[name])) as header:
                    found = list(header.size)
            except Exception as error:  # each of Pillow's decoders raises its own kinds; all mean the same here
                yield f"{where}: member {name} is no readable image ({' '.join(str(error).split())}); {AGAIN}"
                continue
            if found != size:
                yield f"{where}: member {name} is of size {found}, its JSON says {size}; {AGAIN}"


def _sizes_of(side: dict[str, Any]) -> list[Any]:
    """As many as there are images; None where the JSON has none."""
    sizes = side.get("sizes")
    sizes = sizes if isinstance(sizes, list) else []
    return sizes + [None] * (len(side["images"]) - len(sizes))

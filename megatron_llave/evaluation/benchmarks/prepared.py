"""Evaluation sets on disk: each unique input once, in WebDataset tars, and the sets that refer to inputs by key.

Written by the sources next to the training shards, read by the evaluator. Folder `eval/` of a data folder:
`inputs-000000.tar` (samples `KEY.json`, `KEY.0.png`) and `sets.json`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_llave.batch import Side
from megatron_llave.data.index import META_TASKS, Shard, check_size, parse_shard
from megatron_llave.data.shards import pack_side, read_samples, to_json_bytes, unpack_json, unpack_side, write_samples
from megatron_llave.errors import DataError
from megatron_llave.files import VERSION, read_json, write_json

FORMAT = "megatron_llave evaluation"
FOLDER = "eval"
SETS_FILE = "sets.json"
SPLITS = ("ind", "ood", "seen")
INPUTS_PER_SHARD = 5000


@dataclass
class EvaluationSet:
    """Queries, the candidates all of them are ranked against, and which candidate is right."""

    name: str
    """Unique among the sets of one folder."""
    meta_task: str
    """One of META_TASKS."""
    split: str
    """ind (task trained, items held out), ood (task or domain never trained) or seen (training items: memory)."""
    queries: list[str]
    """Input keys."""
    candidates: list[str]
    """Input keys."""
    positives: list[int]
    """Index into `candidates` of each query's right answer."""

    @property
    def chance(self) -> float:
        """Precision@1 of guessing, in percent."""
        return 100.0 / len(self.candidates)


def input_key(side: Side) -> str:
    """Key of an input: a hash of its text and image bytes, the same in every run."""
    digest = hashlib.sha256(side.text.encode())
    for image in side.images:
        digest.update(b"\0" + hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def write_evaluation(directory: str | Path, inputs: dict[str, Side], sets: list[EvaluationSet]) -> None:
    """Write `inputs` (by their `input_key`) and `sets` into the folder `eval` of `directory`; sets.json comes last.

    Raises:
        DataError: a set that `read_evaluation` would refuse.
    """
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETS_FILE
    _check_sets(path, inputs, sets)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, side in inputs.items():
            described, images = pack_side(side, "", f"{folder}: input {key}")
            yield key, {"json": to_json_bytes(described), **images}

    stream = samples()
    shards: list[Shard] = []
    for first in stream:
        chunk = chain([first], islice(stream, INPUTS_PER_SHARD - 1))
        shards.append(write_samples(chunk, folder / f"inputs-{len(shards):06d}.tar"))
    value = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": [asdict(shard) for shard in shards],
        "sets": [asdict(one) for one in sets],
    }
    write_json(path, value)


def is_prepared(directory: str | Path) -> bool:
    """Whether it looks like a folder that `read_evaluation` reads, and not like MMEB-eval."""
    return (Path(directory) / FOLDER).is_dir() or not any(Path(directory).glob("*/test-*.parquet"))


def read_evaluation(directory: str | Path) -> tuple[dict[str, Side], list[EvaluationSet]]:
    """Read and check all inputs and sets of a data folder.

    Raises:
        DataError: names the file, set or key that is missing, truncated, malformed or inconsistent.
    """
    folder = Path(directory) / FOLDER
    if not folder.is_dir():
        raise DataError(f"evaluation folder {folder} does not exist; tools/prepare_data.py makes one")
    path = folder / SETS_FILE
    value = read_json(path, FORMAT, "the folder is unfinished: run tools/prepare_data.py")
    try:
        shards = [parse_shard(shard) for shard in value["inputs"]]
        sets = [_parse_set(one) for one in value["sets"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is malformed ({type(error).__name__}: {error}); make it again") from error
    inputs: dict[str, Side] = {}
    for shard in shards:
        check_size(folder, shard)
        for sample in read_samples(folder / shard.file):
            key = sample["__key__"]
            where = f"{folder / shard.file}: input {key}"
            inputs[key] = unpack_side(unpack_json(sample, where), sample, where)
    _check_sets(path, inputs, sets)
    return inputs, sets


def _parse_set(value: dict[str, Any]) -> EvaluationSet:
    lists = {field: list(value[field]) for field in ("queries", "candidates", "positives")}
    if not all(isinstance(positive, int) for positive in lists["positives"]):
        raise TypeError(f"positives of {value['name']!r} must be integers")
    return EvaluationSet(str(value["name"]), str(value["meta_task"]), str(value["split"]), **lists)


def _check_sets(path: Path, inputs: dict[str, Side], sets: list[EvaluationSet]) -> None:
    if not sets:
        raise DataError(f"{path} holds no evaluation set")
    names = [one.name for one in sets]
    for one in sets:
        where = f"{path}: set {one.name!r}"
        if names.count(one.name) > 1:
            raise DataError(f"{where} comes twice; names must be unique")
        if one.meta_task not in META_TASKS or one.split not in SPLITS:
            allowed = f"one of {', '.join(META_TASKS)} and one of {', '.join(SPLITS)}"
            raise DataError(f"{where} has meta_task {one.meta_task!r} and split {one.split!r}; right is {allowed}")
        if not one.queries or not one.candidates:
            counts = f"{len(one.queries)} queries and {len(one.candidates)} candidates"
            raise DataError(f"{where} has {counts}; none may be 0")
        if len(one.positives) != len(one.queries):
            raise DataError(f"{where} has {len(one.queries)} queries but {len(one.positives)} positives")
        for key in chain(one.queries, one.candidates):
            if key not in inputs:
                raise DataError(f"{where} names input {key!r}, which is in no inputs tar; make the folder again")
        for number, positive in enumerate(one.positives):
            if not 0 <= positive < len(one.candidates):
                limit = f"candidates go from 0 to {len(one.candidates) - 1}"
                raise DataError(f"{where}: positive {positive} of query {number} is out of range; {limit}")

"""Evaluation sets of a folder that llave prepare made, written and read; all queries of a set share candidates.

The folder's `eval/` holds each different input once in WebDataset tars, `inputs-000000.tar` ... (samples `KEY.json`,
`KEY.0.png`), and `sets.json`, whose sets refer to the inputs by key.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llave.batch import Side
from megatron_llave.config.data import META_TASKS
from megatron_llave.data.index import Shard, check_size, parse_shard, require_different_shards
from megatron_llave.data.shards import pack_side, read_samples, to_json_bytes, unpack_json, unpack_side, write_samples
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmark import Benchmark
from megatron_llave.evaluation.task import Task
from megatron_llave.files import VERSION, read_json, write_json
from megatron_llave.options import evaluate as options

FORMAT = "megatron_llave evaluation"
FOLDER = "eval"
SETS_FILE = "sets.json"
SPLITS = ("ind", "ood", "seen")
INPUTS_PER_SHARD = 5000


@dataclass
class EvaluationSet:
    """A set as sets.json describes it: queries, the candidates that all of them share, and which ones are right."""

    name: str
    """Unique among the sets of one folder."""
    meta_task: str
    """A key of META_TASKS."""
    split: str
    """ind (the task was trained, these items were not), ood (task or domain not trained) or seen (items trained on)."""
    queries: list[str]
    """Keys of inputs."""
    candidates: list[str]
    """Keys of inputs."""
    positives: list[int]
    """Each query's right candidate, as an index into `candidates`."""
    further: list[list[int]] = field(default_factory=list)
    """Each query's further right candidates, likewise; an empty list: every query has one right candidate."""

    @property
    def chance(self) -> float:
        """Expected Precision@1 of guessing, in percent."""
        num_right = len(self.queries) + sum(map(len, self.further))
        return 100.0 * num_right / len(self.queries) / len(self.candidates)


def input_key(side: Side) -> str:
    """Key of an input: a hash of its text, of the bytes of its images, whether these are a video, and its seconds."""
    seconds = repr(side.seconds).encode() if side.seconds else b""
    digest = hashlib.sha256(side.text.encode() + b"\0video" * side.is_video + seconds)
    for image in side.images:
        digest.update(b"\0" + hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def write_evaluation(directory: str | Path, inputs: dict[str, Side], sets: list[EvaluationSet]) -> None:
    """Write `inputs` (by their `input_key`) and `sets` into the folder `eval` of `directory`; sets.json comes last.

    Raises:
        DataError: `read_evaluation` would refuse one of the sets.
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
        "sets": [{k: v for k, v in asdict(described).items() if v or k != "further"} for described in sets],
    }
    write_json(path, value)


def remove_evaluation(directory: str | Path) -> None:
    """Remove what an earlier `write_evaluation` has written into a folder; other files in its `eval` stay."""
    folder = Path(directory) / FOLDER
    for path in [folder / SETS_FILE, *folder.glob("inputs-*.tar")]:
        path.unlink(missing_ok=True)


def is_prepared(directory: str | Path) -> bool:
    """Whether a folder looks like one that `read_evaluation` reads, and not like MMEB-eval."""
    return (Path(directory) / FOLDER).is_dir() or not any(Path(directory).glob("*/test-*.parquet"))


def read_evaluation(directory: str | Path) -> tuple[dict[str, Side], list[EvaluationSet]]:
    """Read and check all inputs and sets of a data folder.

    Raises:
        DataError: names the file, set or key that is missing, truncated, malformed or inconsistent.
    """
    folder = Path(directory) / FOLDER
    if not folder.is_dir():
        raise DataError(f"evaluation folder {folder} does not exist; llave prepare makes one")
    path = folder / SETS_FILE
    value = read_json(path, FORMAT, "the folder is unfinished: run llave prepare")
    try:
        shards = [parse_shard(shard) for shard in value["inputs"]]
        require_different_shards(shards)
        sets = [_parse_set(described) for described in value["sets"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
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


def build_tasks(inputs: dict[str, Side], sets: Sequence[EvaluationSet], folder: str | Path = "") -> list[Task]:
    """The sets as tasks, which share the inputs that any of them uses; `folder` is where they come from."""
    keys = list(dict.fromkeys(key for chosen in sets for key in (*chosen.queries, *chosen.candidates)))
    number_of = {key: number for number, key in enumerate(keys)}
    sides = [inputs[key] for key in keys]
    entries = [
        Input(s.text, tuple(s.images), id=key, is_video=s.is_video, seconds=s.seconds) for key, s in zip(keys, sides)
    ]
    shared = Inputs("prepared", entries, folder)
    tasks = []
    for chosen in sets:
        queries, candidates = (
            np.array([number_of[key] for key in names], np.int64) for names in (chosen.queries, chosen.candidates)
        )
        most = max(map(len, chosen.further), default=0)
        rows = [[first, *more] + [first] * (most - len(more)) for first, more in zip(chosen.positives, chosen.further)]
        right, further = candidates[chosen.positives], candidates[np.array(rows)[:, 1:]] if most else None
        tasks.append(
            Task(chosen.name, chosen.meta_task, chosen.split, shared, queries, candidates, right, further=further)
        )
    return tasks


def read_tasks(directory: str | Path, names: Sequence[str] = ()) -> list[Task]:
    """Read the sets of a prepared folder as tasks: those in `names`, or all.

    Raises:
        ConfigError: the folder has no set of one of these names.
        DataError: see `read_evaluation`.
    """
    inputs, sets = read_evaluation(directory)
    by_name = {chosen.name: chosen for chosen in sets}
    for name in names:
        if name not in by_name:
            raise ConfigError(f"evaluate.sets: {name!r} is none of the sets in {directory}: {', '.join(by_name)}")
    return build_tasks(inputs, [by_name[name] for name in names] or sets, directory)


def _parse_set(value: dict[str, Any]) -> EvaluationSet:
    lists = {field: list(value[field]) for field in ("queries", "candidates", "positives")}
    lists["further"] = [list(numbers) for numbers in value.get("further", [])]
    if not all(type(positive) is int for positive in chain(lists["positives"], *lists["further"])):
        raise TypeError(f"further right candidates and positives of {value['name']!r} must be integers")
    if not all(isinstance(key, str) for key in (*lists["queries"], *lists["candidates"])):
        raise TypeError(f"queries and candidates of {value['name']!r} must be strings")
    return EvaluationSet(str(value["name"]), str(value["meta_task"]), str(value["split"]), **lists)


def _check_sets(path: Path, inputs: dict[str, Side], sets: list[EvaluationSet]) -> None:
    if not sets:
        raise DataError(f"{path} holds no evaluation set")
    names = [described.name for described in sets]
    for described in sets:
        where = f"{path}: set {described.name!r}"
        if names.count(described.name) > 1:
            raise DataError(f"{where} comes twice; names must be unique")
        if described.meta_task not in META_TASKS or described.split not in SPLITS:
            allowed = f"one of {', '.join(META_TASKS)} and one of {', '.join(SPLITS)}"
            raise DataError(
                f"{where} has meta_task {described.meta_task!r} and split {described.split!r}; right is {allowed}"
            )
        if not described.queries or not described.candidates:
            counts = f"{len(described.queries)} queries and {len(described.candidates)} candidates"
            raise DataError(f"{where} has {counts}; none may be 0")
        if len(described.positives) != len(described.queries):
            raise DataError(f"{where} has {len(described.queries)} queries but {len(described.positives)} positives")
        if described.further and len(described.further) != len(described.queries):
            counts = f"{len(described.queries)} queries but {len(described.further)} lists of further right candidates"
            raise DataError(f"{where} has {counts}")
        for key in chain(described.queries, described.candidates):
            if key not in inputs:
                raise DataError(f"{where} names input {key!r}, which is in no inputs tar; make the folder again")
        for number, positive in chain(
            enumerate(described.positives), ((n, right) for n, more in enumerate(described.further) for right in more)
        ):
            if not 0 <= positive < len(described.candidates):
                limit = f"candidates go from 0 to {len(described.candidates) - 1}"
                raise DataError(f"{where}: positive {positive} of query {number} is out of range; {limit}")


BENCHMARK = Benchmark(
    **vars(options.PREPARED),
    read_tasks=lambda args: read_tasks(args.data),
    overrides=lambda args: [f"data.path={args.data}"],
)

"""Shards with mined negatives beside them, and the steps that are read from both, for the tests of reading them."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch
from letters import Letters
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.batch import Pair, Side, StepBatches
from megatron_llave.config.data import DataConfig
from megatron_llave.config.mining import Rules
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.index import Index, read_index, write_index
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.mining import negatives_folder
from megatron_llave.mining.inputs import read_subsets
from megatron_llave.mining.mined import Mined
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

SIZES, MINED = {"birds": 43, "words": 20}, 3
ENCODER = LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14)


def target(number: int) -> Side:
    return Side(f"target {number}" * (number % 3 + 1), [])


def pair(subset: str, number: int) -> Pair:
    """A pair with one hard negative of its own, or none, and in `words` with scores."""
    own = [Side(f"own {number}", [])] if number % 4 == 0 else []
    scores = [0.5 + number] * (1 + len(own)) if subset == "words" else []
    sides = Side(f"query {number}", []), target(number), f"q{number}", f"t{number}", own, [f"o{number}"] * len(own)
    return Pair(f"{subset}-{number}", subset, *sides, scores=scores)


def negatives_of(size: int, number: int) -> list[int]:
    """The mined negatives of a query, from none to MINED; of the queries with one of their own, some have some."""
    return [(number + step) % size for step in range(1, number // 2 % (MINED + 1) + 1)]


def write(folder: Path, sizes: dict[str, int], own_negatives: bool = False) -> Path:
    """Shards of ten pairs, which can have the mined negatives as their own; then scores they have none of are NaN."""

    def of(subset: str, number: int) -> Pair:
        plain = pair(subset, number)
        more = negatives_of(sizes[subset], number) if own_negatives else []
        names = [f"t{other}" for other in more]
        return dataclasses.replace(
            plain,
            hard_negatives=plain.hard_negatives + [target(other) for other in more],
            hard_negative_ids=plain.hard_negative_ids + names,
            scores=[] if own_negatives else plain.scores,
        )

    subsets = {
        name: write_subset((of(name, i) for i in range(size)), folder, name, "retrieval", 10)
        for name, size in sizes.items()
    }
    write_index(folder, Index(subsets))
    return folder


def write_beside(folder: Path, out: Path, names: list[str], groups: ProcessGroupCollection, shift: int = 0) -> Path:
    """The negatives of `negatives_of`, or others where they are shifted, as mining writes them."""
    index, written = read_index(folder), []
    out.mkdir(parents=True)
    plan = {"models": [{}], "rules": dataclasses.asdict(Rules()), "data": {}}
    assert not negatives_folder.claim(out, plan, index, overwrite=False)
    for inputs in read_subsets(folder, index, names, []):
        numbers = np.full((len(inputs.query_ids), MINED), -1, np.int64)
        for row in range(len(numbers)):
            found = [(other + shift) % len(numbers) for other in negatives_of(len(numbers), row)]
            numbers[row, : len(found)] = found
        mined = Mined(
            numbers,
            np.where(numbers < 0, -np.inf, 0.5).astype(np.float32),
            np.zeros(len(numbers), bool),
            np.ones((len(numbers), 3)),
        )
        written.append((inputs, mined, negatives_folder.write_subset(out, folder, inputs, mined)))
    negatives_folder.finish(out, plan, written)
    return out


def config(path: Path, negatives: Path | str | None, **data: object) -> RunConfig:
    data = {"hard_negatives": 9, "workers": 0, **data}
    section = DataConfig(str(path), prompt="plain", max_length=64, negatives=negatives and str(negatives), **data)
    return RunConfig(data=section, train=TrainConfig(global_batch_size=8))


def steps(cfg: RunConfig, count: int, rank: int = 0, world: int = 1, **given: object) -> list[StepBatches]:
    stream = build_train_stream(cfg, ENCODER, rank, world, 4, **given)
    return [unpack_step(step) for step in itertools.islice(stream, count)]


def tensors(step: StepBatches) -> list[torch.Tensor]:
    """Everything in a step, without the scores."""
    batches = [dataclasses.replace(batch, scores=None) for batch in step.batches]
    found: list[torch.Tensor] = []
    for batch in batches:
        batch.map(lambda tensor: found.append(tensor) or tensor)
    return [*found, torch.tensor([[ord(x) for x in "".join(batch.keys)] for batch in batches][0])]


def same(one: list[StepBatches], other: list[StepBatches]) -> bool:
    pairs = [(tensors(x), tensors(y)) for x, y in zip(one, other, strict=True)]
    return all(len(x) == len(y) and all(map(torch.equal, x, y)) for x, y in pairs)

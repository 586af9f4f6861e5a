"""Which negatives a step of a run that mines for itself has, from which folders; and what is refused on resume."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from beside import ENCODER, SIZES, config, same, write, write_beside
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.batch import StepBatches
from megatron_llave.config.mining import MiningConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.balance import TokenBudget
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.refreshed_negatives import folder_of, mined_after, unmined
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import ConfigError, DataError

INTERVAL, LAST = 2, 9
BUDGET = TokenBudget(1500, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, groups: ProcessGroupCollection) -> RunConfig:
    """A run with negatives of its own from before, and after two, four and six steps."""
    root = tmp_path_factory.mktemp("run")
    shards = write(root / "shards", SIZES)
    base = write_beside(shards, root / "base", list(SIZES), groups)
    for mined in (2, 4, 6):
        write_beside(shards, folder_of(root / "output", mined), list(SIZES), groups, shift=mined)
    cfg = config(shards, base)
    train = dataclasses.replace(cfg.train, output=str(root / "output"), steps=LAST)
    return dataclasses.replace(cfg, train=train, mining=MiningConfig(interval=INTERVAL))


def read(cfg: RunConfig, last: int = LAST, position: dict | None = None, **given: object) -> list[StepBatches]:
    """All batches of the steps up to the last one; position is as from a file."""
    position = json.loads(json.dumps(position))
    stream = map(unpack_step, build_train_stream(cfg, ENCODER, 0, 1, 4, position, **given))
    return list(itertools.takewhile(lambda batches: batches.position["step"] < last, stream))


def of_steps(batches: list[StepBatches], first: int, last: int) -> list[StepBatches]:
    return [one for one in batches if first <= one.position["step"] <= last]


@pytest.mark.parametrize(("workers", "budget"), [(0, None), (1, None), (0, BUDGET), (1, BUDGET)])
def test_each_step_has_the_negatives_of_one_interval_before(run: RunConfig, workers: int, budget: object) -> None:
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=workers))
    found = read(run, budget=budget)
    sources = {1: run.data.negatives, 5: folder_of(run.train.output, 2), 7: folder_of(run.train.output, 4)}
    for first, last in ((1, 4), (5, 6), (7, 8)):
        data = dataclasses.replace(run.data, negatives=str(sources[first]), workers=0)
        plain = read(dataclasses.replace(run, data=data, mining=MiningConfig()), budget=budget)
        assert same(of_steps(found, first, last), of_steps(plain, first, last))
        others = [step for step in range(1, 9) if not first <= step <= last]
        assert not any(same(of_steps(found, step, step), of_steps(plain, step, step)) for step in others)


@pytest.mark.parametrize("done", [3, 4, 5, 6])
def test_resume_is_bit_equal(run: RunConfig, done: int) -> None:
    whole = read(run)
    assert same(read(run, position=whole[done - 1].position), whole[done:])


def test_negatives_are_opened_when_their_first_step_is_asked_for(run: RunConfig, tmp_path: Path) -> None:
    """Nothing reads ahead of that: those of the run may still be mined."""
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, output=str(tmp_path)))
    stream = build_train_stream(dataclasses.replace(run), ENCODER, 0, 1, 4)
    four = [unpack_step(next(stream)) for _ in range(4)]
    resumed = build_train_stream(run, ENCODER, 0, 1, 4, four[-1].position)
    for waiting in (stream, resumed):
        with pytest.raises(DataError, match="step-0000002, which the run has mined for steps 5 to 6, is missing"):
            next(waiting)


def test_what_a_run_cannot_resume_with(run: RunConfig, tmp_path: Path, groups: ProcessGroupCollection) -> None:
    position = read(run)[4].position
    for mining, named in (
        (MiningConfig(), "mining.interval=2, now it is 0"),
        (MiningConfig(interval=3), "mining.interval=2, now it is 3"),
        (MiningConfig(interval=2, ratio=0.9), "mining.ratio=0.95, now it is 0.9"),
    ):
        with pytest.raises(ConfigError, match=f"the run to resume had {named}: its steps would have other negatives"):
            read(dataclasses.replace(run, mining=mining), position=position)
    with pytest.raises(ConfigError, match="the run to resume had mining.interval=0, now it is 2"):
        read(run, position=read(dataclasses.replace(run, mining=MiningConfig()))[0].position)
    output = Path(shutil.copytree(run.train.output, tmp_path / "output"))
    moved = dataclasses.replace(run, train=dataclasses.replace(run.train, output=str(output)))
    shutil.rmtree(folder_of(output, 2))
    with pytest.raises(DataError, match="step-0000002, which the run has mined for steps 5 to 6, is missing"):
        read(moved, position=position)
    write_beside(Path(run.data.path), folder_of(output, 2), list(SIZES), groups, shift=3)
    with pytest.raises(ConfigError, match="negatives in .*step-0000002: the run to resume had those with identity"):
        read(moved, position=position)


def test_what_is_mined_is_used(tmp_path: Path) -> None:
    """The schedule by itself: what a run mines is what a step after it has."""
    for interval in (1, 2, 5):
        for last in range(1, 25):
            used = {mined_after(step, interval) for step in range(1, last + 1)} - {0}
            assert set(unmined(tmp_path, interval, last, last)) <= used
            for done in range(last):
                needed = {mined_after(step, interval) for step in range(done + 1, last + 1)} - {0}
                assert unmined(tmp_path, interval, done, last) == sorted(x for x in needed if x <= done)
                longer = {mined_after(step, interval) for step in range(done + 1, last + 3 * interval)} - {0}
                assert unmined(tmp_path, interval, done) == sorted(x for x in longer if x <= done)
    assert [mined_after(step, 3) for step in range(1, 14)] == [0] * 6 + [3] * 3 + [6] * 3 + [9]
    assert {mined_after(step, 0) for step in range(9)} == {0} and unmined(tmp_path, 0, 5, 9) == []

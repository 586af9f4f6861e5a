"""Reading pairs with mined negatives beside them: like pairs that have them of their own; and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from beside import ENCODER, SIZES, config, negatives_of, same, steps, write, write_beside
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.config.data import SubsetConfig
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.balance import TokenBudget
from megatron_llave.data.index import read_index
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.mining import negatives_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, groups: ProcessGroupCollection) -> tuple[Path, Path, Path]:
    """Shards, their mined negatives, and shards that have these as their own."""
    root = tmp_path_factory.mktemp("beside")
    shards = write(root / "shards", SIZES)
    return shards, write_beside(shards, root / "negatives", list(SIZES), groups), write(root / "own", SIZES, True)


@pytest.mark.parametrize("budget", [None, TokenBudget(1500, 1.0)])
@pytest.mark.parametrize("limit", [9, 2])
def test_the_stream_is_that_of_pairs_with_negatives_of_their_own(folders, limit, budget):
    shards, negatives, own = folders
    joined = steps(config(shards, negatives, hard_negatives=limit), 14, budget=budget)
    assert same(joined, steps(config(own, None, hard_negatives=limit), 14, budget=budget))
    plain = steps(config(shards, None, hard_negatives=limit), 14)
    if budget is None:
        assert [x.batches[0].keys for x in joined] == [x.batches[0].keys for x in plain]
        assert sum(x.batches[0].num_hard_negatives for x in joined) > sum(
            x.batches[0].num_hard_negatives for x in plain
        )


def test_mined_negatives_of_pairs_with_scores_have_none(folders):
    both = 0
    for step in steps(config(folders[0], folders[1], subsets={"words": SubsetConfig()}), 2):
        batch = step.batches[0]
        numbers = [int(key.partition("-")[2]) for key in batch.keys]
        assert (batch.scores[: batch.num_pairs] == torch.tensor([0.5 + number for number in numbers])).all()
        mined = {n: [float("nan")] * len(negatives_of(20, n)) for n in numbers}
        both += sum(n % 4 == 0 and len(mined[n]) for n in numbers)
        known = [score for n in numbers for score in [0.5 + n] * (n % 4 == 0) + mined[n]]
        torch.testing.assert_close(batch.scores[batch.num_pairs :], torch.tensor(known), equal_nan=True)
    assert both > 0


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_equal_and_other_negatives_are_refused(folders, world, tmp_path, groups):
    shards, negatives, _ = folders
    cfg = config(shards, f"pipe:cat {negatives}/{{file}}", cache=str(tmp_path / "cache"))  # as from the network
    whole = steps(cfg, 12, world - 1, world)
    position = json.loads(json.dumps(whole[6].position))
    assert same(steps(cfg, 5, world - 1, world, position=position), whole[7:])
    with pytest.raises(ConfigError, match="data.negatives: the run to resume had those with identity .* it has none"):
        build_train_stream(config(shards, None), ENCODER, 0, 1, 4, position)
    (without,) = steps(config(shards, None), 1)
    with pytest.raises(ConfigError, match="data.negatives: the run to resume had none, now it has those with identity"):
        build_train_stream(cfg, ENCODER, 0, 1, 4, without.position)


def test_subsets_without_mined_negatives_are_named(folders, tmp_path, groups, caplog):
    shards = folders[0]
    out = write_beside(shards, tmp_path / "out", ["birds"], groups)
    with caplog.at_level(logging.WARNING):
        found = steps(config(shards, out), 10)
    assert f"data.negatives={out} has no negatives for subset words" in caplog.text
    without = [step.batches[0] for step in found if step.batches[0].subset == "words"]
    own = [sum(int(key.partition("-")[2]) % 4 == 0 for key in batch.keys) for batch in without]
    assert [batch.num_hard_negatives for batch in without] == own and any(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out, data: (out / "negatives.json").unlink(),
            "does not exist; data.negatives must be a folder",
        ),
        (lambda out, data: edit(out, complete=False), "is that of a mining that has not ended; give"),
        (
            lambda out, data: edit(out, subsets={"birds": {}}),
            "malformed .KeyError: 'shards'.; mine again",
        ),
        (
            lambda out, data: (out / "birds-000001.tar").unlink(),
            "birds-000001.tar is missing, though the",
        ),
        (lambda out, data: rewrite(data, {"birds": 44, "words": 20}), "is of another birds-000004.tar than"),
        (
            lambda out, data: rewrite(data, {"birds": 20, "words": 20}),
            "is of 5 shards of subset birds, the data have",
        ),
        (
            lambda out, data: rewrite(data, {"cats": 20}),
            "is of another data set, with the subsets birds,",
        ),
    ],
)
def test_what_does_not_belong_to_the_shards_is_refused(folders, tmp_path, change, message):
    data, out = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders[:2])
    change(out, data)
    with pytest.raises(DataError, match=message) as caught:
        build_train_stream(config(data, out), ENCODER, 0, 1, 4)
    assert str(out) in str(caught.value)


def edit(out: Path, **values: object) -> None:
    manifest = json.loads((out / "negatives.json").read_text())
    (out / "negatives.json").write_text(json.dumps(manifest | values))


def rewrite(data: Path, sizes: dict[str, int]) -> None:
    shutil.rmtree(data)
    write(data, sizes)


def test_a_damaged_sample_costs_its_pair(folders, tmp_path, caplog):
    out = Path(shutil.copytree(folders[1], tmp_path / "out"))
    file = out / "birds-000000.tar"
    file.write_bytes(file.read_bytes().replace(b'"id":"t6"', b'"id":"t7"'))
    with caplog.at_level(logging.WARNING):
        found = steps(config(folders[0], out), 8)
    assert "its .json member is not what its checksum was made of" in caplog.text
    assert 0 < sum(step.batches[0].num_skipped for step in found) < 4


def test_negatives_that_no_pair_would_take_are_refused():
    given = {"model": {"preset": "tiny"}, "data": {"path": "shards", "negatives": "mined"}}
    with pytest.raises(ConfigError, match="data.negatives=mined is not used while data.hard_negatives=0; set it to at"):
        config_from_dict(given)


def test_a_folder_is_claimed_for_one_plan(folders, tmp_path):
    """Complete negatives are replaced on demand alone, unfinished ones of another plan at once, foreign files never."""
    index, out = read_index(folders[0]), Path(shutil.copytree(folders[1], tmp_path / "out"))
    plan = {key: json.loads((out / "negatives.json").read_text())[key] for key in ("models", "rules", "data")}
    assert negatives_folder.claim(out, plan, index, overwrite=False)
    other = plan | {"rules": plan["rules"] | {"ratio": 0.9}}
    with pytest.raises(DataError, match="holds negatives of other rules; choose another --out or pass --overwrite"):
        negatives_folder.claim(out, other, index, overwrite=False)
    assert len(list(out.glob("*.tar"))) == 7
    assert not negatives_folder.claim(out, other, index, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["negatives.json"]
    (out / "birds-000000.tar").touch()
    assert not negatives_folder.claim(out, other, index, overwrite=False) and (out / "birds-000000.tar").exists()
    assert not negatives_folder.claim(out, plan, index, overwrite=False) and not (out / "birds-000000.tar").exists()
    edit(out, files=[{}], rules={})
    with pytest.raises(DataError, match="negatives.json is malformed .*; choose another --out, or delete"):
        negatives_folder.claim(out, plan, index, overwrite=False)
    with pytest.raises(DataError, match="holds files with the names of shards but no negatives.json; choose another"):
        negatives_folder.claim(folders[0], plan, index, overwrite=True)

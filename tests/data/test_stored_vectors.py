"""Stored embeddings: looked up by name in every format, in the order of a packed row, and refused in one line."""

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from letters import Letters

from megatron_llave.batch import Pair, Side
from megatron_llave.config.checks import require_effects
from megatron_llave.config.data import DataConfig, SubsetConfig
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import RunConfig, TrainConfig
from megatron_llave.data.index import Index, write_index
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.data.stored_vectors import open_vectors
from megatron_llave.embedding.shard_inputs import count_shard_inputs, read_shard_inputs
from megatron_llave.embedding.vector_files import embedding_file
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.models.llava_onevision.processor import LlavaOnevisionProcessor

WIDTH = 6


ENCODER = LlavaOnevisionProcessor(Letters(), "plain", 64, (), 28, 14)


def make_pair(subset: str, number: int) -> Pair:
    """Queries and targets have the same ids; pairs have none to two hard negatives, which may be another's target."""
    targets = [f"{(number + i) % 16}" for i in range(3)]
    sides = [Side(f"{subset} {name}", []) for name in targets]
    count = number % 3
    query = Side("q" * (1 + number), [])
    return Pair(f"p{number}", subset, query, sides[0], f"{number}", targets[0], sides[1:][:count], targets[1:][:count])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subsets of 16 pairs in shards of ten, with the same ids."""
    folder = tmp_path_factory.mktemp("pairs")
    subsets = {
        name: write_subset((make_pair(name, i) for i in range(16)), folder, name, "retrieval", 10)
        for name in ("birds", "trees")
    }
    write_index(folder, Index(subsets))
    return folder


def vector(name: str) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(list(name.encode())).standard_normal(WIDTH)).float()


def write(path: Path, names: list[str]) -> Path:
    with embedding_file(path, len(names), WIDTH, "judge") as add:
        add(names, torch.stack([vector(name) for name in names]))
    return path


@pytest.fixture(scope="module")
def names(shards: Path) -> list[str]:
    return [name for name, _ in read_shard_inputs(shards)]


def test_every_input_of_the_shards_is_read_once(shards: Path, names: list[str]) -> None:
    wanted = {
        f"{subset}/{role}/{i}" for subset in ("birds", "trees") for role in ("query", "target") for i in range(16)
    }
    assert len(names) == 64 and set(names) == wanted
    assert count_shard_inputs(shards) == (64, 0)
    sides = dict(read_shard_inputs(shards))
    assert sides["trees/target/3"].text == "trees 3" and sides["birds/query/2"].text == "qqq"


def test_a_pair_that_cannot_be_read_is_not_counted(
    shards: Path, names: list[str], tmp_path: Path, caplog, monkeypatch
) -> None:
    """One with a wrong checksum; one without a query and one whose id is a number, neither of which has a checksum."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    path = folder / "birds-000000.tar"
    damaged = path.read_bytes().replace(b'"text":"qqq"', b'"text":"qqr"')
    path.write_bytes(re.sub(rb'"query":({"id":"3".*?)"json_crc32"', rb'"quary":\1"json_crc99"', damaged))
    path.write_bytes(re.sub(rb'("query":{"id":)"5",(.*?)"json_crc32"', rb'\1  5,\2"json_crc99"', path.read_bytes()))
    gone = {"birds/query/2", "birds/query/3", "birds/target/3", "birds/query/5"}
    assert {name for name, _ in read_shard_inputs(folder)} == {*names} - gone
    checksum, malformed, number = caplog.messages
    assert number.endswith("subset, query.id and target.id must be strings, not ('birds', 5, '5')")
    caplog.clear()
    assert count_shard_inputs(folder) == (60, 0)
    monkeypatch.setenv("RANK", "1")
    assert len(list(read_shard_inputs(folder))) == 60 and not caplog.messages, "only the first rank says it, once"
    assert re.fullmatch(
        f"left out {path}: sample p2: its .json member is not what its checksum was made of.*", checksum
    )
    assert malformed == f"left out {path}: sample p3, query: a side must be an object with text and images"


def config(shards: Path, stored: Path, **loss: object) -> RunConfig:
    return RunConfig(
        data=DataConfig(path=str(shards), prompt="plain", max_length=64, workers=0, hard_negatives=1),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2),
        loss=LossConfig(reward="stored", stored_embeddings=str(stored), **loss),
    )


@pytest.mark.parametrize("negatives", ["global_batch", "micro_batch"])
def test_each_row_has_the_embedding_of_its_sequence(shards, names, tmp_path: Path, negatives: str) -> None:
    """Pairs are dealt to micro batches by length, and have one hard negative at most."""
    cfg = config(shards, write(tmp_path / "x.npy", names), negatives=negatives)
    pairs = {(subset, f"p{i}"): make_pair(subset, i) for subset in ("birds", "trees") for i in range(16)}
    for flat in itertools.islice(build_train_stream(cfg, ENCODER, 1, 2, 1), 4):
        for batch in unpack_step(flat).batches:
            own = [pairs[batch.subset, key] for key in batch.keys]
            expected = [f"{batch.subset}/query/{pair.query_id}" for pair in own]
            expected += [f"{batch.subset}/target/{pair.target_id}" for pair in own]
            expected += [f"{batch.subset}/target/{name}" for pair in own for name in pair.hard_negative_ids[:1]]
            rows = torch.nn.functional.normalize(torch.stack([vector(name) for name in expected]), dim=1)
            torch.testing.assert_close(batch.stored, rows, rtol=0, atol=1e-6)
            assert batch.stored.dtype == torch.float32


def test_formats_agree_and_another_model_is_another_identity(names: list[str], tmp_path: Path) -> None:
    plain = open_vectors(write(tmp_path / "x.npy", names))
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "a.parquet", names[40:])
    write(tmp_path / "parts" / "b.npy", names[:40])
    for other in (write(tmp_path / "y.parquet", names[::-1]), tmp_path / "parts"):
        vectors = open_vectors(other)
        assert vectors.identity == plain.identity
        assert torch.equal(vectors.rows(names[30:50]), plain.rows(names[30:50]))
    assert isinstance(plain.files[0], np.memmap) and plain.rows([]).shape == (0, WIDTH)
    half = np.load(tmp_path / "x.npy").astype(np.float16)
    np.save(tmp_path / "half.npy", half)
    (tmp_path / "half.ids").write_bytes((tmp_path / "x.ids").read_bytes())
    halved = open_vectors(tmp_path / "half.npy")
    torch.testing.assert_close(halved.rows(names), plain.rows(names), rtol=0, atol=1e-3)
    assert halved.identity != plain.identity


def test_a_run_resumes_with_the_same_embeddings_alone(shards: Path, names: list[str], tmp_path: Path) -> None:
    cfg = config(shards, write(tmp_path / "x.npy", names))
    stream = build_train_stream(cfg, ENCODER, 0, 1, 1)
    position = unpack_step(next(stream)).position
    copy = replace(cfg, loss=replace(cfg.loss, stored_embeddings=str(write(tmp_path / "copy.parquet", names))))
    resumed = unpack_step(next(build_train_stream(copy, ENCODER, 0, 1, 1, position)))
    assert [batch.keys for batch in resumed.batches] == [batch.keys for batch in unpack_step(next(stream)).batches]
    np.save(tmp_path / "x.npy", -np.load(tmp_path / "x.npy"))
    own = replace(cfg, loss=replace(cfg.loss, reward="self", stored_embeddings=None))
    for other, now in ((cfg, "those with identity [0-9a-f]{16}"), (own, "none")):
        with pytest.raises(ConfigError, match=f"the run to resume had those with .*, now it has {now}; give those"):
            build_train_stream(other, ENCODER, 0, 1, 1, position)


def test_what_cannot_be_used_is_refused_in_one_line(shards: Path, names: list[str], tmp_path: Path) -> None:
    file, ids = write(tmp_path / "x.npy", names), tmp_path / "x.ids"
    rows, written = np.load(file), ids.read_text()

    def refused(match: str, path: Path = file) -> None:
        with pytest.raises(DataError, match=match) as error:
            next(build_train_stream(config(shards, path), ENCODER, 0, 1, 1))
        assert "\n" not in str(error.value)

    (tmp_path / "empty").mkdir()
    refused("stored_embeddings=.*empty is no .npy or .parquet file, nor a folder", tmp_path / "empty")
    refused("absent.npy is no .npy file of embeddings: No such file", tmp_path / "absent.npy")
    for values, match in (
        (rows[:, 0], r"x.npy holds float32 \[64\] and not embeddings \[n, d\]"),
        (rows.astype(int), r"holds int64 \[64, 6\] and not"),
        (rows[1:], "has 63 embeddings and 64 ids"),
        (np.where(np.arange(64)[:, None] == 0, np.nan, rows), "x.npy: the embedding of 'birds/query/0' is not finite"),
        (rows * 0, "x.npy: the embedding of '.*' is not finite or zero"),
    ):
        np.save(file, values)
        refused(match)
    np.save(file, rows)
    ids.write_text(written.replace("trees/target/1\n", "trees/target/2\n"))
    refused("x.npy: two embeddings have the same id")
    ids.write_text(written.replace("trees/", "bushes/"))
    refused("x.npy has no embedding of 'trees/.*' among its 64; embed the shards of data.path with llave embed")
    ids.write_text(written)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    refused("bad.parquet is no Parquet file with columns id and embedding", tmp_path / "bad.parquet")


def test_their_cosines_are_the_scores_of_soft_labels(shards: Path, names: list[str], tmp_path: Path) -> None:
    """Of targets and hard negatives, in the order of the row; the vectors stay behind."""
    cfg = config(shards, write(tmp_path / "x.npy", names), soft_labels="stored")
    cfg.loss.reward, cfg.data.subsets = "self", {"birds": SubsetConfig()}
    pairs = {f"p{i}": make_pair("birds", i) for i in range(16)}
    for batch in unpack_step(next(build_train_stream(cfg, ENCODER, 0, 1, 1))).batches:
        own = [pairs[key] for key in batch.keys]
        compared = [(pair.query_id, pair.target_id) for pair in own]
        compared += [(pair.query_id, name) for pair in own for name in pair.hard_negative_ids[:1]]
        two = [(vector(f"birds/query/{q}"), vector(f"birds/target/{t}")) for q, t in compared]
        expected = torch.stack([torch.cosine_similarity(*both, dim=0) for both in two])
        torch.testing.assert_close(batch.scores, expected, rtol=0, atol=1e-6)
        assert batch.stored is None


def test_the_keys_go_together() -> None:
    def refused(loss: dict, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            require_effects(config_from_dict({"model": {"preset": "tiny"}, "train": {"steps": 1}, "loss": loss}))

    refused({"reward": "stored"}, "^loss.reward=stored need loss.stored_embeddings, a file or folder made by")
    refused({"reward": "ema", "stored_embeddings": "x.npy"}, "^loss.stored_embeddings=x.npy is used by loss.reward or")

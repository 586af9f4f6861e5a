"""The index: what is written comes back, and a folder that does not hold what its index says is one line."""

import json

import pytest

from megatron_llave.batch import Pair, Side
from megatron_llave.data.index import Index, fill_folder, read_index, write_index
from megatron_llave.data.shards import write_subset
from megatron_llave.errors import DataError
from megatron_llave.locks import WRITER_FILE


def prepared(folder, count=5):
    """Three shards of texts and their index."""
    pairs = (Pair(f"cats-{i}", "cats", Side(f"cat {i}", []), Side("cat", []), f"q{i}", "t") for i in range(count))
    write_index(folder, Index({"cats": write_subset(pairs, folder, "cats", "retrieval", 2)}))
    return folder


def test_index_comes_back(tmp_path):
    subset = write_subset([Pair("a", "cats", Side("x", []), Side("y", []), "q", "t")], tmp_path, "cats", "vqa")
    write_index(tmp_path, Index({"cats": subset}))
    read = read_index(tmp_path)
    assert read == Index({"cats": subset})
    assert read.subsets["cats"].pairs == 1 and read.subsets["cats"].meta_task == "vqa"


def test_index_checks_every_shard(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(DataError, match="index.json does not exist"):
        read_index(tmp_path)
    shard = prepared(tmp_path) / "cats-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=f"cats-000001.tar is truncated or changed: {len(data) - 1} bytes.*{len(data)}"):
        read_index(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="cats-000001.tar is missing"):
        read_index(tmp_path)


def set_version(value):
    value["version"] = 2


def drop_file(value):
    del value["subsets"]["cats"]["shards"][0]["file"]


def leave_folder(value):
    value["subsets"]["cats"]["shards"][0]["file"] = "../x.tar"


def misspell_task(value):
    value["subsets"]["cats"]["meta_task"] = "retreival"


def forget_format(value):
    del value["format"]


def set_shard(**changes: object):
    return lambda value: value["subsets"]["cats"]["shards"][0].update(changes)


def twice(value):
    value["subsets"]["cats"]["shards"] *= 2


def copied(value):
    shards = value["subsets"]["cats"]["shards"]
    shards.append({**shards[0], "file": "copy.tar", "sha256": shards[0]["sha256"].upper()})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_version, "'megatron_llave pairs' version 2, this code reads version 1"),
        (drop_file, "malformed.*file"),
        (leave_folder, "plain file name"),
        (set_shard(file="a" * 5000), "plain file name"),
        (set_shard(file="\ud83d.tar"), "plain file name"),
        (set_shard(file="./cats-000000.tar"), "plain file name"),
        (set_shard(pairs=10**12), "cannot hold 1000000000000 pairs"),
        (set_shard(pairs=10**400), "is not valid JSON .the integer"),
        (set_shard(pairs=10**8, bytes=10**15), "cannot hold 100000000 pairs"),
        (set_shard(pairs=True), "needs file, pairs and bytes"),
        (set_shard(pairs=-1), "cannot hold -1 pairs"),
        (twice, "shard cats-000000.tar is listed twice, so that its pairs would be used twice"),
        (copied, "shards cats-000000.tar and copy.tar have the same contents"),
        (lambda value: value["subsets"].update({"a/b": value["subsets"]["cats"]}), "malformed.*listed twice"),
        (lambda value: value.update(subsets={"a/b": value["subsets"]["cats"]}), "subset 'a/b' must be"),
        (lambda value: value.update(subsets=[]), "malformed"),
        (lambda value: value["subsets"].update(cats=None), "malformed"),
        (misspell_task, "'retreival' of cats is not one of"),
        (forget_format, "is not a 'megatron_llave pairs' file"),
    ],
)
def test_malformed_index(tmp_path, edit, message):
    path = prepared(tmp_path) / "index.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        read_index(tmp_path)


def test_a_link_to_another_shard_is_refused(tmp_path):
    path = prepared(tmp_path) / "index.json"
    value = json.loads(path.read_text())
    shards = value["subsets"]["cats"]["shards"]
    shards.append({**shards[0], "file": "link.tar", "sha256": "0" * 64})
    path.write_text(json.dumps(value))
    (tmp_path / "link.tar").symlink_to("cats-000000.tar")
    with pytest.raises(DataError, match="shards cats-000000.tar and link.tar are one file, which would be used twice"):
        read_index(tmp_path)


def test_index_that_is_no_json(tmp_path):
    (tmp_path / "index.json").write_text('{"subsets"')
    with pytest.raises(DataError, match="index.json is not valid JSON"):
        read_index(tmp_path)


def test_finished_folder_is_cleared_only_on_demand(tmp_path):
    prepared(tmp_path)
    (tmp_path / "mine-000000.tar").write_bytes(b"not named by the index")
    with pytest.raises(DataError, match="already holds finished shards.*--overwrite"), fill_folder(tmp_path, False):
        pass
    assert read_index(tmp_path).subsets["cats"].pairs == 5
    with fill_folder(tmp_path, overwrite=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == [WRITER_FILE, "mine-000000.tar"]
    with fill_folder(tmp_path / "fresh", overwrite=False):
        assert (tmp_path / "fresh").is_dir()
    with pytest.raises(DataError, match="mine-000000.tar.* cannot be made"):
        fill_folder(tmp_path / "mine-000000.tar", overwrite=False).__enter__()


def test_other_shards_are_cleared_when_one_is_missing(tmp_path):
    shards = read_index(prepared(tmp_path)).subsets["cats"].shards
    (tmp_path / shards[0].file).unlink()
    with fill_folder(tmp_path, overwrite=True):
        assert not list(tmp_path.glob("*.tar"))


def test_folder_that_is_being_written_is_refused(tmp_path):
    with fill_folder(tmp_path, overwrite=False):
        with pytest.raises(DataError, match="another process is writing into"):
            fill_folder(tmp_path, overwrite=True).__enter__()
    with fill_folder(tmp_path, overwrite=False):
        pass

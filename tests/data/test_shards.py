"""Shards: what is written comes back byte for byte, and every kind of damage is one line that names the file."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import tarfile

import pytest
import webdataset
from PIL import Image

from megatron_llave.batch import Pair, Side
from megatron_llave.data.shards import (
    Index,
    clear_finished,
    read_index,
    read_shard,
    write_index,
    write_shard,
    write_subset,
)
from megatron_llave.errors import DataError


def picture(colour, size=(8, 6), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def make_pairs(count, subset="cats"):
    for i in range(count):
        query = Side(f"Find \u732b {i}", [picture(i), picture(i, (9, 5), "JPEG")])
        yield Pair(f"{subset}-{i:03d}", subset, query, Side("cat" if i % 2 else "", []), f"q{i}", f"t{i % 3}")


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def prepared(folder, count=5):
    write_index(folder, Index({"cats": write_subset(make_pairs(count), folder, "cats", "retrieval", 2)}))
    return folder


def test_round_trip_is_byte_equal_and_in_order(tmp_path):
    subset = write_subset(make_pairs(5), tmp_path / "new", "cats", "retrieval", pairs_per_shard=2)
    assert [(shard.file, shard.pairs) for shard in subset.shards] == [
        ("cats-000000.tar", 2),
        ("cats-000001.tar", 2),
        ("cats-000002.tar", 1),
    ]
    assert subset.pairs == 5
    read = [pair for shard in subset.shards for pair in read_shard(tmp_path / "new" / shard.file)]
    assert read == list(make_pairs(5))
    write_index(tmp_path / "new", Index({"cats": subset}))
    assert read_index(tmp_path / "new") == Index({"cats": subset})


def test_exact_multiple_makes_no_empty_shard(tmp_path):
    subset = write_subset(make_pairs(4), tmp_path, "cats", "retrieval", pairs_per_shard=2)
    assert [shard.pairs for shard in subset.shards] == [2, 2]


def test_same_pairs_give_the_same_bytes_and_the_index_holds_their_checksum(tmp_path):
    first = write_subset(make_pairs(3), tmp_path / "a", "cats", "retrieval")
    second = write_subset(make_pairs(3), tmp_path / "b", "cats", "retrieval")
    assert first == second
    data = (tmp_path / "a/cats-000000.tar").read_bytes()
    assert first.shards[0].sha256 == hashlib.sha256(data).hexdigest()
    assert first.shards[0].bytes == len(data)
    assert write_subset(make_pairs(4), tmp_path / "c", "cats", "retrieval").shards[0].sha256 != first.shards[0].sha256


def test_layout_is_what_any_webdataset_tool_reads(tmp_path):
    write_subset(make_pairs(2), tmp_path, "cats", "retrieval")
    samples = list(webdataset.WebDataset(str(tmp_path / "cats-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["cats-000", "cats-001"]
    sample = samples[1]
    described = json.loads(sample["json"])
    assert described["query"] == {
        "id": "q1",
        "text": "Find \u732b 1",
        "images": ["query.0.png", "query.1.jpg"],
        "sizes": [[8, 6], [9, 5]],
    }
    assert described["target"] == {"id": "t1", "text": "cat", "images": [], "sizes": []}
    assert sample["query.1.jpg"] == picture(1, (9, 5), "JPEG")


def test_cut_anywhere_is_an_error_that_names_the_file(tmp_path):
    write_subset(make_pairs(4), tmp_path, "cats", "retrieval")
    whole = (tmp_path / "cats-000000.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    content = len(whole.rstrip(b"\0"))
    for size in [0, 1, 511, 512, *range(1024, content, 512), content - 3]:
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut.tar.*again"):
            list(read_shard(cut))


def test_damaged_header_does_not_pass_for_the_end(tmp_path):
    write_subset(make_pairs(12), tmp_path, "cats", "retrieval")
    path = tmp_path / "cats-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    data[offset : offset + 100] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(DataError, match="cats-000000.tar is damaged"):
        list(read_shard(path))


def test_other_files_are_not_taken_for_shards(tmp_path):
    with pytest.raises(DataError, match="none.tar cannot be read.*No such file"):
        list(read_shard(tmp_path / "none.tar"))
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(DataError, match="text.tar"):
        list(read_shard(tmp_path / "text.tar"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.json": None}, "sample a has no .json member"),
        ({"a.query.0.png": None}, "'query.0.png' is named in the JSON but not in the tar"),
        ({"a.json": b"{"}, "not valid JSON"),
        ({"a.json": b"[]"}, "must be an object"),
        ({"a.json": b"{}"}, "must be an object with text and images"),
        ({"a.json": b'{"query":{"text":"","images":["__key__"]},"target":{}}'}, "'__key__' is named"),
        ({"a.json": b'{"query":{"text":"","images":[]},"target":{"text":"","images":[]}}'}, "must be strings"),
    ],
)
def test_malformed_sample_names_file_and_sample(tmp_path, change, message):
    pair = Pair("a", "cats", Side("x", [picture(1)]), Side("y", []), "q", "t")
    write_shard([pair], tmp_path, "cats", 0)
    members = {**members_of(tmp_path / "cats-000000.tar"), **change}
    path = tmp_path / "bad.tar"
    write_members(path, {name: data for name, data in members.items() if data is not None})
    with pytest.raises(DataError, match=message) as caught:
        list(read_shard(path))
    assert str(path) in str(caught.value)
    assert "sample a" in str(caught.value)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_in_a_shard_are_never_loaded(tmp_path):
    write_subset(make_pairs(1), tmp_path, "cats", "retrieval")
    members = members_of(tmp_path / "cats-000000.tar")
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    traps = {f"cats-000.{suffix}": trap for suffix in ("pkl", "pyd", "pickle", "pth", "query.pyd")}
    write_members(tmp_path / "trap.tar", {**members, **traps})
    assert list(read_shard(tmp_path / "trap.tar")) == list(make_pairs(1))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a.b"}, "key 'a.b' must be"),
        ({"key": "__a"}, "key '__a' must be"),
        ({"key": "cats-000"}, "'cats-000' comes twice"),
        ({"subset": "dogs"}, "belongs to subset 'dogs'"),
        ({"query": Side("", [b"not a picture"])}, "image query.0 is not a picture"),
    ],
)
def test_unusable_pair_leaves_no_shard(tmp_path, changes, message):
    good, bad = make_pairs(2)
    with pytest.raises(DataError, match=message):
        write_shard([good, dataclasses.replace(bad, **changes)], tmp_path, "cats", 0)
    assert not (tmp_path / "cats-000000.tar").exists()


def test_empty_subset_is_refused(tmp_path):
    with pytest.raises(DataError, match="'cats'.*would be empty"):
        write_subset([], tmp_path, "cats", "retrieval")


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


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_version, "has version 2, this code reads version 1"),
        (drop_file, "malformed.*file"),
        (leave_folder, "plain file name"),
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


def test_index_that_is_no_json(tmp_path):
    (tmp_path / "index.json").write_text('{"subsets"')
    with pytest.raises(DataError, match="index.json is not valid JSON"):
        read_index(tmp_path)


def test_finished_folder_is_cleared_only_on_demand(tmp_path):
    prepared(tmp_path)
    (tmp_path / "mine-000000.tar").write_bytes(b"not named by the index")
    with pytest.raises(DataError, match="already holds finished shards.*--overwrite"):
        clear_finished(tmp_path, overwrite=False)
    assert read_index(tmp_path).subsets["cats"].pairs == 5
    clear_finished(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine-000000.tar"]
    clear_finished(tmp_path / "fresh", overwrite=False)
    assert (tmp_path / "fresh").is_dir()
    with pytest.raises(DataError, match="mine-000000.tar.* cannot be made"):
        clear_finished(tmp_path / "mine-000000.tar", overwrite=False)

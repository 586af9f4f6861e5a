"""Shards: what is written comes back byte for byte, and every kind of damage is one line that names the file."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import zlib

import pytest
import webdataset
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair, Side
from megatron_llave.data import shards
from megatron_llave.data.shards import read_samples, unpack_pair, write_shard, write_subset
from megatron_llave.errors import DataError


def picture(colour, size=(8, 6), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def make_pairs(count, subset="cats"):
    for i in range(count):
        query = Side(f"Find \u732b {i}", [picture(i), picture(i, (9, 5), "JPEG")])
        yield Pair(f"{subset}-{i:03d}", subset, query, Side("cat" if i % 2 else "", []), f"q{i}", f"t{i % 3}")


def with_negatives(pair, *negatives):
    sides, ids = [side for _, side in negatives], [name for name, _ in negatives]
    return dataclasses.replace(pair, hard_negatives=sides, hard_negative_ids=ids)


def pair_with_negatives():
    pair = Pair("a", "cats", Side("x", [picture(1)]), Side("y", []), "q", "t")
    return with_negatives(pair, ("n0", Side("no", [])), ("t", Side("", [picture(2), picture(3, kind="JPEG")])))


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


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
        "crc32": [zlib.crc32(sample["query.0.png"]), zlib.crc32(sample["query.1.jpg"])],
    }
    assert described["target"] == {"id": "t1", "text": "cat", "images": [], "sizes": []}
    assert sample["query.1.jpg"] == picture(1, (9, 5), "JPEG")


def test_hard_negatives_come_back_byte_for_byte(tmp_path):
    few, none = pair_with_negatives(), next(make_pairs(1))
    many = [(f"n{i}", Side(f"no {i}", [picture(i, kind="WEBP")])) for i in range(101)]
    longest = with_negatives(dataclasses.replace(few, key="k" * 80), *many)  # names of more than 100 characters
    pairs = [few, none, longest]
    write_shard(pairs, tmp_path, "cats", 0)
    assert list(read_shard(tmp_path / "cats-000000.tar")) == pairs
    members = members_of(tmp_path / "cats-000000.tar")
    assert members["a.negative.1.0.png"] == picture(2) and members["a.negative.1.1.jpg"] == picture(3, kind="JPEG")
    first, second = json.loads(members["a.json"])["hard_negatives"]
    assert first == {"id": "n0", "text": "no", "images": [], "sizes": []}
    assert second.pop("crc32") == [zlib.crc32(picture(2)), zlib.crc32(picture(3, kind="JPEG"))]
    images = ["negative.1.0.png", "negative.1.1.jpg"]
    assert second == {"id": "t", "text": "", "images": images, "sizes": [[8, 6], [8, 6]]}


def test_several_targets_and_scores_come_back_byte_for_byte(tmp_path):
    pair = dataclasses.replace(pair_with_negatives(), hard_negative_ids=["n0", "n1"])
    pair.further_targets, pair.further_target_ids = [Side("z", []), Side("", [picture(4), picture(5)])], ["t1", "t2"]
    scored = dataclasses.replace(pair, key="b", scores=[1.0, 0.5, 1e-3, -2.0, 7])
    single = dataclasses.replace(pair_with_negatives(), key="c", hard_negatives=[], hard_negative_ids=[], scores=[0.25])
    write_shard([pair, scored, single], tmp_path, "cats", 0)
    assert list(read_shard(tmp_path / "cats-000000.tar")) == [pair, scored, single]
    members = members_of(tmp_path / "cats-000000.tar")
    assert members["a.further_target.1.1.png"] == picture(5)
    assert [entry["id"] for entry in json.loads(members["b.json"])["further_targets"]] == ["t1", "t2"]


PLAIN_TARGET = {"id": "t", "text": "", "images": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {**PLAIN_TARGET, "score": float("nan")}}, "NaN is no finite number"),
        ({"target": {**PLAIN_TARGET, "score": "1"}}, "a score must be a number from -1e.30 to 1e.30, not '1'"),
        ({"target": {**PLAIN_TARGET, "score": 1e39}}, "a score must be a number from -1e.30 to 1e.30, not 1e"),
        (
            {"hard_negatives": [{"id": "n", "text": "", "images": [], "score": 1.0}]},
            "has 1 scores for 1 targets and 1 hard negatives; there must be one for each, or none",
        ),
        ({"further_targets": [{"id": "t", "text": "x", "images": []}]}, "the id 't' comes twice among its targets"),
        ({"further_targets": "x"}, "further_targets must be a list, not 'x'"),
        ({"further_targets": [{"text": "x", "images": []}]}, "further target 0: id must be a string, not None"),
        (
            {"target": {**PLAIN_TARGET, "score": 1}, "hard_negatives": [{**PLAIN_TARGET, "score": 0}]},
            "the id 't' comes twice among its targets and hard negatives",
        ),
    ],
)
def test_targets_and_scores_that_do_not_go_together_name_file_and_sample(tmp_path, changes, message):
    described = {"subset": "cats", "query": PLAIN_TARGET, "target": PLAIN_TARGET, **changes}
    path = tmp_path / "x.tar"
    write_members(path, {"k.json": json.dumps(described).encode()})
    with pytest.raises(DataError, match=re.escape(f"{path}: sample k") + ".*" + message) as caught:
        list(read_shard(path))
    assert "\n" not in str(caught.value)


def test_without_hard_negatives_the_json_is_that_of_older_shards_and_its_checksum(tmp_path):
    write_shard([Pair("a", "cats", Side("x", []), Side("y", []), "q", "t")], tmp_path, "cats", 0)
    older = b'{"subset":"cats","query":{"id":"q","text":"x","images":[],"sizes":[]},'
    older += b'"target":{"id":"t","text":"y","images":[],"sizes":[]}}'
    now = older[:-1] + b',"json_crc32":%d}' % zlib.crc32(older)
    assert members_of(tmp_path / "cats-000000.tar") == {"a.json": now}
    write_members(tmp_path / "older.tar", {"a.json": older})
    assert list(read_shard(tmp_path / "older.tar")) == list(read_shard(tmp_path / "cats-000000.tar"))


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


def test_a_sample_that_comes_twice_is_read_once(tmp_path):
    write_subset(make_pairs(2), tmp_path, "cats", "retrieval")
    path = tmp_path / "cats-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    first = members[0][0].name.partition(".")[0]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in (*members, *(part for part in members if part[0].name.startswith(first))):
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match="its key comes twice in the shard"):
        list(read_shard(path))


def test_other_files_are_not_taken_for_shards(tmp_path):
    with pytest.raises(DataError, match="none.tar cannot be read.*No such file"):
        list(read_shard(tmp_path / "none.tar"))
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 1000)
    with pytest.raises(DataError, match="text.tar"):
        list(read_shard(tmp_path / "text.tar"))


def test_a_flipped_bit_in_a_picture_is_seen_and_shards_without_checksums_are_read(tmp_path):
    pair = Pair("a", "cats", Side("x", [picture(1)]), Side("y", []), "q", "t")
    write_shard([pair], tmp_path, "cats", 0)
    members = members_of(tmp_path / "cats-000000.tar")
    flipped = bytearray(members["a.query.0.png"])
    flipped[30] ^= 1
    write_members(tmp_path / "flipped.tar", {**members, "a.query.0.png": bytes(flipped)})
    with pytest.raises(DataError, match="flipped.tar: sample a, query: an image's bytes are not those"):
        list(read_shard(tmp_path / "flipped.tar"))
    described = json.loads(members["a.json"])
    del described["query"]["crc32"], described["json_crc32"]
    write_members(tmp_path / "old.tar", {**members, "a.json": json.dumps(described).encode()})
    assert list(read_shard(tmp_path / "old.tar")) == [pair]
    wrong_ones = [(3, "seconds must be a list of numbers, not 3"), ([1], "one for each of its 0")]
    for wrong, message in wrong_ones:
        described["query"]["seconds"] = wrong
        write_members(tmp_path / "times.tar", {**members, "a.json": json.dumps(described).encode()})
        with pytest.raises(DataError, match=f"sample a, query: .*{message}"):
            list(read_shard(tmp_path / "times.tar"))


def test_any_changed_bit_of_the_json_is_noticed(tmp_path):
    """A bit of the checksum's own key may change unnoticed: the rest of the JSON is then what it was."""
    pair = Pair("a", "cats", Side("x \u00e4 y", [picture(1)]), Side("y", []), "q", "t")
    write_shard([pair], tmp_path, "cats", 0)
    (sample,) = read_samples(tmp_path / "cats-000000.tar")
    content, noticed = sample["json"], 0
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        try:
            assert unpack_pair({**sample, "json": bytes(changed)}, "sample") == pair
        except DataError:
            noticed += 1
    assert noticed >= 8 * (len(content) - len("json_crc32"))
    assert shards.to_json_bytes({"a": 1}) == b'{"a":1,"json_crc32":%d}' % zlib.crc32(b'{"a":1}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.json": b"[" * 100_000}, "nested deeper than 100"),
        ({"a.json": b'{"query": {"text": "\\ud83d", "images": []}}'}, "half a surrogate pair"),
        ({"a.json": b'{"query": {"text": "\\u0000", "images": []}}'}, "holds a NUL"),
        ({"a.json": b'{"query": "x", "target": 3}'}, "must be an object with text and images"),
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


PLAIN_SIDE = {"id": "n", "text": "", "images": []}


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ([PLAIN_SIDE, {"text": "", "images": []}], "hard negative 1: id must be a string, not None"),
        ([{**PLAIN_SIDE, "id": 3}], "hard negative 0: id must be a string, not 3"),
        ([PLAIN_SIDE, PLAIN_SIDE, "cat"], "hard negative 2: a side must be an object"),
        ([{"id": "n", "images": []}], "hard negative 0: a side must be an object"),
        ({"n": PLAIN_SIDE}, "hard_negatives must be a list, not {'n'"),
        (None, "hard_negatives must be a list, not None"),
        ([{**PLAIN_SIDE, "images": ["negative.0.0.png"]}], "hard negative 0: image member 'negative.0.0.png' is named"),
    ],
)
def test_malformed_hard_negative_names_file_and_sample(tmp_path, negatives, message):
    side = {"id": "x", "text": "", "images": []}
    described = {"subset": "cats", "query": side, "target": side, "hard_negatives": negatives}
    path = tmp_path / "bad.tar"
    write_members(path, {"a.json": json.dumps(described).encode()})
    with pytest.raises(DataError, match=re.escape(f"{path}: sample a") + ".*" + message):
        list(read_shard(path))


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
    with pytest.raises(DataError, match="its JSON does not name the members pickle, pkl, pth, pyd, query.pyd"):
        list(read_shard(tmp_path / "trap.tar"))
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
        ({"query": Side("", [b"not a picture"])}, "image query.0 is not an image"),
        ({"hard_negatives": [Side("", [])]}, "has 1 hard_negatives and 0 hard_negative_ids"),
        ({"hard_negatives": [Side("", [b"?"])], "hard_negative_ids": ["n"]}, "image negative.0.0 is not an image"),
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

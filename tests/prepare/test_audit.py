"""inspect counts exactly what is there; verify finds every kind of damage and nothing in a whole folder."""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from golden_model import byte_tokenizer
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.index import Index, Shard, Subset, read_index, write_index
from megatron_llave.data.shards import write_subset
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.models import build_processor
from megatron_llave.planning import pair_lengths
from megatron_llave.prepare import audit, mmeb

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
QWEN_SUBSET = GOLDEN / "prompts" / "qwen_subset_tokenizer.json"


def picture(size=(8, 6)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def make_pairs():
    """Three pairs with 5, 6 and 7 characters of query; one side of each modality."""
    wide, tall = picture((300, 20)), picture((20, 200))
    yield Pair("a", "cats", Side("five ", []), Side("<image>\n", [wide]), "q", "t")
    yield Pair("b", "cats", Side("<image>", [tall]), Side("t", [tall]), "q", "t")
    pair = Pair("c", "cats", Side("seven  ", [wide, tall]), Side("", []), "q", "t")
    yield dataclasses.replace(pair, hard_negatives=[Side("n" * 64, []), Side("", [tall])], hard_negative_ids=["1", "2"])


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    cats = write_subset(make_pairs(), out, "cats", "retrieval", 2)
    dogs = write_subset([Pair("d", "dogs", Side("d", []), Side("d", []), "q", "t")], out, "dogs", "vqa")
    write_index(out, Index({"cats": cats, "dogs": dogs}))
    return out


def test_counts_and_lengths_are_exact(folder):
    found = audit.inspect(folder)
    cats, dogs = found.subsets["cats"], found.subsets["dogs"]
    assert (cats.counted, cats.subset.pairs, cats.with_hard_negatives) == (3, 3, 1)
    assert cats.query == {"text": 1, "image": 1, "both": 1}
    assert cats.target == {"image": 1, "both": 1, "text": 1}
    assert (dogs.counted, dogs.query, dogs.target) == (1, {"text": 1}, {"text": 1})
    assert found.lengths == {
        "characters": {
            "query": {5: 1, 7: 2, 1: 1},
            "target": {8: 1, 1: 2, 0: 1},
            "hard negative": {64: 1, 0: 1},
        },
        "pixels": {"query": {200: 2, 300: 1}, "target": {300: 1, 200: 1}, "hard negative": {200: 1}},
    }


def test_histogram_doubles_and_leaves_out_no_length():
    lengths = {"query": Counter({0: 1, 1: 2, 2: 3, 3: 4, 4: 5}), "target": Counter({31: 6, 32: 7})}
    assert audit.histogram(lengths) == [
        (0, 0, {"query": 1, "target": 0}),
        (1, 1, {"query": 2, "target": 0}),
        (2, 3, {"query": 7, "target": 0}),
        (4, 7, {"query": 5, "target": 0}),
        (8, 15, {"query": 0, "target": 0}),
        (16, 31, {"query": 0, "target": 6}),
        (32, 63, {"query": 0, "target": 7}),
    ]


@pytest.mark.parametrize("preset", ["0.5b", "tiny"])
def test_token_lengths_are_those_that_training_packs(tmp_path, preset):
    mmeb.prepare(GOLDEN / "mmeb" / "train", tmp_path / "out", workers=1)
    tokenizer = QWEN_SUBSET if preset == "0.5b" else byte_tokenizer(tmp_path)
    found = audit.inspect(tmp_path / "out", tokenizer, preset)
    model = config_from_dict({"model": {"preset": preset}}).model
    model.language.vocab_size = 200_000
    template = "plain" if preset == "tiny" else "qwen"
    encoder = build_processor(DataConfig(tokenizer=str(tokenizer), prompt=template, max_length=10_000), model)
    expected = {"query": Counter(), "target": Counter(), "hard negative": Counter()}
    for subset in read_index(tmp_path / "out").subsets.values():
        for shard in subset.shards:
            for pair in read_shard(tmp_path / "out" / shard.file):
                expected["query"][encoder.encode(pair.query).length] += 1
                expected["target"][encoder.encode(pair.target).length] += 1
                expected["hard negative"].update(encoder.encode(side).length for side in pair.hard_negatives)
    assert found.lengths == {"tokens": expected} and found.not_encodable == 0
    assert sum(expected["query"].values()) == 40


def test_no_image_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *given, **named: pytest.fail("an image was opened"))
    audit.inspect(folder)
    audit.inspect(folder, QWEN_SUBSET, "0.5b")


def test_sides_that_training_would_leave_out_are_counted(tmp_path):
    pairs = [Pair("a", "cats", Side("<image> <image>", [picture()]), Side("t", []), "q", "t")]
    write_index(tmp_path, Index({"cats": write_subset(pairs, tmp_path, "cats", "vqa")}))
    found = audit.inspect(tmp_path, QWEN_SUBSET, "0.5b")
    assert found.not_encodable == 1 and list(found.lengths["tokens"]) == ["target"]


def test_large_subsets_are_sampled_evenly(folder, monkeypatch):
    shards = [Shard(f"{n}.tar", 1000, 0, "") for n in range(100)]
    assert pair_lengths.sample_shards(Subset("vqa", shards)) == shards[::5]
    assert pair_lengths.sample_shards(Subset("vqa", shards[:20])) == shards[:20]
    assert pair_lengths.sample_shards(Subset("vqa", [])) == []
    monkeypatch.setattr(pair_lengths, "PAIRS_COUNTED", 1)
    cats = audit.inspect(folder).subsets["cats"]
    assert (cats.counted, cats.subset.pairs) == (2, 3)


def test_inspect_refuses_half_of_what_tokens_need(folder):
    for given in ({"tokenizer": QWEN_SUBSET}, {"preset": "0.5b"}):
        with pytest.raises(ConfigError, match="need both --tokenizer and --preset"):
            audit.inspect(folder, **given)


def problems(folder):
    return [problem for _, check in audit.verify(folder) for problem in check.problems]


def test_whole_folder_has_no_problem(folder):
    assert problems(folder) == []


def lossy_pairs():
    """Two pairs whose images lose something when they are read."""
    kinds = {"alpha": Image.new("RGBA", (9, 9)), "deep": Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11))}
    for key, image in kinds.items():
        data = io.BytesIO()
        image.save(data, "PNG")
        yield Pair(key, "cats", Side("", [data.getvalue()]), Side("t", []), "q", "t")


def test_verify_decodes_every_image_and_says_what_it_loses(tmp_path):
    cut = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(cut, "JPEG")
    bad = Pair("cut", "cats", Side("", [cut.getvalue()[:-300]]), Side("", [picture((200, 100))]), "q", "t")
    shard = write_subset([*lossy_pairs(), bad], tmp_path, "cats", "vqa")
    write_index(tmp_path, Index({"cats": shard}))
    ((name, check),) = audit.verify(tmp_path, workers=1, max_pixels=10_000)
    assert name == "cats"
    truncated, too_large = check.problems
    assert "sample cut: member query.0.jpg is no readable image" in truncated and "truncated" in truncated
    assert "sample cut: member target.0.png: image of 200x100 pixels exceeds the limit of 10000 pixels" in too_large
    assert check.noticed == [
        ("image with transparency", "alpha query.0.png"),
        ("image of one colour", "alpha query.0.png"),
        ("image of more than 8 bits per channel", "deep query.0.png"),
    ]


def test_inspect_counts_what_the_report_noticed(folder):
    line = {"subset": "cats", "row": 0, "reason": "noticed: image of one colour", "detail": "query: 'a.png'"}
    missing = json.dumps(line | {"reason": "missing image"})
    (folder / "report.jsonl").write_text(f"{json.dumps(line)}\n{missing}\n{json.dumps(line)}\n")
    assert audit.inspect(folder).noticed == {"cats": {"image of one colour": 2}}
    for damaged, words in (("[" * 9000, "report.jsonl:1"), ("3\n", "report.jsonl:1 must be an object")):
        (folder / "report.jsonl").write_text(damaged)
        with pytest.raises(DataError, match=words):
            audit.inspect(folder)


def test_flipped_byte_of_an_image_is_found_twice(folder):
    path = folder / "cats-000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember("b.target.0.png")
    data[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(data)
    checksum, image = problems(folder)
    assert checksum.startswith(f"shard {path}: its sha256 is ")
    assert image.startswith(f"{path}: sample b, target: an image's bytes are not those that its checksum was made of")


def rewrite(folder, file, change, mend_index=True):
    """Change {name: bytes} of a shard; the index agrees with the new file, so that only the members are wrong."""
    path = folder / file
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = read_index(folder, check_shards=False)
    for subset in index.subsets.values():
        for number, shard in enumerate(subset.shards):
            if shard.file == file:
                data = path.read_bytes()
                digest = audit.sha256_of(path)
                subset.shards[number] = dataclasses.replace(shard, bytes=len(data), sha256=digest)
    write_index(folder, index)


def edit_json(members, name, edit):
    described = json.loads(members[name])
    del described["json_crc32"]  # as in a shard of other tools, which only its other checks protect
    edit(described)
    members[name] = json.dumps(described).encode()


def drop_checksums(described):
    for side in (described["query"], described["target"]):
        side.pop("crc32", None)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda m: m.pop("b.query.0.png"), "sample b, query: image member 'query.0.png' is named in the JSON but not"),
        (lambda m: m.pop("a.json"), "sample a has no .json member"),
        (
            lambda m: m.update({"a.json": m["a.json"].replace(b"cats", b"dogs")}),
            "sample a: its .json member is not what its checksum was made of",
        ),
        (lambda m: m.update({"b.more.png": b""}), "sample b: its JSON does not name the members more.png"),
        (
            lambda m: edit_json(m, "a.json", lambda d: d["target"].update(sizes=[[300, 21]])),
            "sample a: member target.0.png is of size [300, 20], its JSON says [300, 21]",
        ),
        (
            lambda m: edit_json(m, "a.json", lambda d: d["target"].pop("sizes")),
            "sample a: member target.0.png is of size [300, 20], its JSON says None",
        ),
        (
            lambda m: edit_json(m, "a.json", lambda d: d.update(subset="dogs")),
            "sample a is of subset 'dogs', the index",
        ),
        (
            lambda m: edit_json(m, "b.json", lambda d: d["query"].update(crc32=[1])),
            "sample b, query: an image's bytes are not those",
        ),
        (lambda m: [m.pop(name) for name in list(m) if name.startswith("a.")], "holds 1 pairs, the index says 2"),
        (lambda m: m.update({"a.late.png": b""}), "sample a comes twice, or other members stand between"),
    ],
)
def test_damage_is_named_with_file_and_key(folder, change, found):
    rewrite(folder, "cats-000000.tar", change)
    lines = problems(folder)
    assert any(f"{folder / 'cats-000000.tar'}" in line and found in line for line in lines), lines
    assert all("cats-000000.tar" in line and "\n" not in line for line in lines)


def test_shards_without_checksums_are_checked_by_the_rest(folder):
    def strip(members):
        for name in ("a.json", "b.json"):
            edit_json(members, name, drop_checksums)

    rewrite(folder, "cats-000000.tar", strip)
    assert problems(folder) == []

    def spoil(members):
        members["b.query.0.png"] = b"no picture"

    rewrite(folder, "cats-000000.tar", spoil)
    (line,) = problems(folder)
    assert "sample b: member query.0.png is no readable image" in line


def test_samples_that_are_in_two_shards_are_named(folder):
    """A copy of a shard that was packed anew has other bytes."""
    index = read_index(folder, check_shards=False)
    again = write_subset([pair for pair in make_pairs() if pair.key < "c"], folder / "again", "cats", "retrieval", 2)
    data = (folder / "again" / "cats-000000.tar").read_bytes() + bytes(10240)
    (folder / "copy.tar").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    index.subsets["cats"].shards.append(Shard("copy.tar", again.shards[0].pairs, len(data), digest))
    write_index(folder, index)
    assert problems(folder) == [f"{folder / 'copy.tar'} has 2 samples whose keys come before too; a run takes both"]


def test_missing_cut_and_foreign_shards(folder):
    (folder / "dogs-000000.tar").unlink()
    path = folder / "cats-000001.tar"
    path.write_bytes(path.read_bytes()[:-1000])
    lines = problems(folder)
    assert any("dogs-000000.tar is missing" in line for line in lines)
    assert any("cats-000001.tar is truncated or changed" in line for line in lines)
    assert any("cats-000001.tar is truncated or not a tar" in line for line in lines)
    index = json.loads((folder / "index.json").read_text())
    index["subsets"]["dogs"]["shards"][0]["file"] = "../x.tar"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="'../x.tar' must be a plain file name"):
        problems(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="index.json does not exist"):
        problems(folder)

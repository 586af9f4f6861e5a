"""Tars of images with captions become pairs, read where they lie; damage costs what it hits."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_pairs import read_shard

from megatron_llave.batch import Pair
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.prepare import webdataset
from megatron_llave.prepare.own_pairs import Options
from megatron_llave.prepare.stored_images import TarMember


def picture(number: int, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)).save(data, form)
    return data.getvalue()


def write_tar(path: str, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number: int, suffix: str = "jpg") -> dict[str, bytes]:
    """The members of a sample as img2dataset writes them."""
    key, text = f"{number:09d}", f"a caption, {number}"
    form = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    values = {"url": "https://host/x.jpg", "key": key, "status": "success", "caption": text, "sha256": "", "alt": "alt"}
    members = {f"{key}.{suffix}": picture(number, form), f"{key}.json": json.dumps(values).encode()}
    return members | {f"{key}.txt": f"{text}\n".encode()}


def made(*sources: str, caption: str | None = None, limit: int | None = None) -> list[Pair]:
    webdataset.prepare(sources, "out", caption, limit, Options(workers=1, overwrite=True))
    return [pair for shard in sorted(Path("out").glob("*.tar")) for pair in read_shard(shard)]


def texts(pairs: list[Pair]) -> list[str]:
    return [pair.query.text for pair in pairs]


def report() -> list[tuple[str, str, str]]:
    lines = map(json.loads, Path("out/report.jsonl").read_text().splitlines())
    return [(line["row"], line["reason"], line["detail"]) for line in lines]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("source", ["data/{00000..00002}.tar", "data", "data/*.tar", "file:data/0000{0,1,2}.tar"])
def test_tars_of_img2dataset(source: str, form: int) -> None:
    suffixes = ["jpg", "webp", "png"]
    for number, suffix in enumerate(suffixes):
        write_tar(f"data/{number:05d}.tar", sample(number, suffix) | sample(number + 3, suffix), form)
        Path(f"data/{number:05d}_stats.json").write_text("{}")
    pairs = made(source)
    order = [0, 3, 1, 4, 2, 5]
    assert texts(pairs) == [f"a caption, {number}" for number in order]
    assert [pair.key for pair in pairs] == [f"captions-{number:08d}" for number in range(6)]
    for number, pair in zip(order, pairs):
        suffix = suffixes[number % 3]
        assert pair.target.text == "Represent the given image."
        assert pair.target.images == [picture(number, {"jpg": "JPEG"}.get(suffix, suffix.upper()))]
    assert texts(made(source, caption="alt", limit=4)) == ["alt"] * 4


def test_where_the_caption_is() -> None:
    members = {
        "a/1.png": picture(1),
        "a/1.json": b'{"caption": "of json"}',
        "b/1.PNG": picture(2),
        "b/1.TXT": b" of  txt ",
    }
    members |= {"c.jpeg": picture(3), "c.json": b'{"caption": null}', "d.png": picture(4), "d.cls": b"7"}
    write_tar("t.tar", members)
    assert texts(made("t.tar")) == ["of json", "of txt"]
    assert report() == [(f"t.tar: {key}", "empty side", "query: neither text nor image") for key in ("c", "d")]
    write_tar("u.tar", {"a/1.png": picture(1), "a/1.json": b'{"caption": "of json"}', "2.png": b"", "2.json": b"3"})
    with pytest.raises(DataError, match="a/1.json has no 'alt'; its keys are caption; no row of the source is a pair"):
        made("u.tar", caption="alt")


def test_samples_that_are_no_pairs_are_counted_and_named() -> None:
    bad = {
        "two": (
            {"two.png": picture(1), "two.depth.png": b"", "two.jpg": b"", "two.txt": b"x"},
            "images are: two.png, two.jpg",
        ),
        "none": ({"none.txt": b"x"}, "its images are: none"),
        "latin": ({"latin.png": picture(1), "latin.txt": b"\xff"}, "latin.txt is not UTF-8 text"),
        "json": ({"json.png": picture(1), "json.json": b"{"}, "json.json is not valid JSON"),
        "number": ({"number.png": picture(1), "number.json": b'{"caption": 3}'}, "caption must be a text, not 3"),
        "broken": ({"broken.png": b"x", "broken.txt": b"x"}, "t.tar: broken.png"),
    }
    members = sample(1) | {name: data for some, _ in bad.values() for name, data in some.items()} | sample(2)
    write_tar("t.tar", members)
    assert len(made("t.tar")) == 2
    assert [row for row, *_ in report()] == [f"t.tar: {key}" for key in bad]
    assert all(detail in found for (_, detail), (*_, found) in zip(bad.values(), report()))
    assert [reason for _, reason, _ in report()] == ["row is no pair"] * 5 + ["corrupt image"]


def test_a_tar_that_is_cut_short_gives_what_is_whole() -> None:
    write_tar("t.tar", sample(1) | sample(2) | sample(3))
    data = Path("t.tar").read_bytes()
    write_tar("u.tar", sample(4))
    third = data.index(b"000000003.jpg")  # where its header begins
    # Within the third image, behind its header, before it, and within the end of the second sample.
    for end, whole in ((third + 600, 2), (third + 512, 2), (third, 2), (third - 300, 1)):
        Path("t.tar").write_bytes(data[:end])
        assert texts(made("t.tar", "u.tar")) == [f"a caption, {number}" for number in (1, 2)[:whole] + (4,)]
        assert [(row, reason) for row, reason, _ in report()] == [("t.tar", "row is no pair")]
    Path("t.tar").write_bytes(data[:third] + b"x" * 512 + data[third + 512 :])
    made("t.tar", "u.tar")
    assert "download it again, or decompress it" in report()[0][2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://host/{00..09}.tar", "is on the network; download the tars"),
        ("pipe:cat x.tar", "is on the network"),
        ("gone/{0..1}.tar", "--source gone/0.tar is no tar, no folder of tars"),
        ("empty", "--source empty is no tar, no folder of tars"),
        ("{a,b", "--source {a,b"),
        ("t.gz", "t.gz: the tar is damaged, cut short, or compressed .*; no row of the source is a pair"),
    ],
)
def test_what_cannot_be_is_refused(source: str, message: str) -> None:
    Path("empty").mkdir()
    Path("t.gz").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises((ConfigError, DataError), match=message):
        webdataset.prepare([source], "out")


def test_no_member_of_a_tar_is_written_or_followed() -> None:
    """Names that lead out of the folder, and links, name nothing: members are never unpacked."""
    members: dict[str, Any] = {"../../escape.png": picture(1), "../../escape.txt": b"kept", "/abs.png": picture(2)}
    write_tar("t.tar", members | {"/abs.txt": b"kept too"})
    with tarfile.open("t.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        write = tarfile.TarInfo("link.txt")
        write.size = 1
        tar.addfile(write, io.BytesIO(b"x"))
    assert texts(made("t.tar")) == ["kept", "kept too"]
    assert [row for row, *_ in report()] == ["t.tar: link"]


def test_a_member_is_read_at_its_place() -> None:
    write_tar("t.tar", sample(1))
    with tarfile.open("t.tar") as tar:
        info = tar.getmember("000000001.jpg")
    member = TarMember("t.tar", info.name, info.offset_data, info.size)
    assert member.read() == picture(1, "JPEG")
    Path("t.tar").write_bytes(Path("t.tar").read_bytes()[:600])
    with pytest.raises(DataError, match="t.tar: 000000001.jpg is cut short"):
        member.read()

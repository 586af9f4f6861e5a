"""Finding samples in a tar: the same as WebDataset finds, names that cannot be used, damage."""

import io
import os
import resource
import tarfile

import pytest
import webdataset

from megatron_llave.data import tar_members
from megatron_llave.data.tar_members import find_samples, read_sample
from megatron_llave.errors import DataError


def write_tar(path, members, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data) if kind == tarfile.REGTYPE else 0, kind
            info.linkname = "elsewhere"
            tar.addfile(info, io.BytesIO(data))


def read_all(path):
    with open(path, "rb") as file:
        return [(sample.key, read_sample(file, path, sample)) for sample in find_samples(file, path)]


def test_samples_are_those_that_webdataset_finds(tmp_path):
    path = tmp_path / "x.tar"
    members = [("a.json", b"1"), ("a.query.0.png", b"two"), ("b.json", b"")]
    write_tar(path, [*members, ("__notes__/x.txt", b"n"), ("README", b"r"), ("c.x.y", b"z")])
    found = read_all(path)
    assert found == [("a", {"json": b"1", "query.0.png": b"two"}), ("b", {"json": b""}), ("c", {"x.y": b"z"})]
    theirs = webdataset.DataPipeline(webdataset.SimpleShardList(str(path)), webdataset.tarfile_to_samples())
    assert [(s["__key__"], {k: v for k, v in s.items() if k[0] != "_"}) for s in theirs] == found


@pytest.mark.parametrize("name", ["../../a", "/etc/a", "folder/a", "a" * 81, "a b", "__a"])
def test_a_name_that_leads_elsewhere_makes_its_sample_unusable_and_no_other(tmp_path, name):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.json", b"1"), (f"{name}.json", b"2"), ("b.json", b"3")])
    with open(path, "rb") as file:
        first, strange, last = find_samples(file, path)
        assert read_sample(file, path, first) == {"json": b"1"} and read_sample(file, path, last) == {"json": b"3"}
        with pytest.raises(DataError, match="x.tar: sample .* must be 1 to 80 letters"):
            read_sample(file, path, strange)


def test_a_member_that_comes_twice(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.json", b"1"), ("a.json", b"2")])
    with pytest.raises(DataError, match="sample a: member 'json' comes twice"):
        read_all(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_folders_are_no_members(tmp_path, kind):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.json", b"1")], kind)
    assert read_all(path) == []


def test_an_empty_file_an_empty_tar_and_a_file_that_shrinks(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="x.tar is truncated or not a tar"):
        read_all(path)
    write_tar(path, [])
    assert read_all(path) == []
    write_tar(path, [("a.json", bytes(5000))])
    with open(path, "rb") as file:
        [sample] = find_samples(file, path)
        os.truncate(path, 2000)
        with pytest.raises(DataError, match="sample a: member 'json' is cut short"):
            read_sample(file, path, sample)


def test_a_huge_member_costs_its_sample_and_a_tail_of_zeros_is_not_held_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.tar"
    write_tar(path, [("a.json", b"1"), ("b.json", bytes(3000))])
    monkeypatch.setattr(tar_members, "MAX_MEMBER_BYTES", 2000)
    with open(path, "ab") as file:
        file.truncate(path.stat().st_size + 2**28)
    with open(path, "rb") as file:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        small, large = find_samples(file, path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
        assert read_sample(file, path, small) == {"json": b"1"}
        with pytest.raises(DataError, match="sample b: member 'json' has 3000 bytes, more than 2000"):
            read_sample(file, path, large)

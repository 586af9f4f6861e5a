"""Shards from a folder, over HTTP and through a command: copied once, checked, tried again, never more than allowed."""

import functools
import hashlib
import http.server
import os
import stat
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_llave.batch import Pair, Side
from megatron_llave.config.data import DataConfig
from megatron_llave.data.index import Index, Shard, write_index
from megatron_llave.data.shards import write_subset
from megatron_llave.data.storage import Storage, Unreachable, open_storage
from megatron_llave.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    """Four shards of two texts."""
    directory = tmp_path / "pairs"
    pairs = (Pair(f"c-{i}", "cats", Side(f"cat {i}", []), Side("cat", []), f"q{i}", "t") for i in range(8))
    write_index(directory, Index({"cats": write_subset(pairs, directory, "cats", "retrieval", 2)}))
    return directory


@pytest.fixture
def server(folder):
    """The folder over HTTP; `.asked` lists the files that were asked for, `.refuse` how many requests fail."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked, refuse = [], [0]

        def do_GET(self):
            self.asked.append(self.path.rpartition("/")[2])
            if self.refuse[0]:
                self.refuse[0] -= 1
                self.send_error(404)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    Handler.url = f"http://127.0.0.1:{httpd.server_port}"
    yield Handler
    httpd.shutdown()
    httpd.server_close()


def shards(storage):
    return storage.read_index().subsets["cats"].shards


def test_a_folder_is_read_in_place(folder):
    storage = open_storage(DataConfig(path=str(folder)))
    assert [storage.fetch(shard) for shard in shards(storage)] == sorted(folder.glob("*.tar"))
    storage.check(shards(storage)[0])
    with pytest.raises(DataError, match="nothing.tar is missing"):
        storage.check(Shard("nothing.tar", 2, 1, ""))


def test_http_copies_each_shard_once(server, folder, tmp_path):
    storage = open_storage(DataConfig(path=server.url, cache=str(tmp_path / "cache")))
    found = shards(storage)
    with ThreadPoolExecutor(8) as pool:  # as many ranks and workers of a node do
        copies = list(pool.map(storage.fetch, found * 4))
    assert sorted(server.asked) == [*sorted(shard.file for shard in found), "index.json"]
    for shard, copy in zip(found, copies):
        assert copy.read_bytes() == (folder / shard.file).read_bytes()


def test_command_gets_the_name_of_the_file(folder, tmp_path):
    storage = open_storage(DataConfig(path=f"pipe:cat {folder}/{{file}}", cache=str(tmp_path / "cache")))
    [first, *_] = shards(storage)
    assert storage.fetch(first).read_bytes() == (folder / first.file).read_bytes()
    with pytest.raises(ConfigError, match=r"data.path=pipe:cat x must say where the name of the shard goes: \{file\}"):
        open_storage(DataConfig(path="pipe:cat x"))


@pytest.mark.parametrize("name", ["x; touch sprung", "$(touch sprung)", "../x.tar", "a b.tar", "-rf", ""])
def test_an_index_cannot_bring_a_command_or_a_path(tmp_path, name):
    storage = Storage(f"pipe:cd {tmp_path}; cat {{file}}", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    with pytest.raises(DataError, match="which is no plain file name"):
        storage.fetch(Shard(name, 1, 1, ""))
    assert not list(tmp_path.rglob("sprung"))


def test_failures_are_tried_again_after_longer_and_longer_waits(server, tmp_path):
    waits = []
    storage = Storage(server.url, tmp_path / "cache", 10**9, retries=3, wait=waits.append)
    server.refuse[0] = 3
    [first, *_] = shards(storage)
    assert waits == [1, 2, 4]
    server.refuse[0] = 100
    with pytest.raises(Unreachable, match="cats-000000.tar cannot be fetched, after 4 attempts"):
        storage.fetch(first)
    server.refuse[0] = 0
    assert storage.fetch(first).is_file()


def test_other_bytes_than_the_index_says_are_the_datas_fault(server, folder, tmp_path):
    storage = Storage(server.url, tmp_path / "cache", 10**9, retries=1, wait=lambda seconds: None)
    first, second, *_ = shards(storage)
    content = (folder / first.file).read_bytes()
    (folder / first.file).write_bytes(content[:2000])
    with pytest.raises(DataError, match=f"2000 bytes came, not the {len(content)} of the index"):
        storage.fetch(first)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert storage.fetch(second).is_file()


def test_least_recently_used_copies_make_room(server, tmp_path):
    whole = Storage(server.url, tmp_path / "whole", 10**9)
    found = shards(whole)
    size = found[0].bytes
    storage = Storage(server.url, tmp_path / "cache", 2 * size + size // 2)
    copies = []
    for shard in (found[0], found[1], found[0], found[2]):
        copies.append(storage.fetch(shard))
    assert [copy.is_file() for copy in copies] == [True, False, True, True]
    held = open(storage.fetch(found[2]), "rb")
    storage.fetch(found[1])
    storage.fetch(found[3])
    assert len(held.read()) == size  # what is open stays readable
    held.close()


@pytest.fixture
def shared(server, tmp_path, monkeypatch):
    """A storage whose copies are in a temporary folder that other users write into, and the folder of the copies."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    storage = open_storage(DataConfig(path=server.url))
    return storage, storage.cache / hashlib.sha256(server.url.encode()).hexdigest()[:16]


def test_the_folder_of_the_copies_is_private(shared):
    storage, folder = shared
    [first, *_] = shards(storage)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    storage.fetch(first)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (storage.cache, folder)] == [0o700, 0o700]


@pytest.mark.parametrize("which", ["cache", "folder"])
@pytest.mark.parametrize("how", ["link", "other user", "file"])
def test_a_folder_that_somebody_else_made_is_refused(shared, tmp_path, monkeypatch, which, how):
    storage, folder = shared
    [first, *_] = shards(storage)
    place = storage.cache if which == "cache" else folder
    place.parent.mkdir(exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    if how == "link":
        place.symlink_to(tmp_path / "elsewhere")
    elif how == "file":
        place.write_text("")
    else:
        place.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="data.cache"):
        storage.fetch(first)
    if which == "cache":
        with pytest.raises(ConfigError, match=f"{place} .*set data.cache to one"):
            open_storage(DataConfig(path=storage.path))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_links_in_the_folder_of_the_copies_are_not_followed(shared, tmp_path):
    storage, folder = shared
    first, second, third, _ = shards(storage)
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    folder.mkdir(parents=True)
    (folder / f".{first.file}.partial").symlink_to(victim)
    (folder / second.file).symlink_to(victim)
    for shard in (first, second):
        copy = storage.fetch(shard)
        assert not copy.is_symlink() and copy.stat().st_size == shard.bytes
    (folder / f"{third.file}.lock").symlink_to(victim)
    with pytest.raises(ConfigError, match=f"{third.file}.lock cannot be opened: .*set data.cache to another folder"):
        storage.fetch(third)
    assert victim.read_text() == "precious"


def test_a_planted_or_changed_copy_is_fetched_again(shared, server, folder, caplog):
    storage, cache = shared
    first, second, *_ = shards(storage)
    cache.mkdir(parents=True)
    (cache / first.file).write_bytes(bytes(first.bytes))
    (cache / second.file).write_bytes(b"short")
    for shard in (first, second, first):
        assert storage.fetch(shard).read_bytes() == (folder / shard.file).read_bytes()
    assert caplog.text.count("is not what the index says; it is fetched again") == 1
    assert sorted(server.asked) == sorted([first.file, second.file, "index.json"])

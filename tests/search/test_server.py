"""The page's server, asked as a browser, another site, or an attacker would."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import uvicorn
from forking import ROOT, fork
from PIL import Image
from searching import fake_embed, png, serving, write_fake_index

from megatron_llave.commands.search import main
from megatron_llave.distributed import process_groups
from megatron_llave.errors import ConfigError
from megatron_llave.search import guard, server
from megatron_llave.search.build import BuildOptions, build_index
from megatron_llave.search.index import open_index
from megatron_llave.search.thumbnails import Thumbnails

JSON = {"Content-Type": "application/json"}


class Answer:
    """What came back of a request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(address: str, path: str, body: object = None, headers: dict[str, str] = {}, method: str = "") -> Answer:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, content, {**({} if body is None else JSON), **headers})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def search(address: str, **body: object) -> dict[str, Any]:
    answer = ask(address, "/api/search", body)
    assert answer.status == 200, answer.body
    return answer.json


def names(answer: dict[str, Any]) -> list[str]:
    return [hit["files"][0] for hit in answer["results"]]


@pytest.fixture
def index(pictures: Path, tmp_path: Path) -> Path:
    write_fake_index(tmp_path / "index", pictures)
    return tmp_path / "index"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """An address that many tests ask, and the texts that were searched for there."""
    folder, asked = tmp_path_factory.mktemp("shared"), []
    (folder / "pictures").mkdir()
    (folder / "pictures" / "0.png").write_bytes(png(0))
    write_fake_index(folder / "index", folder / "pictures")

    def note(text: str, image: bytes | None) -> np.ndarray:
        asked.append(text)
        return fake_embed(text, image)

    with serving(folder / "index", note) as address:
        yield address, asked


def test_searches_by_text_image_both_and_like(index: Path, pictures: Path, serve) -> None:
    address = serve(index)
    opened = open_index(index)
    image = (pictures / "04.png").read_bytes()
    for body, query in (
        ({"text": "3"}, fake_embed("3", None)),
        ({"image": base64.b64encode(image).decode()}, fake_embed("", image)),
        ({"text": "3", "image": base64.b64encode(image).decode()}, fake_embed("3", image)),
    ):
        answer = search(address, **body)
        exact = opened.vectors @ query
        assert names(answer) == [f"{row:02d}.png" for row in np.argsort(-exact)] and answer["exact"] is True
        similar = [hit["similarity"] for hit in answer["results"]]
        np.testing.assert_allclose(similar, np.sort(exact)[::-1], atol=6e-5)
    chosen = answer["results"][2]
    like = search(address, like=chosen["id"])
    assert len(like["results"]) == 11 and chosen["id"] not in {hit["id"] for hit in like["results"]}
    first = search(address, text="3", count=5)
    rest = search(address, token=first["token"], offset=5, count=100)
    assert names(first) + names(rest) == names(search(address, text="3")) and rest["total"] == 12
    assert names(search(address, offset=10)) == ["10.png", "11.png"]
    assert ask(address, "/api/about").json["images"] == 12


def test_pages_have_a_strict_policy_and_load_nothing_from_elsewhere(index: Path, serve) -> None:
    address = serve(index)
    for path, media_type in {path: media_type for path, (_, media_type) in server.PAGE.items()}.items():
        answer = ask(address, path)
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(media_type)
        text = answer.body.decode().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http:" not in text and "https:" not in text and "url(" not in text and "innerHTML" not in text
        assert "style=" not in text and "onclick" not in text and "<script>" not in text
    for path in ("/", "/api/about", "/nowhere", "/api/search", f"/thumbnail/{'0' * 64}"):
        headers = ask(address, path).headers
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:8765"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_sites_cannot_search(shared: tuple[str, list[str]], headers: dict[str, str], status: int) -> None:
    address, asked = shared
    asked.clear()
    answer = ask(address, "/api/search", {"text": "3"}, headers)
    assert answer.status == status and bool(asked) == (status == 200)
    if status != 200:
        assert answer.json["error"].endswith(".") and "Access-Control-Allow-Origin" not in answer.headers


def test_bodies_are_bounded_with_and_without_a_length(index: Path, serve, monkeypatch) -> None:
    monkeypatch.setattr(guard, "MOST_BYTES", 10_000)
    address = serve(index)
    answer = ask(address, "/api/search", b'{"text": "' + b"x" * 20_000 + b'"}')
    assert answer.status == 413 and "too large" in answer.json["error"]
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request("POST", "/api/search", iter([b" " * 6000] * 3), JSON, encode_chunked=True)
    answer = Answer(connection.getresponse())
    assert answer.status == 413 and "too large" in answer.json["error"]
    connection.close()
    assert search(address, text="3")["results"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 422, "The search is not valid JSON"),
        (b"[1]", 400, "A search is one JSON object."),
        ({"text": 3}, 400, "The words hold something that is no text."),
        ({"text": "\ud83d"}, 422, "half a surrogate pair"),
        ({"text": "x" * 2001}, 400, "The words are too many: 2,001 characters of at most 2,000."),
        ({"text": "  "}, 400, "Give words to look for, or an image, or both."),
        ({"image": "###"}, 400, "The image did not arrive whole."),
        ({"image": 3}, 400, "The image did not arrive whole."),
        ({"image": base64.b64encode(b"<svg/>").decode()}, 422, "The image cannot be used: not a readable image"),
        ({"text": "3", "offset": -1}, 400, "offset must be a number from 0 on."),
        ({"text": "3", "count": "all"}, 400, "count must be a number from 0 on."),
        ({"like": "00"}, 404, "This image is not in the index any more. Search again."),
        ({"like": "../../etc/passwd"}, 404, "This image is not in the index any more."),
        ({"token": "unknown"}, 410, "These results are no longer kept. Search again."),
    ],
)
def test_wrong_searches_are_plain_sentences(
    shared: tuple[str, list[str]], body: object, status: int, sentence: str
) -> None:
    answer = ask(shared[0], "/api/search", body)
    assert answer.status == status and sentence in answer.json["error"], answer.body


def test_only_the_bytes_that_were_indexed_are_shown(index: Path, pictures: Path, tmp_path: Path, serve) -> None:
    address = serve(index)
    ids = {hit["files"][0]: hit["id"] for hit in search(address)["results"]}
    answer = ask(address, f"/thumbnail/{ids['00.png']}")
    assert answer.status == 200 and answer.headers["Content-Type"] == "image/webp"
    assert "private" in answer.headers["Cache-Control"]
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    (pictures / "01.png").unlink()
    (pictures / "01.png").symlink_to(secret)
    (pictures / "02.png").unlink()
    for name, what in (("01.png", "has changed since the index was built"), ("02.png", "is no longer there")):
        for size in ("thumbnail", "image"):
            answer = ask(address, f"/{size}/{ids[name]}")
            assert answer.status == 410 and answer.json["error"].startswith(f"{name} {what}"), answer.body
    unknown = hashlib.sha256(png(99)).hexdigest()
    for path in (
        f"/image/{unknown}",
        "/image/../../secret.png",
        "/image/%2e%2e%2fsecret.png",
        f"/other/{ids['00.png']}",
        "/page/index.html",
        "/manifest.json",
        "//etc/passwd",
    ):
        answer = ask(address, path)
        assert answer.status == 404 and answer.json["error"].endswith("."), path
    assert ask(address, "/api/search", method="DELETE").status == 404


def test_large_images_and_bombs(pictures: Path, tmp_path: Path, serve) -> None:
    Image.new("RGB", (3000, 1500), "red").save(pictures / "large.jpg", exif=b"Exif\0\0secret place")
    write_fake_index(tmp_path / "index", pictures)
    address = serve(tmp_path / "index")
    (large,) = [hit["id"] for hit in search(address)["results"] if hit["files"] == ["large.jpg"]]
    for size, sides in (("thumbnail", (384, 192)), ("image", (2048, 1024))):
        content = ask(address, f"/{size}/{large}").body
        assert Image.open(io.BytesIO(content)).size == sides and b"secret" not in content
    bomb = io.BytesIO()
    Image.new("1", (9_450, 9_450)).save(bomb, "PNG")
    answer = ask(address, "/api/search", {"image": base64.b64encode(bomb.getvalue()).decode()})
    assert answer.status == 422 and "exceeds the limit of 89000000 pixels" in answer.json["error"]


def test_thumbnails_are_kept_up_to_a_size(index: Path, pictures: Path) -> None:
    opened, one = open_index(index), len(Thumbnails(pictures).get(open_index(index), 0, "thumbnail"))
    thumbnails = Thumbnails(pictures, most_bytes=3 * one)
    first = thumbnails.get(opened, 0, "thumbnail")
    assert thumbnails.get(opened, 0, "thumbnail") is first
    for row in range(12):
        thumbnails.get(opened, row, "thumbnail")
    kept = sum(map(len, thumbnails._kept.values()))
    assert kept == thumbnails._size <= 3 * one and thumbnails.get(opened, 0, "thumbnail") is not first


def test_odd_names_and_copies_arrive_as_text(tmp_path: Path, serve) -> None:
    pictures = tmp_path / "odd"
    pictures.mkdir()
    (pictures / "line\nend & <b>.png").write_bytes(png(1))
    with open(os.fsencode(pictures) + b"/\xff.png", "wb") as file:
        file.write(png(2))
    write_fake_index(tmp_path / "index", pictures)
    assert names(search(serve(tmp_path / "index"))) == ["line\nend & <b>.png", "\ufffd.png"]


def test_one_search_at_a_time_and_the_page_answers_meanwhile(index: Path, serve, monkeypatch) -> None:
    monkeypatch.setattr(server, "MOST_WAITING", 3)
    go, running, most = threading.Event(), [], []

    def slow(text: str, image: bytes | None) -> np.ndarray:
        running.append(text)
        most.append(len(running))
        assert go.wait(20)
        running.remove(text)
        return fake_embed(text, image)

    address = serve(index, slow)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, address, "/api/search", {"text": f"{number}"}) for number in range(3)]
        while not running:
            time.sleep(0.01)
        deadline = time.monotonic() + 20
        while (refused := ask(address, "/api/search", {"text": "one more"}, {})).status != 503:
            assert time.monotonic() < deadline
        assert refused.json["error"] == "Too many searches are waiting. Try again in a moment."
        assert ask(address, "/api/about").status == 200 and search(address)["total"] == 12
        go.set()
        assert [answer.result().status for answer in answers] == [200, 200, 200]
    assert max(most) == 1


def test_a_new_build_is_seen_and_another_model_is_not(index: Path, pictures: Path, serve) -> None:
    address = serve(index)
    first = search(address, text="3", count=2)
    (pictures / "new.png").write_bytes(png(50))
    write_fake_index(index, pictures, vectors="int8", dims=4)
    assert search(address)["total"] == 13
    assert search(address, token=first["token"], offset=2)["images"] == 12, "its pages stay those of one index"
    answer = search(address, text="3")
    assert answer["exact"] is False and answer["search"].startswith("approximate (int8, 4 of 8 numbers; finds ")
    write_fake_index(index, pictures, model={"weights": "others"})
    answer = ask(address, "/api/about")
    assert answer.status == 409 and "Start the page again" in answer.json["error"]


def test_an_empty_index(tmp_path: Path, serve) -> None:
    (tmp_path / "none").mkdir()
    write_fake_index(tmp_path / "index", tmp_path / "none")
    address = serve(tmp_path / "index")
    assert search(address)["results"] == [] == search(address, text="3")["results"]


def test_a_port_in_use_and_other_addresses_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use; choose another --port, or --port 0 for any"):
            server.listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--port 70000 must be between 0 and 65535"):
        server.listen("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match="--host 203.0.113.9 --port 0 cannot be listened on"):
        server.listen("203.0.113.9", 0)


def test_the_command_asks_once(model_folder: Path, pictures: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(process_groups, "destroy_distributed", lambda: None)
    (pictures / "copy\nof 3.png").write_bytes((pictures / "03.png").read_bytes())
    (pictures / "broken.jpg").write_bytes(b"x")
    (pictures / "photo.heic").write_bytes(b"x")
    index, built = str(tmp_path / "index"), ["--pictures", str(pictures), "--out", str(tmp_path / "index")]
    main(["build", "--checkpoint", str(model_folder), *built, "--text-prompt", "Find {}\\n", "--vectors", "int8"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        f"{index}: 12 images and 1 copy of them",
        "files: 14 new, 0 changed, 0 removed; images embedded: 12",
    ]
    assert "prompt of a query (text): 'Find {}\\n'" in printed and "1 file cannot be used:" in printed
    assert any(line.startswith("  broken.jpg: not a readable image") for line in printed)
    assert printed[-1] == "1 other file left out by the ending of the name: 1 .heic"
    main(["query", index, "a cat", "--image", str(pictures / "03.png"), "--top", "3", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["found"]) == 3 and answer["exact"] is False and answer["prompts"]["text"] == "Find {}\n"
    main(["query", index, "--image", str(pictures / "03.png"), "--top", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and sum(line.endswith("03.png  (and 1 copy)") for line in lines) == 1
    assert lines[-1].startswith("the search is approximate (int8; finds 100.0 % of the ten nearest images")
    main(["recall", index, "--dims", "4", "--dims", "64"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in table[1:]] == [["float32", "4"], ["int8", "4"], ["float32", "64"], ["int8", "64"]]
    assert table[3][3:] == ["1.000", "1.000"]
    (tmp_path / "no.png").write_bytes(b"nothing")
    for wrong, message in (
        (["query", index], "give words to look for, or --image FILE, or both"),
        (["query", index, "a", "--top", "0"], "--top 0 must be at least 1"),
        (["query", index, "a", "--text-prompt", "no place"], "--text-prompt 'no place' must hold {} once"),
        (["query", index, "a", "--like-prompt", "<image><image>"], "--like-prompt: text has 2 image placeholders for"),
        (["query", index, "--image", str(tmp_path / "no.png")], f"input {tmp_path}/no.png cannot be embedded: not a"),
        (["query", str(tmp_path), "a"], "manifest.json does not exist; llave search build makes an index"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line, line


def test_what_a_user_reads_of_the_page(index: Path, monkeypatch, capsys) -> None:
    """Without the packages, on all addresses of the machine, and at its end; no browser asks anything here."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "starlette", None)
        with pytest.raises(SystemExit):
            main(["serve", str(index)])
        line = "error: the page needs starlette: pip install starlette uvicorn (the extra search)\n"
        assert capsys.readouterr().err == line

    def stop(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", stop)
    for host, warnings in (("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1)):
        if host == "::1" and not socket.has_dualstack_ipv6():
            continue
        server.serve(index, lambda opened: fake_embed, host, 0)
        printed = capsys.readouterr()
        address = re.escape(f"[{host}]" if ":" in host else host)
        assert re.search(rf"index: 12 images, exact search\nhttp://{address}:\d+/ \(Ctrl-C ends it\)\n", printed.out)
        assert printed.err.count("warning: everyone who can reach 0.0.0.0 can see these images") == warnings


def test_the_command_serves_until_ctrl_c(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """A process as a user starts it: the address, a search by words, Ctrl-C."""
    index, tool = tmp_path / "index", ROOT / "tools" / "search.py"
    build_index(BuildOptions(pictures, index, str(model_folder)))
    (tmp_path / "out").touch(), (tmp_path / "err").touch()
    process = fork([str(tool), "serve", str(index), "--port", "0"], (str(tmp_path / "out"), str(tmp_path / "err")), {})
    try:
        deadline = time.monotonic() + 100
        while "Ctrl-C" not in (printed := (tmp_path / "out").read_text()):
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.05)
        address = printed.splitlines()[-1].split("/ (")[0]
        assert address.startswith("http://127.0.0.1:") and urllib.request.urlopen(address).status == 200
        assert len(search(address, text="a cat")["results"]) == 12
        os.kill(process.pid, signal.SIGINT)
        process.join(20)
        assert process.exitcode == 0 and (tmp_path / "out").read_text().endswith("the page has ended\n")
        assert (tmp_path / "err").read_text() == ""
    finally:
        process.kill()

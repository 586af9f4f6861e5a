"""The local web page of an index: searches by text, by image, by both, and by an image of the index.

Files of the page are in page/. The model works in one thread, one query at a time; images are read in others; so the
page answers while a query waits. Results of a query are kept under a token, by which the page asks for more of them.
"""

import asyncio
import base64
import binascii
import errno
import os
import secrets
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_llave.errors import BadInputError, ConfigError, DataError, UserError
from megatron_llave.files import NO_CHARACTER, parse_json
from megatron_llave.search.guard import Guard, TooLargeBodyError
from megatron_llave.search.index import MANIFEST, Hit, ImageIndex, about, open_index
from megatron_llave.search.query import EmbedQuery
from megatron_llave.search.thumbnails import MEDIA_TYPE, SIDES, Thumbnails

PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PER_PAGE, MOST_PER_PAGE = 60, 200
MOST_RESULTS = 10_000
"""Results of a query that can be scrolled through."""
MOST_APPROXIMATE = 1000
"""The same for small vectors: more of them would be read from all over the file of the exact ones."""
MOST_KEPT = 32
"""Queries whose results are kept."""
MOST_WAITING = 16
"""Queries that may wait for the model."""
LONGEST_TEXT = 2000
"""Characters of a query."""
IMAGE_THREADS = 2
"""Images that are made smaller at a time; the largest take 1.5 GB of memory meanwhile."""
SHUTDOWN_SECONDS = 3
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class Results:
    """What a query has found, in the index as it was then."""

    index: ImageIndex
    hits: list[Hit]
    seconds: float


class PlainError(Exception):
    """A request that cannot be answered; the page shows the sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass
class Searcher:
    """The state of the page: the index, which is opened again when a build has replaced it, and the latest results."""

    folder: Path
    embed: EmbedQuery
    pictures: str | None = None
    """Where the images are now; None: where they were."""
    model_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"))
    image_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(IMAGE_THREADS, "images"))

    def __post_init__(self) -> None:
        """Open the index."""
        self._index, self._state = open_index(self.folder), self._state_now()
        self.model = self._index.manifest.model
        self.thumbnails = Thumbnails(self.pictures or self._index.manifest.pictures)
        self.kept: OrderedDict[str, Results] = OrderedDict()
        self.waiting = 0

    def _state_now(self) -> tuple[int, int]:
        status = (self.folder / MANIFEST).stat()  # a build puts a new file in its place
        return status.st_ino, status.st_mtime_ns

    async def index(self) -> ImageIndex:
        """The index as it is now; one that another model has built meanwhile is not taken."""
        try:
            state = self._state_now()
        except OSError as error:
            raise PlainError(503, f"The index cannot be read: {error.strerror}.") from error
        if state != self._state:
            new = await in_thread(self.image_threads, open_index, self.folder)
            if new.manifest.model != self.model:
                raise PlainError(409, "The index was built again with another model. Start the page again.")
            self._index, self._state = new, state
            self.thumbnails.pictures = self.pictures or new.manifest.pictures
        return self._index

    def find(self, index: ImageIndex, text: str, image: bytes | None) -> Results:
        """Search with the model; runs in its thread."""
        started = time.perf_counter()
        hits = index.search(self.embed(text, image), most_results(index))
        return Results(index, hits, time.perf_counter() - started)

    def find_like(self, index: ImageIndex, row: int) -> Results:
        """Search for the nearest images of one that is in the index, by its own vector; without the model."""
        started = time.perf_counter()
        hits = index.search(index.vectors[row], most_results(index) + 1)
        return Results(index, [hit for hit in hits if hit.row != row], time.perf_counter() - started)

    def keep(self, results: Results) -> str:
        """Keep results for further pages; returns their token."""
        token = secrets.token_urlsafe(12)
        self.kept[token] = results
        while len(self.kept) > MOST_KEPT:
            self.kept.popitem(last=False)
        return token


def most_results(index: ImageIndex) -> int:
    """How many results of a query are kept."""
    return MOST_RESULTS if index.manifest.is_exact else MOST_APPROXIMATE


def make_app(searcher: Searcher) -> Starlette:
    """Return the application."""

    def route(path: str, handle: Callable[[Searcher, Request], Awaitable[Response]], method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await handle(searcher, request)
            except PlainError as error:
                return JSONResponse({"error": str(error)}, error.status)
            except TooLargeBodyError:
                return JSONResponse({"error": "The image is too large."}, 413)
            except BadInputError as error:
                reason = str(error).partition("cannot be embedded: ")[2] or str(error)
                return JSONResponse({"error": f"The image cannot be used: {reason}."}, 422)
            except UserError as error:
                return JSONResponse({"error": f"{str(error)[:1].upper()}{str(error)[1:]}."}, 422)

        return Route(path, endpoint, methods=[method])

    async def no_page(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "There is no such page."}, 404)

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "Something went wrong; the terminal says more."}, 500)

    routes = [route(path, send_file) for path in PAGE]
    routes += [
        route("/api/about", send_about),
        route("/api/search", send_search, "POST"),
        route("/{size:str}/{name:str}", send_image),
    ]
    handlers = {404: no_page, 405: no_page, 500: failed}
    return Starlette(routes=routes, middleware=[Middleware(Guard)], exception_handlers=handlers)


async def send_file(searcher: Searcher, request: Request) -> Response:
    """A file of the page."""
    name, media_type = PAGE[request.url.path]
    content = (resources.files("megatron_llave.search") / "page" / name).read_bytes()
    return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


async def send_about(searcher: Searcher, request: Request) -> Response:
    """What the index holds."""
    return JSONResponse(shown(about((await searcher.index()).manifest)))


async def send_image(searcher: Searcher, request: Request) -> Response:
    """/thumbnail/ID or /image/ID: an image of the index by the SHA-256 of its content."""
    size, name = request.path_params["size"], request.path_params["name"]
    if size not in SIDES:
        raise PlainError(404, "There is no such page.")
    index = await searcher.index()
    row = row_of(index, name)
    try:
        made = await in_thread(searcher.image_threads, searcher.thumbnails.get, index, row, size)
    except DataError as error:
        raise PlainError(410, f"{error}.") from error
    return Response(made, media_type=MEDIA_TYPE, headers={"Cache-Control": "private, max-age=86400, immutable"})


async def send_search(searcher: Searcher, request: Request) -> Response:
    """Results of a search: a page of them, and a token for the next.

    The body is {"text": ..., "image": base64, "like": ID} for a new search, with the first or the second or both, or
    the third alone; {"token": ...} for more of one; {} for all images in order; each with offset and count.
    """
    body = parse_json(await request.body() or b"{}", "the search")
    if not isinstance(body, dict):
        raise PlainError(400, "A search is one JSON object.")
    offset, count = (number_of(body, key, default) for key, default in (("offset", 0), ("count", PER_PAGE)))
    count = min(count, MOST_PER_PAGE)
    if "token" in body:
        results = searcher.kept.get(str(body["token"]))
        if results is None:
            raise PlainError(410, "These results are no longer kept. Search again.")
        searcher.kept.move_to_end(str(body["token"]))
        return page_of(results, str(body["token"]), offset, count)
    index = await searcher.index()
    if not {"text", "image", "like"} & body.keys():
        hits = [describe(index, row, None) for row in range(offset, min(offset + count, len(index)))]
        return JSONResponse({"results": hits, "total": len(index), "images": len(index)})
    results = await search_for(searcher, index, body, request)
    return page_of(results, searcher.keep(results), offset, count)


async def search_for(searcher: Searcher, index: ImageIndex, body: dict[str, Any], request: Request) -> Results:
    """Run a new search."""
    if "like" in body:
        return await in_thread(searcher.image_threads, searcher.find_like, index, row_of(index, str(body["like"])))
    text, image = body.get("text", ""), image_of(body)
    if not isinstance(text, str) or NO_CHARACTER.search(text):
        raise PlainError(400, "The words hold something that is no text.")
    if len(text) > LONGEST_TEXT:
        raise PlainError(400, f"The words are too many: {len(text):,} characters of at most {LONGEST_TEXT:,}.")
    if not text.strip() and image is None:
        raise PlainError(400, "Give words to look for, or an image, or both.")
    if searcher.waiting >= MOST_WAITING:
        raise PlainError(503, "Too many searches are waiting. Try again in a moment.")
    searcher.waiting += 1
    try:
        return await in_thread(searcher.model_thread, searcher.find, index, text, image)
    finally:
        searcher.waiting -= 1


def image_of(body: dict[str, Any]) -> bytes | None:
    """The bytes of a search's image."""
    if body.get("image") is None:
        return None
    try:
        return base64.b64decode(body["image"], validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise PlainError(400, "The image did not arrive whole. Try again.") from error


def number_of(body: dict[str, Any], key: str, default: int) -> int:
    """An integer of a search that is not negative."""
    value = body.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlainError(400, f"{key} must be a number from 0 on.")
    return value


def row_of(index: ImageIndex, name: str) -> int:
    """The row of the image whose SHA-256 a request names."""
    try:
        return index.row_of_digest[bytes.fromhex(name)]
    except (ValueError, KeyError):
        raise PlainError(404, "This image is not in the index any more. Search again.") from None


def page_of(results: Results, token: str, offset: int, count: int) -> Response:
    """A page of the results of a query."""
    hits = [describe(results.index, hit.row, hit.similarity) for hit in results.hits[offset : offset + count]]
    return JSONResponse(
        {
            "results": hits,
            "total": len(results.hits),
            "images": len(results.index),
            "token": token,
            "seconds": round(results.seconds, 4),
            "search": results.index.manifest.kind,
            "exact": results.index.manifest.is_exact,
        }
    )


def describe(index: ImageIndex, row: int, similarity: float | None) -> dict[str, Any]:
    """What the page shows of an image."""
    files = index.files_of(row)
    about_it = {"id": files[0].digest.hex(), "files": [file.name for file in files]}
    return shown(about_it if similarity is None else {**about_it, "similarity": round(similarity, 4)})


def shown(value: Any) -> Any:
    """A value whose strings can be sent as UTF-8: bytes of names that are no text become the replacement character."""
    if isinstance(value, str):
        return NO_CHARACTER.sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: shown(inner) for key, inner in value.items()}
    return [shown(inner) for inner in value] if isinstance(value, list) else value


async def in_thread(threads: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in one of the threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the port is in use or is not allowed, or the address is not one of this machine.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port} must be between 0 and 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is in use; choose another --port, or --port 0 for any that is free"
            ) from error
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error


def serve(
    folder: str | os.PathLike,
    load: Callable[[ImageIndex], EmbedQuery],
    host: str = "127.0.0.1",
    port: int = 8765,
    pictures: str | None = None,
) -> None:
    """Serve the page of an index until Ctrl-C.

    Args:
        folder: of the index.
        load: loads the model of the index.
        host: address to listen on; any but this machine's own loopback is warned of.
        port: 0: any that is free.
        pictures: where the images are now, if their folder has moved.

    Raises:
        UserError: the index or the model cannot be read, or the port is in use.
    """
    index = open_index(folder)
    with listen(host, port) as listener:  # before the model is loaded, which takes longer
        searcher = Searcher(Path(folder), load(index), pictures)
        address = f"[{host}]" if ":" in host else host
        print(f"{folder}: {len(index):,} images, {index.manifest.kind} search", flush=True)
        if host not in LOOPBACK:
            print(f"warning: everyone who can reach {host} can see these images; there is no password", file=sys.stderr)
        print(f"http://{address}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            make_app(searcher), log_level="error", lifespan="off", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            searcher.model_thread.shutdown(cancel_futures=True)
            searcher.image_threads.shutdown(cancel_futures=True)
    print("the page has ended")

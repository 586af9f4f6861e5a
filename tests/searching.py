"""Indexes of images without a model: colours stand for embeddings, so that tests of the page are fast."""

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image

from megatron_llave.data.image_files import BadImageError, decode_image
from megatron_llave.errors import BadInputError
from megatron_llave.search.index import Manifest, write_index
from megatron_llave.search.prompts import CAPTIONS
from megatron_llave.search.query import EmbedQuery
from megatron_llave.search.scan import ImageFile, hash_file, scan_folder
from megatron_llave.search.server import Searcher, listen, make_app

WIDTH = 8


def png(seed: int, size: int = 24) -> bytes:
    """An image that is unlike those of other seeds."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(content, "PNG")
    return content.getvalue()


def colour_vector(image: bytes) -> np.ndarray:
    """[WIDTH] float32 of unit length: what stands for an embedding of an image, fast and the same for equal pixels."""
    small = np.asarray(decode_image(image).resize((2, 2)), np.float32).reshape(-1)[:WIDTH] + 1
    return small / np.linalg.norm(small)


def fake_embed(text: str, image: bytes | None) -> np.ndarray:
    """Stands for the model of an index: an image is its colours, a text the image with that seed."""
    try:
        rows = [colour_vector(image)] if image is not None else []
    except BadImageError as error:
        raise BadInputError(f"input of the query cannot be embedded: {error}") from error
    if text:
        number = int(text) if text.isdigit() else int(hashlib.md5(text.encode()).hexdigest()[:4], 16)
        rows.append(colour_vector(png(number)))
    total = np.sum(rows, axis=0)
    return (total / np.linalg.norm(total)).astype(np.float32)


def write_fake_index(index: Path, pictures: Path, **manifest: object) -> Manifest:
    """Index a folder of images by their colours, without a model."""
    index.mkdir(exist_ok=True)
    files = [hash_file(pictures, file) for file in scan_folder(pictures).files]
    vectors = [colour_vector((pictures / file.name).read_bytes()) for file in files]
    return write_rows(
        index, pictures, files, np.stack(vectors) if files else np.empty((0, WIDTH), np.float32), manifest
    )


def write_rows(index: Path, pictures: Path, files: list[ImageFile], vectors: np.ndarray, options: dict) -> Manifest:
    """Write an index of one row per file."""
    described = {"pictures": str(pictures), "checkpoint": "a model", "model": {"weights": "w"}, "prompts": CAPTIONS}
    counts = {"folder": "", "images": len(vectors), "files": 0, "unreadable": 0, "width": vectors.shape[1]}
    manifest = Manifest(**{**described, **counts, "sha256": {}, **options})
    return write_index(index, manifest, files, range(len(files)), [vectors])


@contextmanager
def serving(index: Path, embed: EmbedQuery = fake_embed) -> Iterator[str]:
    """Serve the page of an index in a thread; yields the address."""
    listener = listen("127.0.0.1", 0)
    app = make_app(Searcher(index, embed))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()

"""Fixtures of the tests of the search: a model, folders of images, and a page that is served in a thread."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from golden_model import ONEVISION, byte_tokenizer
from searching import fake_embed, png, serving

Serve = Callable[..., str]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a Hugging Face folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ONEVISION / name, folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with twelve different images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(png(number))
    return folder


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves an index in a thread until the test ends; returns the address."""
    with ExitStack() as running:
        yield lambda index, embed=fake_embed: running.enter_context(serving(index, embed))

"""What `make search` runs: the demo's images, and commands that the parser knows."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from forking import ROOT
from PIL import Image

from megatron_llave.errors import UserError
from megatron_llave.options.search import build_parser
from megatron_llave.prepare.openmoji import images
from megatron_llave.prepare.openmoji.catalogue import Catalogue
from megatron_llave.prepare.openmoji.tasks import INSTRUCTIONS


def test_the_images_are_named_after_the_emoji(emoji_catalogue: Catalogue, tmp_path: Path, monkeypatch) -> None:
    emoji = emoji_catalogue.emoji
    chosen = [i for i, one in enumerate(emoji) if one.split == "combo"][:3]
    chosen += [i for i, one in enumerate(emoji) if one.split == "train" and one.group == "People & Body"][:4]
    chosen += [i for i, one in enumerate(emoji) if one.split == "ood"][:2]
    few = Catalogue([emoji[i] for i in chosen], emoji_catalogue.pixels[chosen])
    monkeypatch.setattr(images, "build_catalogue", lambda size: few)
    assert images.write_images(tmp_path / "out") == 7
    found = {path.relative_to(tmp_path / "out").as_posix(): Image.open(path).size for path in tmp_path.rglob("*.png")}
    parts = [images.NOT_TRAINED] * 3 + [images.TRAINED] * 4
    assert found == {f"{part}/People & Body/{one.name}.png": (224, 224) for part, one in zip(parts, few.emoji)}
    with pytest.raises(UserError, match="out exists already; choose another name for the images, or remove it"):
        images.write_images(tmp_path / "out")


def test_make_search_gives_the_texts_that_the_demo_was_trained_with() -> None:
    command = ["make", "-n", "-o", ".venv/.installed", "search", "OUT=O", "SEARCH=S", "PORT=7"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100).stdout
    lines = re.findall(r"tools/search\.py (.*)", made.replace("\\\n", ""))
    write, build, serve = (build_parser().parse_args(shlex.split(line)) for line in lines)
    assert (write.command, build.command, serve.command) == ("demo-images", "build", "serve")
    assert (write.out, build.pictures, build.out, serve.index, build.checkpoint, serve.port) == (
        "S/images", "S/images", "S/index", "S/index", "O", 7,
    )  # fmt: skip
    given = build.text_prompt, build.like_prompt, build.both_prompt
    assert given == tuple(INSTRUCTIONS[name] for name in ("name_to_image", "image_to_image", "composed"))

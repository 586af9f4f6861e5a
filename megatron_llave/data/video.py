"""Reads the frames of video files that the model sees, chosen as in the official LLaVE repository.

About three frames per second are taken: every round(fps / 3)-th frame. If these are more than the limit, the limit's
number of evenly spaced frames is taken instead. PyAV decodes the files; the extra `[video]` installs it.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_llave.errors import DataError, import_optional

MAX_FRAMES = 32
FRAMES_PER_SECOND = 3


def choose_frames(num_frames: int, fps: float, limit: int = MAX_FRAMES) -> np.ndarray:
    """Return the indices [f] int64 of the frames that are taken; f is at most `limit`."""
    chosen = np.arange(0, num_frames, max(1, round(fps / FRAMES_PER_SECOND)))
    return chosen if len(chosen) <= limit else np.linspace(0, num_frames - 1, limit, dtype=int)


def require_av() -> ModuleType:
    """Return the module of PyAV.

    Raises:
        ConfigError: PyAV is not installed.
    """
    return import_optional("av", "videos need PyAV, the package", "pip install av (the extra video)")


def read_frames(path: str | Path, limit: int = MAX_FRAMES) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return the frames that `choose_frames` takes, [f, height, width, 3] uint8 RGB, and when each was taken, seconds.

    These times are the frames' indices over the frame rate, as in transformers; () if the file does not say its rate.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: the file is missing, is damaged, or has no video in it.
    """
    av = require_av()
    try:
        # The frames are counted, because the number in the file is often wrong or missing.
        with av.open(str(path)) as container:
            num_frames = sum(1 for _ in _decoded(container, path))
            fps = float(container.streams.video[0].average_rate or 0)
        if num_frames == 0:
            raise DataError(f"video {path} has no frames")
        wanted = choose_frames(num_frames, fps, limit).tolist()
        chosen = set(wanted)
        with av.open(str(path)) as container:
            decoded = enumerate(_decoded(container, path))
            frames = [frame.to_ndarray(format="rgb24") for number, frame in decoded if number in chosen]
    except (OSError, av.FFmpegError) as error:
        raise DataError(f"video {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return np.stack(frames), tuple(index / fps for index in wanted) if fps else ()


def _decoded(container: Any, path: str | Path) -> Iterator[Any]:
    """Yield the frames of the first video stream."""
    if not container.streams.video:
        raise DataError(f"{path} has no video in it")
    yield from container.decode(video=0)

"""Positions of the tokens of a sequence for the rotary embedding of the Qwen-VL families: time, row and column (mrope).

A text token has three equal positions. The visual tokens of an image or a video begin at the position after the text
before it, s, and token (i, r, c) of its grid, counted in visual tokens, has s + i, s + r, s + c, with i stretched by
`interval`. Text goes on at the largest position so far plus one. Qwen's code and transformers 4.57 do so; transformers
5.23 goes on after the larger side of a frame, and so overlaps videos that are longer in time than in space.
"""

from collections.abc import Sequence

import numpy as np

from megatron_llave.data.packing import IMAGE
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED, Grid

FRAMES_PER_SECOND = 2.0
"""Rate of the frames of a video whose Side has no seconds. transformers 4.57 assumes it for Qwen2.5-VL, and Qwen3-VL's
processor samples at it."""


def token_positions(tokens: Sequence[int], grids: Sequence[Grid], interval: float = 1) -> np.ndarray:
    """Return the positions [3, length] int64 (time, row, column) of a sequence, in which IMAGEs are expanded.

    Args:
        tokens: ids, with IMAGE once per image.
        grids: one per IMAGE, in patches.
        interval: positions from a pair of frames to the next one, rounded down at each: 1 for Qwen2-VL, tokens per
            second * `seconds_per_pair` for Qwen2.5-VL. The product is float32, as in transformers 5.23.
    """
    parts, start, text = [], 0, 0
    waiting = iter(grids)
    for token in tokens:
        if token != IMAGE:
            text += 1
            continue
        parts.append(np.tile(np.arange(start, start + text), (3, 1)))
        start, text = start + text, 0
        frames, rows, columns = next(waiting)
        sides = (frames, rows // MERGED, columns // MERGED)
        visual = np.indices(sides).reshape(3, -1)  # of each visual token
        visual[0] = np.floor(visual[0].astype(np.float32) * np.float32(interval))
        parts.append(visual + start)
        start += int(visual.max()) + 1
    parts.append(np.tile(np.arange(start, start + text), (3, 1)))
    return np.concatenate(parts, axis=1).astype(np.int64)


def counted_positions(length: int) -> np.ndarray:
    """Return the positions [3, length] int64 of a sequence in which visual tokens count like text."""
    return np.tile(np.arange(length, dtype=np.int64), (3, 1))


def frame_times(num_frames: int, seconds: Sequence[float] = ()) -> Sequence[float]:
    """Return when each frame of a video was taken: at `seconds`, or FRAMES_PER_SECOND if there are none."""
    return seconds or [number / FRAMES_PER_SECOND for number in range(num_frames)]


def seconds_per_pair(times: Sequence[float]) -> float:
    """Return the mean time from a pair of frames to the next one, seconds, of frames that were taken at `times`."""
    steps = len(times) - 1
    return FRAMES * (times[-1] - times[0]) / steps if steps else FRAMES / FRAMES_PER_SECOND


def time_stamps(times: Sequence[float]) -> list[str]:
    """Return the text that Qwen3-VL writes before each pair of frames: the middle of their times, as <0.2 seconds>.

    The last one of an odd number of frames is a pair with itself, as in Qwen3VLProcessor of transformers 4.57 and 5.23.
    """
    pairs = [(first, min(first + 1, len(times) - 1)) for first in range(0, len(times), FRAMES)]
    return [f"<{(times[first] + times[last]) / 2:.1f} seconds>" for first, last in pairs]

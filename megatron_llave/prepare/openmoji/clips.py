"""Makes short video files of moving OpenMoji images with captions, for text-video retrieval without a download.

`llave prepare clips` runs this; it needs the extras `demo` and `video`. The emoji are those that the bundled
data hold out of training, so a model trained on the bundled images sees new emoji here, and motion for the first time.
"""

import json
import math
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from megatron_llave.data.video import require_av
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.files import write_text
from megatron_llave.prepare.openmoji.catalogue import build_catalogue

MANIFEST = "manifest.jsonl"
CANVAS, FRAMES, FRAMES_PER_SECOND = 112, 36, 12
"""Size of the frames in pixels, number of frames, and frame rate: a clip has three seconds."""
BACKGROUNDS = {"white": (255, 255, 255), "yellow": (255, 236, 150), "blue": (150, 200, 255), "green": (170, 230, 170)}
MOTIONS = ("moves to the right", "moves to the left", "rises", "falls", "grows", "shrinks", "turns around")


def make_clips(directory: str | Path, count: int = 60, overwrite: bool = False) -> int:
    """Write `count` clips, or as many as there are held-out emoji, and their manifest; return their number.

    Raises:
        ConfigError: the count is below 1, or PyAV is not installed.
        DataError: the packages of the demo are missing, the folder is already finished, or the disk is full.
    """
    if count < 1:
        raise ConfigError(f"--count {count} must be at least 1")
    require_av()
    directory = Path(directory)
    if (directory / MANIFEST).is_file() and not overwrite:
        raise DataError(f"{directory} already holds finished videos; choose another or pass --overwrite")
    catalogue = build_catalogue(CANVAS // 2)
    held_out = [i for i, e in enumerate(catalogue.emoji) if e.split in ("base", "ood") and e.tone is None]
    chosen = sorted(Random("clips").sample(held_out, min(count, len(held_out))))
    lines = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)
        for number, index in enumerate(chosen):
            rng = Random(f"clip {number}")
            name, colour, motion = catalogue.emoji[index].name, rng.choice(list(BACKGROUNDS)), rng.choice(MOTIONS)
            picture = Image.fromarray(catalogue.pixels[index]).resize((CANVAS // 2, CANVAS // 2))
            frames = [draw(picture, BACKGROUNDS[colour], motion, time / (FRAMES - 1)) for time in range(FRAMES)]
            write_video(directory / f"clip{number:03d}.mp4", frames)
            captions = [f"{name} {motion}", f"{name} on {colour} ground"]
            lines.append({"id": f"clip{number:03d}", "video": f"clip{number:03d}.mp4", "captions": captions})
        write_text(directory / MANIFEST, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise DataError(f"{directory} cannot be written: {error.strerror}") from error
    return len(lines)


def draw(picture: Image.Image, colour: tuple[int, int, int], motion: str, time: float) -> np.ndarray:
    """Draw a picture on a background at `time` (0 to 1) of its motion; return [CANVAS, CANVAS, 3] uint8."""
    turned = picture.rotate(360 * time) if motion == "turns around" else picture
    scale = {"grows": 0.4 + 0.8 * time, "shrinks": 1.2 - 0.8 * time}.get(motion, 1.0)
    side = max(1, round(picture.width * scale))
    turned = turned.resize((side, side), Image.Resampling.BILINEAR)
    x = {"moves to the right": time, "moves to the left": 1 - time}.get(motion, 0.5)
    y = {"falls": time, "rises": 1 - time}.get(motion, 0.5)
    canvas = Image.new("RGB", (CANVAS, CANVAS), colour)
    canvas.paste(turned, (math.floor(x * (CANVAS - side)), math.floor(y * (CANVAS - side))), turned)
    return np.asarray(canvas)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Write an MPEG-4 file from frames [height, width, 3] uint8."""
    av = require_av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

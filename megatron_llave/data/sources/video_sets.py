"""Text-video benchmarks -> videos and their captions: MSR-VTT and MSVD as published, or a manifest of one's own.

Read by tools/evaluate.py video. Formats, told by the file's name unless one is given:

- manifest (.jsonl): a line {"id": ..., "video": FILE, "captions": [...]} for each video;
- msrvtt-csv (.csv): the 1k-A test split, columns video_id and sentence, one caption a video (MSRVTT_JSFUSION_test.csv);
- msrvtt-json (.json): videos and sentences of the data set itself; of its splits the test one;
- msvd (.txt): lines "VIDEO caption", one for each of many captions (AllVideoDescriptions.txt); a list of the videos to
  take goes with it (test_list.txt).
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llave.errors import ConfigError, DataError

FORMATS = {".jsonl": "manifest", ".csv": "msrvtt-csv", ".json": "msrvtt-json", ".txt": "msvd"}
SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov")


@dataclass(frozen=True)
class CaptionedVideo:
    """One video of a benchmark."""

    id: str
    file: str
    """Relative to the folder of the videos."""
    captions: list[str]
    """At least one."""


def read_videos(
    path: str | Path, folder: str | Path, file_format: str | None = None, chosen: str | Path | None = None
) -> list[CaptionedVideo]:
    """The videos of an annotation file, in its order.

    Args:
        path: the annotations.
        folder: of the video files; those that an annotation names by id alone are looked for there.
        file_format: one of FORMATS' values; None: by the file's suffix.
        chosen: file with the id of a video in each line; None: all.

    Raises:
        ConfigError: the format is none of these.
        DataError: names file and line: unreadable, malformed, a video without caption or file, an id twice.
    """
    path = Path(path)
    file_format = file_format or FORMATS.get(path.suffix)
    if file_format not in FORMATS.values():
        names = " | ".join(FORMATS.values())
        raise ConfigError(f"{path}: annotations end in {', '.join(FORMATS)}; or give --format {names}")
    wanted = None if chosen is None else set(_read(Path(chosen)).split())
    readers = {"manifest": _manifest, "msrvtt-csv": _msrvtt_csv, "msrvtt-json": _msrvtt_json, "msvd": _msvd}
    videos = [one for one in readers[file_format](path, Path(folder)) if wanted is None or one.id in wanted]
    missing = sorted((wanted or set()) - {one.id for one in videos})
    if missing:
        raise DataError(f"{chosen} names video {missing[0]!r}, which has no caption in {path} ({len(missing)} such)")
    if not videos:
        raise DataError(f"{path} has no video")
    return videos


def _manifest(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    found: dict[str, CaptionedVideo] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
            one = CaptionedVideo(str(value["id"]), value["video"], value["captions"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{where}: must be {{"id": ..., "video": FILE, "captions": [...]}} ({error})') from error
        captions_are_text = isinstance(one.captions, list) and all(isinstance(text, str) for text in one.captions)
        if not isinstance(one.file, str) or not captions_are_text or not one.captions:
            raise DataError(f"{where}: video must be a file name, captions a list of at least one text")
        if one.id in found:
            raise DataError(f"{where}: id {one.id!r} comes twice")
        found[one.id] = one
    return found.values()


def _msrvtt_csv(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    rows = list(csv.DictReader(_read(path).splitlines()))
    if not rows or not {"video_id", "sentence"} <= rows[0].keys():
        raise DataError(f"{path} must have the columns video_id and sentence")
    return _collect(((row["video_id"], row["sentence"]) for row in rows), path, folder)


def _msrvtt_json(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    try:
        value: dict[str, Any] = json.loads(_read(path))
        splits = {one["video_id"]: one.get("split", "test") for one in value["videos"]}
        pairs = [(one["video_id"], one["caption"]) for one in value["sentences"]]
    except (ValueError, KeyError, TypeError) as error:
        right = "videos (video_id, split) and sentences (video_id, caption)"
        raise DataError(f"{path} must hold {right}: {error}") from error
    return _collect(((video, caption) for video, caption in pairs if splits.get(video) == "test"), path, folder)


def _msvd(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    lines = (line for line in _read(path).splitlines() if line.strip() and not line.startswith("#"))
    return _collect((line.partition(" ")[::2] for line in lines), path, folder)


def _collect(pairs: Iterable[tuple[str, str]], path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    """Captions by video; its file is the one in `folder` with the id as its name."""
    captions: dict[str, list[str]] = {}
    for video, caption in pairs:
        if not caption.strip():
            raise DataError(f"{path}: video {video!r} has an empty caption")
        captions.setdefault(video, []).append(caption.strip())
    return [CaptionedVideo(video, _file_of(video, folder), texts) for video, texts in captions.items()]


def _file_of(video: str, folder: Path) -> str:
    found = [video + suffix for suffix in SUFFIXES if (folder / (video + suffix)).is_file()]
    return found[0] if found else video + SUFFIXES[0]  # which is then said to be missing


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error

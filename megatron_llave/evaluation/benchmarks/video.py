"""Zero-shot text-video retrieval: Recall@1, 5, 10 and the median rank, from texts to videos and back.

Used by tools/evaluate.py video. Prompts and frames are the released code's (golden notes; data/video.py). A caption's
right answer is its video; a video's is any of its captions.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_llave.embedding.cache import EmbeddingCache, EmbedParts, Identity, Progress, embed_missing
from megatron_llave.embedding.inputs import FileInput, FileInputs
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.metrics import ranks_of_right, summarise_ranks
from megatron_llave.files import write_json

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
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
            one = CaptionedVideo(str(value["id"]), value["video"], value["captions"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{where}: must be {{"id": ..., "video": FILE, "captions": [...]}} ({error})') from error
        if not _is_text(one.file) or not isinstance(one.captions, list) or not all(map(_is_text, one.captions or [""])):
            raise DataError(f"{where}: video must be a file name, captions a list of at least one text, none empty")
        if one.id in found:
            raise DataError(f"{where}: id {one.id!r} comes twice")
        found[one.id] = one
    return found.values()


def _msrvtt_csv(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    reader = csv.DictReader(io.StringIO(_read(path), newline=""))
    try:
        rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error
    if not rows or not {"video_id", "sentence"} <= rows[0][1].keys():
        raise DataError(f"{path} must have the columns video_id and sentence")
    return _collect(((where, row["video_id"], row["sentence"]) for where, row in rows), folder)


def _msrvtt_json(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    try:
        value: dict[str, Any] = json.loads(_read(path))
        splits = {one["video_id"]: one.get("split", "test") for one in value["videos"]}
        found = [(one["video_id"], one["caption"]) for one in value["sentences"]]
        wanted = [splits.get(video) == "test" for video, _ in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        right = "videos (video_id, split) and sentences (video_id, caption)"
        raise DataError(f"{path} must hold {right}: {error}") from error
    numbered = enumerate(zip(found, wanted))
    return _collect(((f"{path}: sentence {number}", *one) for number, (one, is_test) in numbered if is_test), folder)


def _msvd(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    lines = ((number, line) for number, line in _lines(path) if not line.startswith("#"))
    return _collect(((f"{path}:{number}", *line.partition(" ")[::2]) for number, line in lines), folder)


def _collect(captions: Iterable[tuple[str, Any, Any]], folder: Path) -> Iterable[CaptionedVideo]:
    """Captions by video, from (where, video, caption); the video's file is the one in `folder` with the id as its name.

    Raises:
        DataError: a video or a caption is no text, or empty.
    """
    found: dict[str, list[str]] = {}
    for where, video, caption in captions:
        if not _is_text(video):
            raise DataError(f"{where}: video {video!r} must be the id of a video")
        if not _is_text(caption):
            raise DataError(f"{where}: video {video!r} has {caption!r} for a caption, which must be a text")
        found.setdefault(video, []).append(caption.strip())
    return [CaptionedVideo(video, _file_of(video, folder), texts) for video, texts in found.items()]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _file_of(video: str, folder: Path) -> str:
    found = [video + suffix for suffix in SUFFIXES if (folder / (video + suffix)).is_file()]
    return found[0] if found else video + SUFFIXES[0]  # which is then said to be missing


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank; str.splitlines would cut captions at rarer characters too."""
    return ((number, line) for number, line in enumerate(_read(path).split("\n"), start=1) if line.strip())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # as spreadsheets save it
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


TEXT_PROMPT = "Find me an video that matches the given caption: {}"
VIDEO_PROMPT = "<image>\nRepresent the given video."
SCORES_FILE = "scores.json"


def evaluate_videos(
    embed_parts: EmbedParts,
    videos: Sequence[CaptionedVideo],
    folder: str | Path,
    out: str | Path,
    identity: Identity,
    replicas: dist.ProcessGroup,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, float]]:
    """Embed what is not there yet and score; the first rank writes scores.json into `out`.

    Args:
        embed_parts: of this rank's replica.
        videos: with their captions.
        folder: that the videos' files lie in.
        out: folder for embeddings and scores, shared by all ranks.
        identity: of the model; only the first rank's counts.
        replicas: data-parallel ranks that the embedding is dealt to.
        progress: told of each part.

    Raises:
        DataError: see embed_missing, or the scores cannot be written.

    Returns:
        text_to_video and video_to_text: recall@k in percent, median_rank; the same on all ranks.
    """
    out = Path(out)
    captions = [(caption, number) for number, video in enumerate(videos) for caption in video.captions]
    texts = FileInputs("captions", [FileInput(TEXT_PROMPT.format(caption)) for caption, _ in captions], folder)
    inputs = [FileInput(VIDEO_PROMPT, video=video.file, id=video.id) for video in videos]
    clips = FileInputs("videos", inputs, folder, hint="--videos names the folder that they are looked for in")
    stores = [EmbeddingCache(out / "embeddings" / inputs.name, inputs) for inputs in (texts, clips)]
    embed_missing(embed_parts, stores, identity, replicas, progress)
    text, video = (torch.from_numpy(store.rows(np.arange(store.bounds[-1]))) for store in stores)
    belongs = torch.tensor([number for _, number in captions])[:, None] == torch.arange(len(videos))  # [texts, videos]
    both = {"text_to_video": (text, video, belongs), "video_to_text": (video, text, belongs.T)}
    scores = {name: summarise_ranks(ranks_of_right(*sides)) for name, sides in both.items()}
    if dist.get_rank() == 0:
        try:
            write_json(out / SCORES_FILE, scores)
        except OSError as error:
            raise DataError(f"{out / SCORES_FILE} cannot be written: {error.strerror}") from error
    dist.barrier()
    return scores

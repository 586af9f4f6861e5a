"""Zero-shot text-video retrieval: Recall@1, 5, 10 and the median rank, from texts to videos and back.

Prompts and frames are those of the official LLaVE code (data/video.py). The right answer of a caption is its video;
that of a video is any of its captions. Equal similarities are ranked in the order of the annotations.
"""

import argparse
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.errors import ConfigError, DataError
from megatron_llave.evaluation.benchmark import Benchmark, Evaluate, Evaluation
from megatron_llave.evaluation.metrics import TIES_BY_INDEX, ranks_of_right, summarise_ranks
from megatron_llave.files import MAX_JSON_BYTES, parse_json, read_bytes, write_json
from megatron_llave.options import evaluate as options
from megatron_llave.options.evaluate import VIDEO_FORMATS

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov")
TEXT_PROMPT = "Find me an video that matches the given caption: {}"
VIDEO_PROMPT = "<image>\nRepresent the given video."
SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class CaptionedVideo:
    """A video and the texts that describe it."""

    id: str
    file: str
    """File name, relative to the folder of the videos."""
    captions: list[str]
    """One or more texts."""


def read_videos(
    path: str | Path, folder: str | Path, file_format: str | None = None, chosen: str | Path | None = None
) -> list[CaptionedVideo]:
    """Read the videos of an annotation file, in its order.

    Args:
        path: the annotation file.
        folder: folder of the video files; videos that the annotations name by id alone are looked for there.
        file_format: a value of VIDEO_FORMATS; None: by the file's suffix.
        chosen: file with the id of one video per line; None: all videos.

    Raises:
        ConfigError: the format is unknown.
        DataError: a file is unreadable or malformed, a video has no caption, or an id is not unique; names the line.
    """
    path = Path(path)
    file_format = file_format or VIDEO_FORMATS.get(path.suffix)
    if file_format not in VIDEO_FORMATS.values():
        names = " | ".join(VIDEO_FORMATS.values())
        raise ConfigError(f"{path}: annotations end in {', '.join(VIDEO_FORMATS)}; or give --format {names}")
    wanted = None if chosen is None else set(_read(Path(chosen)).split())
    readers = {"manifest": _manifest, "msrvtt-csv": _msrvtt_csv, "msrvtt-json": _msrvtt_json, "msvd": _msvd}
    videos = [video for video in readers[file_format](path, Path(folder)) if wanted is None or video.id in wanted]
    missing = sorted((wanted or set()) - {video.id for video in videos})
    if missing:
        raise DataError(f"{chosen} names video {missing[0]!r}, which has no caption in {path} ({len(missing)} such)")
    if not videos:
        raise DataError(f"{path} has no video")
    return videos


def _manifest(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    videos: dict[str, CaptionedVideo] = {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            value = parse_json(line, where)
            video = CaptionedVideo(str(value["id"]), value["video"], value["captions"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{where}: must be {{"id": ..., "video": FILE, "captions": [...]}} ({error})') from error
        captions = video.captions
        if not _is_text(video.file) or not isinstance(captions, list) or not all(map(_is_text, captions or [""])):
            raise DataError(f"{where}: video must be a file name, captions a list of at least one text, none empty")
        if video.id in videos:
            raise DataError(f"{where}: id {video.id!r} comes twice")
        videos[video.id] = video
    return videos.values()


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
        value: dict[str, Any] = parse_json(_read(path), str(path))
        splits = {video["video_id"]: video.get("split", "test") for video in value["videos"]}
        sentences = [(sentence["video_id"], sentence["caption"]) for sentence in value["sentences"]]
        is_test = [splits.get(video) == "test" for video, _ in sentences]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        right = "videos (video_id, split) and sentences (video_id, caption)"
        raise DataError(f"{path} must hold {right}: {error}") from error
    numbered = compress(enumerate(sentences), is_test)
    return _collect(((f"{path}: sentence {number}", *sentence) for number, sentence in numbered), folder)


def _msvd(path: Path, folder: Path) -> Iterable[CaptionedVideo]:
    lines = ((number, line) for number, line in _lines(path) if not line.startswith("#"))
    return _collect(((f"{path}:{number}", *line.partition(" ")[::2]) for number, line in lines), folder)


def _collect(captions: Iterable[tuple[str, Any, Any]], folder: Path) -> Iterable[CaptionedVideo]:
    """Group (where, video id, caption) by video; a video's file is the one in `folder` that is named after its id.

    Raises:
        DataError: an id or a caption is not a text, or is empty.
    """
    captions_of: dict[str, list[str]] = {}
    for where, video, caption in captions:
        if not _is_text(video):
            raise DataError(f"{where}: video {video!r} must be the id of a video")
        if not _is_text(caption):
            raise DataError(f"{where}: video {video!r} has {caption!r} for a caption, which must be a text")
        captions_of.setdefault(video, []).append(caption.strip())
    return [CaptionedVideo(video, _file_of(video, folder), texts) for video, texts in captions_of.items()]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _file_of(video: str, folder: Path) -> str:
    files = (video + suffix for suffix in SUFFIXES)
    return next((file for file in files if (folder / file).is_file()), video + SUFFIXES[0])  # later said to be missing


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank; str.splitlines would also split at rarer characters."""
    return ((number, line) for number, line in enumerate(_read(path).split("\n"), start=1) if line.strip())


def _read(path: Path) -> str:
    try:
        return read_bytes(path, MAX_JSON_BYTES, "choose another").decode("utf-8-sig")  # as spreadsheets save it
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def evaluate_videos(
    embedder: CachedEmbedder, videos: Sequence[CaptionedVideo], folder: str | Path
) -> dict[str, dict[str, float]]:
    """Embed the missing inputs and score; the first rank writes scores.json.

    Args:
        embedder: embeds captions and videos; its folder gets the scores.
        videos: the videos with their captions.
        folder: folder of the video files.

    Returns:
        For text_to_video and video_to_text, recall@k in percent and median_rank; the same on all ranks.

    Raises:
        DataError: see CachedEmbedder.embed, or the scores cannot be written.
    """
    captions = [(caption, number) for number, video in enumerate(videos) for caption in video.captions]
    texts = Inputs(
        "captions", [Input(mark_user_text(TEXT_PROMPT.format(caption), 0)) for caption, _ in captions], folder
    )
    entries = [Input(VIDEO_PROMPT, video=video.file, id=video.id) for video in videos]
    clips = Inputs("videos", entries, folder, hint="--videos names the folder that they are looked for in")
    caches = embedder.embed([texts, clips])
    text, video = (torch.from_numpy(cache.rows(np.arange(len(cache.inputs)))) for cache in caches)
    belongs = torch.tensor([number for _, number in captions])[:, None] == torch.arange(len(videos))  # [texts, videos]
    both = {"text_to_video": (text, video, belongs), "video_to_text": (video, text, belongs.T)}
    scores = {name: summarise_ranks(ranks_of_right(*sides)) for name, sides in both.items()}
    if dist.get_rank() == 0:
        path = Path(embedder.folder) / SCORES_FILE
        try:
            write_json(path, {"ties": TIES_BY_INDEX, **scores})
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
    dist.barrier()
    return scores


def _read_evaluation(args: argparse.Namespace) -> Evaluate:
    folder = args.videos or Path(args.manifest).parent
    videos = read_videos(args.manifest, folder, args.format, args.list)

    def evaluate(embedder: CachedEmbedder) -> Evaluation:
        lines = []
        for direction, values in evaluate_videos(embedder, videos, folder).items():
            figures = "  ".join(f"{name} {value:.1f}" for name, value in values.items())
            lines.append(f"{direction.replace('_', ' ')}: {figures}")
        num_captions = sum(len(video.captions) for video in videos)
        lines.append(f"ties: {TIES_BY_INDEX}")
        return Evaluation([*lines, f"{len(videos)} videos, {num_captions} captions; scores: {args.out}"])

    return evaluate


BENCHMARK = Benchmark(
    **vars(options.VIDEO),
    read_evaluation=_read_evaluation,
    # 32 frames are up to 6720 tokens: the official evaluation of videos raises the limit too.
    overrides=lambda args: ["data.max_length=8192"],
)

"""Makes a data folder of the embedding data of ms-swift: JSON lines with `messages` and `positive_messages`.

`prepare swift` runs this once. The format is that of "Embedding Training" in ms-swift's documentation (4.x), and the
older one of its versions 3.3 to 3.8 with `query`, `response` and `rejected_response`. A line that is none of them is
counted and listed.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_llave.config.data import META_TASKS
from megatron_llave.data.items import read_jsonl
from megatron_llave.data.placeholders import mark_user_text
from megatron_llave.data.shards import SCORE_RANGE, is_score
from megatron_llave.errors import DataError, one_of
from megatron_llave.prepare.columns import NoPairError, clean_name, tell_apart
from megatron_llave.prepare.jsonl import default_key, path_for_id
from megatron_llave.prepare.own_pairs import Options, different_paths, write_own_pairs
from megatron_llave.prepare.shard_jobs import Prepared, Progress, SourceRow, check_limit, faulty_row, make_id
from megatron_llave.prepare.source_sides import SourceSide

PLACEHOLDER = "<image>"
OTHER_MEDIA = ("videos", "audios", "video", "audio")
PARTS = ("", "positive_", "negative_")


@dataclass(frozen=True)
class Message:
    """What a list of messages says."""

    text: str
    images: tuple[str, ...]


def prepare(
    files: Sequence[str | Path],
    directory: str | Path,
    images: str | Path | None = None,
    limit: int | None = None,
    meta_task: str = "retrieval",
    options: Options = Options(),
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make shards, index and report of ms-swift's JSONL, and the evaluation sets and the tokenizer of `options`.

    Args:
        files: the files; each is a subset that is named after it.
        directory: output directory; it is made when missing.
        images: the folder that relative image paths start from; None: that of their file.
        limit: the number of lines to take from the beginning of each file; None: all.
        meta_task: the meta-task of all subsets.
        options: what else the user chooses.
        progress: called after each shard.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a line is not JSON, and the message has its FILE:LINE; no line is a pair; or `write_own_pairs` fails.
    """
    one_of("--set meta_task", meta_task, META_TASKS)
    check_limit(limit)
    paths = different_paths(files)
    return write_own_pairs(lambda: read_rows(paths, images, limit), directory, meta_task, options, progress)


def read_rows(
    paths: Sequence[Path], images: str | Path | None = None, limit: int | None = None
) -> Iterator[tuple[str, SourceRow]]:
    """Yield each line as a pair, with the name of its subset; one that cannot be a pair has its `fault`.

    Raises:
        DataError: a line is not JSON; the message has FILE:LINE.
    """
    common = os.path.commonpath([path.parent.absolute() for path in paths])
    seen: Counter[str] = Counter()
    for path, subset in zip(paths, tell_apart([clean_name(path.stem) for path in paths], paths)):
        folder = str(images if images is not None else path.parent)
        start = os.path.relpath(folder, common)
        for _, where, values in islice(read_jsonl(path), limit):
            key = default_key(subset, seen[subset])
            seen[subset] += 1
            try:
                yield subset, to_row(values, key, where, folder, start)
            except (NoPairError, DataError) as error:
                yield subset, faulty_row(key, where, folder, str(error))


def to_row(values: Any, key: str, where: str, folder: str, start: str) -> SourceRow:
    """Return the pair of a line; ids have image paths from folder `start` on.

    Raises:
        NoPairError, DataError: the line is none; the message does not say where it is.
    """
    if not isinstance(values, dict):
        raise NoPairError(f"a line must be an object with messages and positive_messages, not {values!r:.60}")
    media = next((name for part in PARTS for name in OTHER_MEDIA if values.get(f"{part}{name}")), None)
    if media is not None:
        raise NoPairError(f"{media} are not read; write the frames of a video as frames for the command jsonl")
    read = _read_messages if "positive_messages" in values else _read_responses
    query, targets, negatives = read(values)
    label = values.get("label")
    if label is not None and not is_score(label):
        raise NoPairError(f"label {label!r:.60} must be a number {SCORE_RANGE}")
    if label is not None and (negatives or len(targets) > 1):
        raise NoPairError("label is the score of one pair, so that a line with it has one positive and no negatives")

    def side(message: Message) -> SourceSide:
        written = message.text.count(PLACEHOLDER)
        if written > len(message.images):
            raise NoPairError(f"{written} {PLACEHOLDER} for {len(message.images)} images: {message.text[:60]!r}")
        paths = [path_for_id(start, image) for image in message.images]
        return SourceSide(mark_user_text(message.text, len(paths)), message.images, make_id(message.text, paths))

    target, *further = map(side, targets)
    scores = () if label is None else (float(label),)
    return SourceRow(
        *(key, where, folder, side(query), target, tuple(map(side, negatives)), tuple(further)), scores=scores
    )


def _read_messages(values: Mapping[str, Any]) -> tuple[Message, list[Message], list[Message]]:
    """Return anchor, positives and negatives of a line with `positive_messages`."""
    query = _message(values.get("messages"), _paths(values.get("images") or values.get("image"), "images"), "messages")
    sides = []
    for part in PARTS[1:]:
        name, messages = f"{part}messages", values.get(f"{part}messages") or []
        images = values.get(f"{part}images") or []
        if not isinstance(messages, list) or not isinstance(images, list):
            raise NoPairError(f"{name} and {part}images must be lists")
        if images and len(images) != len(messages):
            raise NoPairError(f"{part}images has {len(images)} lists for {len(messages)} {name}; give one for each")
        images = images or [[]] * len(messages)
        each = [
            (f"{name}[{number}]", some, _paths(paths, f"{part}images[{number}]"))
            for number, (some, paths) in enumerate(zip(messages, images))
        ]
        sides.append([_message(some, paths, where) for where, some, paths in each])
    if not sides[0]:
        raise NoPairError("positive_messages is empty")
    return query, *sides


def _read_responses(values: Mapping[str, Any]) -> tuple[Message, list[Message], list[Message]]:
    """Return anchor, positive and negatives of a line of the older form; they share `images`, in this order."""
    images = list(_paths(values.get("images") or values.get("image"), "images"))
    query, response = values.get("query"), values.get("response")
    messages = values.get("messages")
    if query is None and isinstance(messages, list) and len(messages) > 1:
        *before, last = messages
        query, response = _message(before, (), "messages").text, _message([last], (), "messages").text
    rejected = values.get("rejected_response") or []
    texts = [query, response, *(rejected if isinstance(rejected, list) else [rejected])]
    if not all(isinstance(text, str) for text in texts):
        raise NoPairError(
            "needs messages and positive_messages, or query and response (and rejected_response) as texts"
        )
    counts = [text.count(PLACEHOLDER) for text in texts]
    if sum(counts) != len(images):
        raise NoPairError(
            f"{sum(counts)} {PLACEHOLDER} in query, response and rejected_response for {len(images)} images"
        )
    sides = [Message(text, tuple(images.pop(0) for _ in range(count))) for text, count in zip(texts, counts)]
    return sides[0], sides[1:2], sides[2:]


def _paths(given: Any, name: str) -> tuple[str, ...]:
    """Return image paths; an image may be an object with a `path`, and a single one need not be in a list."""
    listed = given if isinstance(given, list) else [] if given is None else [given]
    images = [image.get("path") if isinstance(image, dict) else image for image in listed]
    if not all(isinstance(image, str) and image for image in images):
        raise NoPairError(f"{name} must be a list of paths, not {given!r:.60}")
    return tuple(images)


def _message(messages: Any, images: tuple[str, ...], where: str) -> Message:
    """Return the text of messages: that of the system and a space, then the others' in their order."""
    if not isinstance(messages, list) or not messages:
        raise NoPairError(f"{where} must be a list of objects with role and content, not {messages!r:.60}")
    found: list[str] = []
    texts: dict[bool, list[str]] = {True: [], False: []}
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
            raise NoPairError(f"{where} must be a list of objects with role and content, not {message!r:.60}")
        texts[message.get("role") == "system"].append(_content(message["content"], found, where))
    if found and images:
        raise NoPairError(f"{where} has images in its content and beside it; give them once")
    instruction = " ".join(texts[True])
    text = "\n".join(filter(None, texts[False]))
    return Message(f"{instruction} {text}" if instruction else text, images or tuple(found))


def _content(content: str | list[Any], found: list[str], where: str) -> str:
    """Return the text of a message; a list has parts as OpenAI's API takes them, whose images go into `found`."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(kind, str) else None
        value = value.get("url") if isinstance(value, dict) else value
        if kind not in ("text", "image", "image_url") or not (
            isinstance(value, str) or value is None and kind == "image"
        ):
            raise NoPairError(f"{where} has the part {part!r:.60}; it must be a text or an image")
        if kind != "text" and value:
            found.append(value)
        texts.append(value if kind == "text" else PLACEHOLDER)
    return "".join(texts)

"""What the files beside config.json say, as far as all families read it: processor, tokenizer and pooling.

The families compare it with what they run: nothing is ignored. padding_side has no meaning for packed sequences, and
chat templates none for embeddings: data.prompt is the prompt.

Sources: transformers' image_processing_utils.py, processing_utils.py and tokenization_utils_base.py (4.45 to 5.x).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json
from megatron_llave.models.hf.config_json import Section
from megatron_llave.models.hf.side_files import CONTENT_IN_PARTS, listed_tokens, vocabulary, without_appended

IMAGE_FILE, PROCESSOR_FILE, VIDEO_FILE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
TEMPLATE_FILES, TEMPLATE_TEXT = ("chat_template.json", PROCESSOR_FILE, "tokenizer_config.json"), "chat_template.jinja"
BICUBIC = 3
STEPS = {"do_resize": (True, True), "do_rescale": (True, True), "do_normalize": (True, True)}
TOKENIZER = {"add_prefix_space": (False, False), "split_special_tokens": (False, False)}
"""Key -> the value of a missing key, and the only value that is run."""


def read_section(file: Path) -> Section | None:
    """A JSON file, if it is there."""
    return Section(file, "", read_json(file, error=CheckpointError)) if file.is_file() else None


def processor_sections(folder: Path) -> tuple[Section | None, list[Section], list[Section]]:
    """processor_config.json if it is there, and all that is said about images and about videos, in any file."""
    processor, images, videos = (read_section(folder / name) for name in (PROCESSOR_FILE, IMAGE_FILE, VIDEO_FILE))
    inner = [processor and processor.inner(key) for key in ("image_processor", "video_processor")]
    return processor, [*filter(None, (images, inner[0]))], [*filter(None, (videos, inner[1]))]


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by the names of their files, without what is written for vLLM."""
    sections = {name: read_section(folder / name) for name in TEMPLATE_FILES}
    found = {name: section.values.get("chat_template") for name, section in sections.items() if section is not None}
    if (folder / TEMPLATE_TEXT).is_file():
        found[TEMPLATE_TEXT] = (folder / TEMPLATE_TEXT).read_text("utf-8", errors="replace")
    return {n: str(template).removeprefix(CONTENT_IN_PARTS) for n, template in found.items() if template is not None}


def used_template(templates: Mapping[str, str]) -> str | None:
    """The one of `chat_templates` that transformers takes; None: there is none."""
    return templates.get(TEMPLATE_TEXT) or next(iter(templates.values()), None)


def check_pixels(images: Section, mean: Sequence[float], std: Sequence[float], missing: Mapping[str, Any]) -> None:
    """Refuse settings with which pixels are resized or normalised otherwise than they are here.

    Args:
        images: settings of an image or video processor.
        mean: of the channels, or one of all.
        std: the standard deviation, likewise.
        missing: values of missing keys, where they are not those that are run.

    Raises:
        CheckpointError: names the key.
    """
    values = {**missing, **images.values}
    images.check(STEPS)
    for key, right in (("image_mean", mean), ("image_std", std), ("rescale_factor", (1 / 255,))):
        if not _all_close(values.get(key, right), right):
            numbers = ", ".join(f"{number:.10g}" for number in right)
            raise images.refuse(key, f"{numbers}, with which the vision encoder's pixels are normalised")
    if values.get("resample", BICUBIC) not in (BICUBIC, "bicubic"):
        raise images.refuse("resample", f"{BICUBIC} (bicubic)")
    if values.get("do_center_crop"):
        raise images.refuse("do_center_crop", "false: the complete image is used")


def _all_close(value: Any, right: Sequence[float]) -> bool:
    numbers = value if isinstance(value, list | tuple) else [value]
    is_number = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    wanted = [*right] * len(numbers) if len(right) == 1 else right
    fits = len(wanted) == len(numbers)
    return is_number and fits and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(numbers, wanted))


def check_pooling(folder: Path) -> None:
    """Refuse a folder of sentence-transformers with another pooling than that of the last token.

    Raises:
        CheckpointError: names the file and the key.
    """
    pooling = read_section(folder / "1_Pooling" / "config.json") if (folder / "modules.json").is_file() else None
    for mode in [] if pooling is None else pooling.values:
        if mode.startswith("pooling_mode_") and pooling.values[mode] and mode != "pooling_mode_lasttoken":
            raise pooling.refuse(mode, "false: an embedding is that of the last token (pooling_mode_lasttoken)")
        if mode == "pooling_mode" and pooling.values[mode] not in ("lasttoken", ["lasttoken"]):
            raise pooling.refuse(mode, "lasttoken")


def check_tokenizer(folder: Path, special: Mapping[str, int], end: str = "") -> list[str]:
    """Check that tokenizer.json has the ids that the files beside it give, and that its settings are those we use.

    Args:
        folder: the folder.
        special: the ids that config.json gives to special tokens, which a tokenizer may lack.
        end: a token that tokenizer.json may append to a text, and which is not appended here.

    Returns:
        A line about `end` if it is appended.

    Raises:
        CheckpointError: names the file and the token or key.
    """
    settings = read_section(folder / "tokenizer_config.json")
    if settings is not None:
        settings.check(TOKENIZER)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    spec = read_json(file, error=CheckpointError)
    ids = _ids(spec, file)
    processor, rest = spec.get("post_processor"), without_appended(spec, end)
    if _adds_tokens(rest):
        raise CheckpointError(
            f"{file}: its post_processor adds tokens to each text, which data.prompt does not; remove it"
        )
    if (folder / "vocab.json").is_file():
        vocabulary = read_json(folder / "vocab.json", error=CheckpointError)
        _compare_ids(ids, ({"content": token, "id": i} for token, i in vocabulary.items()), file, "vocab.json")
    for name in ("tokenizer_config.json", "added_tokens.json"):
        if (folder / name).is_file():
            _compare_ids(ids, listed_tokens(folder / name), file, name)
    for token, wanted in special.items():
        if ids.get(token, wanted) != wanted:
            raise CheckpointError(f"{file}: {token!r} must have the id {wanted}, as config.json says, not {ids[token]}")
    why = f"{end} at the end of each text by tokenizer.json: not used, since data.prompt says how an input ends"
    return [] if rest == processor else [why]


def _adds_tokens(processor: Any) -> bool:
    """Whether a post_processor of tokenizer.json puts special tokens beside a text."""
    if not isinstance(processor, dict):
        return False
    steps = processor.get("single") if isinstance(processor.get("single"), list) else []
    inner = processor.get("processors") if isinstance(processor.get("processors"), list) else []
    is_added = any(isinstance(step, dict) and "SpecialToken" in step for step in steps)
    return is_added or processor.get("type") in ("BertProcessing", "RobertaProcessing") or any(map(_adds_tokens, inner))


def _ids(spec: dict, file: Path) -> dict[str, int]:
    try:
        return vocabulary(spec) | {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a vocabulary or added tokens that cannot be read: {error!r}") from error


def _compare_ids(ids: dict[str, int], tokens: Iterable[dict], file: Path, says: str) -> None:
    for token in tokens:
        content, wanted = token["content"], token["id"]
        if ids.get(content) != wanted:
            has = f"has {ids[content]}" if content in ids else "has no such token"
            raise CheckpointError(f"{file}: {content!r} must have the id {wanted}, as {says} says, but it {has}")

"""What the files beside config.json say about images and tokens, compared with what is run: nothing is ignored.

Images are always cut, resized and normalised as config.json and SigLIP say. A folder whose processor or tokenizer
settings say something else is refused, since its embeddings would be wrong without a word. padding_side has no meaning
for packed sequences, and chat templates none for embeddings: data.prompt is the prompt.

Sources: transformers' image_processing_llava_onevision.py, processing_llava_onevision.py and
video_processing_llava_onevision.py (4.45 to 5.x).
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json
from megatron_llave.models.hf.config_json import HfConfig, Section
from megatron_llave.models.llava_onevision.hf_files import listed_tokens
from megatron_llave.models.llava_onevision.prompt import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE

IMAGE_FILE, PROCESSOR_FILE, VIDEO_FILE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
TEMPLATE_FILES, TEMPLATE_TEXT = ("chat_template.json", PROCESSOR_FILE, "tokenizer_config.json"), "chat_template.jinja"
PLAIN = re.compile(re.escape(PLAIN_CHAT_TEMPLATE).replace("END", "'[^']*'"))
MEAN, STD, BICUBIC = 0.5, 0.5, 3
MISSING = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""What transformers' LlavaOnevisionImageProcessor takes for a missing key, where that is not what is run.

Its values for missing sizes and grids (384 pixels) say nothing about a model whose config.json has others."""

# Key -> (value of a missing key, the only value that is run).
STEPS = {
    "do_resize": (True, True),
    "do_rescale": (True, True),
    "do_normalize": (True, True),
    "do_pad": (True, True),
}
TOKENIZER = {"add_prefix_space": (False, False), "split_special_tokens": (False, False)}


def check_files(config: HfConfig, folder: Path) -> list[str]:
    """Refuse a folder whose processor or tokenizer contradicts its config.json, or that is normalised otherwise.

    A chat template of an export of a run with data.prompt=plain sets that key of `config`.

    Returns:
        A line for each chat template that is not the one of an export: embeddings do not use it.

    Raises:
        CheckpointError: names the file and the key.
    """
    sections = {name: _read(folder / name) for name in (IMAGE_FILE, PROCESSOR_FILE, VIDEO_FILE)}
    processor = sections[PROCESSOR_FILE]
    in_processor = {key: processor and processor.inner(key) for key in ("image_processor", "video_processor")}
    for images in filter(None, (sections[IMAGE_FILE], in_processor["image_processor"])):
        is_onevision = config.layout == "llava_onevision"
        if is_onevision:
            _check_type(images)
        _check_images(images, config, MISSING if is_onevision else {})
    for videos in filter(None, (sections[VIDEO_FILE], in_processor["video_processor"])):
        _check_images(videos, config, {})
    if processor is not None:
        _check_processor(processor, config)
    _check_additions(folder)
    _check_tokenizer(folder, config)
    templates = _templates(folder)
    if any(map(PLAIN.fullmatch, templates.values())):
        config.run.data.prompt = "plain"
    others = [name for name, text in templates.items() if text != CHAT_TEMPLATE and not PLAIN.fullmatch(text)]
    return [f"chat template in {name}: not used, since data.prompt is the prompt of embeddings" for name in others]


def _templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by the names of their files."""
    found = {name: section.values.get("chat_template") for name in TEMPLATE_FILES if (section := _read(folder / name))}
    if (folder / TEMPLATE_TEXT).is_file():
        found[TEMPLATE_TEXT] = (folder / TEMPLATE_TEXT).read_text("utf-8", errors="replace")
    return {name: str(template) for name, template in found.items() if template is not None}


def _read(file: Path) -> Section | None:
    return Section(file, "", read_json(file, error=CheckpointError)) if file.is_file() else None


def _check_type(images: Section) -> None:
    kind = images.values.get("image_processor_type")
    if kind is not None and not str(kind).startswith("LlavaOnevisionImageProcessor"):
        raise images.refuse("image_processor_type", "LlavaOnevisionImageProcessor")


def _check_images(images: Section, config: HfConfig, missing: dict[str, Any]) -> None:
    """Check how tiles are resized and normalised, and the grids; `missing` has the values of missing keys."""
    tile, values = config.model.vision.image_size, missing | images.values
    images.check(STEPS)
    for key, right in (("image_mean", MEAN), ("image_std", STD), ("rescale_factor", 1 / 255)):
        if not _all_close(values.get(key, right), right):
            raise images.refuse(key, f"{right:.10g}, with which the vision encoder's pixels are normalised")
    if values.get("resample", BICUBIC) not in (BICUBIC, "bicubic"):
        raise images.refuse("resample", f"{BICUBIC} (bicubic)")
    if values.get("do_center_crop"):
        raise images.refuse("do_center_crop", "false: the complete image is used")
    for key in ("size", "crop_size"):
        sides = values.get(key)
        written = list(sides.values()) if isinstance(sides, dict) else [sides]
        if sides is not None and (not written or any(side != tile for side in written)):
            raise images.refuse(key, f"height and width {tile}, the image_size of config.json's vision_config")
    pinpoints = [[rows * tile, columns * tile] for columns, rows in config.model.image_grids]
    if config.layout == "llava_onevision" and values.get("image_grid_pinpoints", pinpoints) != pinpoints:
        raise images.refuse("image_grid_pinpoints", "the list of config.json, in its order")


def _all_close(value: Any, right: float) -> bool:
    numbers = value if isinstance(value, list) else [value]
    is_number = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    return is_number and all(math.isclose(number, right, rel_tol=1e-6) for number in numbers)


def _check_processor(processor: Section, config: HfConfig) -> None:
    patches = config.model.vision.patches_per_side**2
    ratio = config.raw.get("vision_aspect_ratio", "anyres_max_9")
    processor.check(
        {
            "image_token": ("<image>", "<image>"),
            "num_image_tokens": (patches, patches),
            "vision_feature_select_strategy": ("full", "full"),
            **({"vision_aspect_ratio": (ratio, ratio)} if config.layout == "llava_onevision" else {}),
        }
    )


def _check_additions(folder: Path) -> None:
    """Refuse a folder with what is put on top of the model: an adapter, or another pooling than the last token's."""
    if (folder / "adapter_config.json").is_file():
        hint = "merge it into the weights first (merge_and_unload of peft), and remove the file"
        raise CheckpointError(f"{folder / 'adapter_config.json'}: the folder has an adapter, which is not read; {hint}")
    pooling = _read(folder / "1_Pooling" / "config.json") if (folder / "modules.json").is_file() else None
    for mode in [] if pooling is None else pooling.values:
        if mode.startswith("pooling_mode_") and pooling.values[mode] and mode != "pooling_mode_lasttoken":
            raise pooling.refuse(mode, "false: an embedding is that of the last token (pooling_mode_lasttoken)")


def _check_tokenizer(folder: Path, config: HfConfig) -> None:
    """Check that tokenizer.json has the ids that the files beside it give, and that its settings are those we use."""
    settings = _read(folder / "tokenizer_config.json")
    if settings is not None:
        settings.check(TOKENIZER)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    spec = read_json(file, error=CheckpointError)
    ids = _ids(spec, file)
    if _adds_tokens(spec.get("post_processor")):
        raise CheckpointError(
            f"{file}: its post_processor adds tokens to each text, which data.prompt does not; remove it"
        )
    if (folder / "vocab.json").is_file():
        vocabulary = read_json(folder / "vocab.json", error=CheckpointError)
        _compare_ids(ids, ({"content": token, "id": i} for token, i in vocabulary.items()), file, "vocab.json")
    for name in ("tokenizer_config.json", "added_tokens.json"):
        if (folder / name).is_file():
            _compare_ids(ids, listed_tokens(folder / name), file, name)
    image = config.raw.get("image_token_index")
    if config.layout == "llava_onevision" and image is not None and ids.get("<image>", image) != image:
        raise CheckpointError(f"{file}: '<image>' must have the id {image}, as config.json says, not {ids['<image>']}")


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
        vocabulary = spec["model"]["vocab"]
        vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
        return vocabulary | {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} has a vocabulary or added tokens that cannot be read: {error!r}") from error


def _compare_ids(ids: dict[str, int], tokens: Iterable[dict], file: Path, says: str) -> None:
    for token in tokens:
        content, wanted = token["content"], token["id"]
        if ids.get(content) != wanted:
            has = f"has {ids[content]}" if content in ids else "has no such token"
            raise CheckpointError(f"{file}: {content!r} must have the id {wanted}, as {says} says, but it {has}")

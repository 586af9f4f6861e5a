"""What the files beside a Qwen-VL model's config.json say, compared with what is run: nothing is ignored.

The pixel budget of the image processor is taken over into the section `data`. A folder whose processor or tokenizer
settings say something else than config.json and the vision encoder is refused, since its embeddings would be wrong
without a word.

Sources: transformers' image_processing_qwen2_vl.py, video_processing_qwen2_vl.py, video_processing_qwen3_vl.py and
processing_qwen2_vl.py (4.57 and 5.23).
"""

import re
from pathlib import Path

from megatron_llave.errors import CheckpointError
from megatron_llave.models.hf.config_json import HfConfig, Section
from megatron_llave.models.hf.side_checks import (
    chat_templates,
    check_pixels,
    check_pooling,
    check_tokenizer,
    processor_sections,
    used_template,
)
from megatron_llave.models.qwen_vl.chat_templates import prompt_of_template
from megatron_llave.models.qwen_vl.hf_files import HfProcessor, embedder_prompt, read_pixels
from megatron_llave.models.qwen_vl.hf_keys import END_OF_TEXT, SPECIAL_TOKENS, TOKEN_BUDGET
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED
from megatron_llave.models.qwen_vl.vision import CLIP_MEAN, CLIP_STD

IMAGE_TYPE = r"Qwen(2|2_5_|3)VLImageProcessor(Fast|Pil)?"
MISSING = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "patch_size": 14}
"""What transformers' Qwen2VLImageProcessor, which all three families use, takes for a missing key."""


def check_files(config: HfConfig, folder: Path, files: HfProcessor) -> list[str]:
    """Refuse a folder whose processor or tokenizer contradicts its config.json, or that is normalised otherwise.

    The pixel budget of the folder's images, and the prompt if its chat template is that of an export, become keys of
    the section `data` of `config`.

    Returns:
        A line for each thing that embeddings do not use, and about the prompt and the budget.

    Raises:
        CheckpointError: names the file and the key.
    """
    patch, notes = config.model.vision.patch_size, []
    _, images, videos = processor_sections(folder)
    for section in images:
        if not re.fullmatch(IMAGE_TYPE, str(section.values.get("image_processor_type", "Qwen2VLImageProcessor"))):
            raise section.refuse("image_processor_type", "Qwen2VLImageProcessor")
        check_pixels(section, files.mean, files.std, MISSING)
        _check_patches(section, patch, MISSING["patch_size"])
        for key, value in read_pixels(section).items():
            first = read_pixels(images[0])[key]
            if value != first:
                what = f"{section.prefix}{key} is {value}, but {first} in {images[0].file.name}"
                raise CheckpointError(f"{section.file}: {what}; both must be the same, or one of the files be removed")
            setattr(config.run.data, key, value)
    for section in videos:
        kind = str(section.values.get("video_processor_type", files.video_processor))
        if kind not in (files.video_processor, files.video_processor.replace("Qwen2VL", "Qwen2_5_VL")):
            raise section.refuse("video_processor_type", files.video_processor)
        check_pixels(section, files.mean, files.std, {})
        _check_patches(section, patch, patch)
        where = f"{section.file.name}{f' ({section.prefix[:-1]})' if section.prefix else ''}"
        notes.append(f"size in {where}: not used, since data.min_pixels and data.max_pixels hold for videos too")
    check_pooling(folder)
    special = {token: config.raw.get(key, default) for key, (token, default) in SPECIAL_TOKENS.items()}
    notes += check_tokenizer(folder, special, END_OF_TEXT)
    embedder = _set_prompt(config, folder, files, notes)
    if embedder == "gme" or config.raw.keys() & TOKEN_BUDGET.keys():
        _set_token_budget(config, folder, notes)
    data, pixels = config.run.data, (MERGED * patch) ** 2
    if data.max_pixels is not None and data.max_pixels // pixels > data.max_length:
        many = f"data.max_pixels={data.max_pixels} lets an image have {data.max_pixels // pixels} visual tokens"
        hint = f"more than data.max_length={data.max_length}, so that large images are refused; lower the first"
        notes.append(f"{many}, {hint} or raise the second")
    return notes


def _set_prompt(config: HfConfig, folder: Path, files: HfProcessor, notes: list[str]) -> str | None:
    """Set data.prompt to that of an export's chat template, or else of a known embedding model, which is returned."""
    templates = chat_templates(folder)
    for name, text in templates.items():
        if prompt_of_template(text, files.prompts) is None:
            notes.append(f"chat template in {name}: not used, since data.prompt is the prompt of embeddings")
    known = prompt_of_template(used_template(templates) or "", files.prompts)
    if known is not None:
        config.run.data.prompt = known
        return None
    prompt = embedder_prompt(config.raw, folder, files)
    if prompt is None:
        default = f"data.prompt={config.run.data.prompt}, the default"
        notes.append(f"{default}: an embedding model needs the prompt that it was trained with (docs/qwen_vl.md)")
        return None
    config.run.data.prompt = prompt
    notes.append(f"data.prompt={prompt}: the files say that this is such an embedding model, or was made of one")
    return prompt


def _set_token_budget(config: HfConfig, folder: Path, notes: list[str]) -> None:
    """Set the budget of pixels to what config.json says in visual tokens, as GME's code does."""
    data, top = config.run.data, Section(folder / "config.json", "", config.raw)
    pixels = (MERGED * config.model.vision.patch_size) ** 2
    data.min_pixels, data.max_pixels = (pixels * int(top.number(key, n)) for key, n in TOKEN_BUDGET.items())
    if data.min_pixels > data.max_pixels:
        raise top.refuse("min_image_tokens", "at most max_image_tokens")
    budget = f"data.min_pixels={data.min_pixels}, data.max_pixels={data.max_pixels}"
    notes.append(f"{budget}: as GME's code has it ({', '.join(TOKEN_BUDGET)}), whatever other files say")


def _check_patches(section: Section, patch: int, missing: int) -> None:
    right = {"patch_size": (missing, patch), "merge_size": (2, MERGED), "temporal_patch_size": (2, FRAMES)}
    section.check(right)

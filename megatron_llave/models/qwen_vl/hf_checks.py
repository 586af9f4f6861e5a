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
)
from megatron_llave.models.qwen_vl.hf_files import HfProcessor, chat_template, read_pixels
from megatron_llave.models.qwen_vl.hf_keys import END_OF_TEXT, SPECIAL_TOKENS
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED
from megatron_llave.models.qwen_vl.vision import CLIP_MEAN, CLIP_STD

IMAGE_TYPE = r"Qwen(2|2_5_|3)VLImageProcessor(Fast|Pil)?"
MISSING = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "patch_size": 14}
"""What transformers' Qwen2VLImageProcessor, which all three families use, takes for a missing key."""
END = "<|end|>"


def check_files(config: HfConfig, folder: Path, files: HfProcessor) -> list[str]:
    """Refuse a folder whose processor or tokenizer contradicts its config.json, or that is normalised otherwise.

    The pixel budget of the folder's images, and the prompt if its chat template is that of an export, become keys of
    the section `data` of `config`.

    Returns:
        A line for each thing that embeddings do not use.

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
    known = {chat_template(template, END): prompt for prompt, template in files.prompts.items()}
    for name, text in chat_templates(folder).items():
        fits = [prompt for ours, prompt in known.items() if re.fullmatch(_pattern(ours), text)]
        if fits:
            config.run.data.prompt = fits[0]
        else:
            notes.append(f"chat template in {name}: not used, since data.prompt is the prompt of embeddings")
    return notes


def _pattern(template: str) -> str:
    """Return a pattern of a template with any end-of-sequence token."""
    return re.escape(template).replace(re.escape(repr(END)), "'[^']*'")


def _check_patches(section: Section, patch: int, missing: int) -> None:
    right = {"patch_size": (missing, patch), "merge_size": (2, MERGED), "temporal_patch_size": (2, FRAMES)}
    section.check(right)

"""What the files beside config.json say about images and tokens, compared with what is run: nothing is ignored.

Images are always cut, resized and normalised as config.json and SigLIP say. A folder whose processor or tokenizer
settings say something else is refused, since its embeddings would be wrong without a word. padding_side has no meaning
for packed sequences, and chat templates none for embeddings: data.prompt is the prompt.

Sources: transformers' image_processing_llava_onevision.py, processing_llava_onevision.py and
video_processing_llava_onevision.py (4.45 to 5.x).
"""

from pathlib import Path
from typing import Any

from megatron_llave.models.hf.config_json import HfConfig, Section
from megatron_llave.models.hf.side_checks import (
    chat_templates,
    check_pixels,
    check_pooling,
    check_tokenizer,
    processor_sections,
)
from megatron_llave.models.llava_onevision.hf_config import NEWLINE_TOKEN
from megatron_llave.models.llava_onevision.prompt import NEWLINE_TEXT, prompt_of_template

MEAN, STD = (0.5,), (0.5,)
IMAGE_TYPES = {"llava_onevision": "LlavaOnevisionImageProcessor", "llava": "SiglipImageProcessor"}
"""transformers' class of the image processor of a layout."""
MISSING = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""What transformers' LlavaOnevisionImageProcessor takes for a missing key, where that is not what is run.

Its values for missing sizes and grids (384 pixels) say nothing about a model whose config.json has others."""


def check_files(config: HfConfig, folder: Path) -> list[str]:
    """Refuse a folder whose processor or tokenizer contradicts its config.json, or that is normalised otherwise.

    A chat template of an export of a run with data.prompt=plain sets that key of `config`.

    Returns:
        A line for each chat template that is not the one of an export: embeddings do not use it.

    Raises:
        CheckpointError: names the file and the key.
    """
    processor, image_sections, video_sections = processor_sections(folder)
    is_onevision = config.layout == "llava_onevision"
    for images in image_sections:
        if config.layout in IMAGE_TYPES:
            _check_type(images, IMAGE_TYPES[config.layout])
        _check_images(images, config, MISSING if is_onevision else {})
    for videos in video_sections:
        _check_images(videos, config, {})
    if processor is not None:
        _check_processor(processor, config)
    check_pooling(folder)
    tokens = {"<image>": config.raw.get("image_token_index"), NEWLINE_TEXT: config.raw.get(NEWLINE_TOKEN)}
    known = {} if config.layout == "llava_qwen" else {text: i for text, i in tokens.items() if i is not None}
    check_tokenizer(folder, known)
    templates = chat_templates(folder)
    prompts = {name: prompt_of_template(text) for name, text in templates.items()}
    if "plain" in prompts.values():
        config.run.data.prompt = "plain"
    others = [name for name, prompt in prompts.items() if prompt is None]
    return [f"chat template in {name}: not used, since data.prompt is the prompt of embeddings" for name in others]


def _check_type(images: Section, right: str) -> None:
    kind = images.values.get("image_processor_type")
    if kind is not None and not str(kind).startswith(right):
        raise images.refuse("image_processor_type", right)


def _check_images(images: Section, config: HfConfig, missing: dict[str, Any]) -> None:
    """Check how tiles are resized and normalised, and the grids; `missing` has the values of missing keys."""
    tile, values = config.model.vision.image_size, missing | images.values
    images.check({"do_pad": (True, True)})
    check_pixels(images, MEAN, STD, missing)
    for key in ("size", "crop_size"):
        sides = values.get(key)
        written = list(sides.values()) if isinstance(sides, dict) else [sides]
        if sides is not None and (not written or any(side != tile for side in written)):
            raise images.refuse(key, f"height and width {tile}, the image_size of config.json's vision_config")
    pinpoints = [[rows * tile, columns * tile] for columns, rows in config.model.image_grids]
    if config.layout == "llava_onevision" and values.get("image_grid_pinpoints", pinpoints) != pinpoints:
        raise images.refuse("image_grid_pinpoints", "the list of config.json, in its order")


def _check_processor(processor: Section, config: HfConfig) -> None:
    patches = config.model.vision.patches_per_side**2
    ratio = config.raw.get("vision_aspect_ratio", "anyres_max_9")
    processor.check(
        {
            "image_token": ("<image>", "<image>"),
            "num_image_tokens": (patches, patches),
            "vision_feature_select_strategy": ("full", "full"),
            "num_additional_image_tokens": (0, 0),
            **({"vision_aspect_ratio": (ratio, ratio)} if config.layout == "llava_onevision" else {}),
        }
    )

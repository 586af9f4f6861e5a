"""The files beside the weights of a Qwen-VL model in a Hugging Face folder: tokenizer, processor, model card.

hf_config.py makes the config.json that is written here. An export writes these files last; an import keeps those that a
later export gives back. Tensors are not read or written here.

Sources of the formats: transformers' processing_qwen2_vl.py, image_processing_qwen2_vl.py, video_processing_qwen2_vl.py
and video_processing_qwen3_vl.py (4.57 and 5.23).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from megatron_llave.config.data import DataConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json, write_json
from megatron_llave.models.hf.config_json import Section
from megatron_llave.models.hf.model_card import (
    PromptText,
    base_model,
    config_of_run,
    how_to_embed,
    model_card,
    prompt_of,
    steps_to_embed,
)
from megatron_llave.models.hf.sentence_transformers_files import write_sentence_transformers
from megatron_llave.models.hf.side_checks import (
    IMAGE_FILE,
    PROCESSOR_FILE,
    VIDEO_FILE,
    chat_templates,
    processor_sections,
    used_template,
)
from megatron_llave.models.hf.side_files import (
    CHAT_TEMPLATES,
    SIDE_FILES,
    add_special_tokens,
    end_of_sequence,
    keep_side_files,
    replace_sentencepiece,
    without_appended,
    write_chat_template,
    write_generation_config,
)
from megatron_llave.models.qwen_vl.chat_templates import (
    VISION_MARKS,
    chat_template,
    prompt_of_template,
    sentence_transformers_template,
)
from megatron_llave.models.qwen_vl.hf_keys import END_OF_TEXT, SPECIAL_TOKENS, TOKEN_BUDGET, HfKeys
from megatron_llave.models.qwen_vl.prompt import Template
from megatron_llave.models.qwen_vl.resize import FRAMES, MERGED, pixel_budget

KEPT_FILES = (*SIDE_FILES, IMAGE_FILE, PROCESSOR_FILE)
"""Those of the image processor are kept for the pixel budget."""
DEFAULT_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}
"""The budget that transformers' Qwen2VLImageProcessor takes for missing keys, whatever the size of a patch."""
APPENDS = f"tokenizer.json appends {END_OF_TEXT}"
"""What embedder_prompt finds said by a tokenizer.json that does so."""
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""How `size` spells the budget, which is one of pixels."""


@dataclass(frozen=True)
class HfProcessor:
    """What differs between the processors of the families."""

    name: str
    """The family's name for readers."""
    processor: str
    """transformers' class of the processor."""
    video_processor: str
    """transformers' class of the video processor."""
    mean: tuple[float, ...]
    """Mean of each colour channel, with which the pixels of an image are normalised."""
    std: tuple[float, ...]
    """Standard deviation of each colour channel."""
    prompts: Mapping[str, Template]
    """Prompts by value of data.prompt."""
    embedders: Mapping[str, str]
    """Value of data.prompt of a released embedding model -> a pattern of what only its folder says: in architectures,
    auto_map or _name_or_path of config.json, in a chat template, or APPENDS."""


CARD_TEXT = """A {name} embedding model: its vision encoder, and its decoder of {layers} layers. It maps a text, an
image, or both to one L2-normalised embedding of {size} numbers. Compare embeddings by their dot product, which is the
cosine similarity; matching items have a high one."""
VERSIONS = "4.57 or newer (tested with 4.57 and 5.23)"

BASE_OWNERS = "Qwen|Alibaba-NLP|TIGER-Lab|VLM2Vec|OpenSearch-AI"


def keep_files(source: str | Path, out: str | Path) -> None:
    """Copy config.json and the KEPT_FILES that exist; make tokenizer.json if only its parts are there.

    Raises:
        CheckpointError: the parts of the tokenizer are damaged.
    """
    keep_side_files(source, out, KEPT_FILES)


def embedder_prompt(config: Mapping, folder: Path, files: HfProcessor) -> str | None:
    """Return data.prompt of the released embedding model that a folder is, or that it was made of; None: of none known.

    Args:
        config: its config.json.
        folder: has the chat template, if there is one.
        files: of the family.
    """
    file, appends = folder / "tokenizer.json", ""
    if file.is_file():
        spec = read_json(file, error=CheckpointError)
        appends = APPENDS if without_appended(spec, END_OF_TEXT) != spec.get("post_processor") else ""
    names = json.dumps([config.get(key) for key in ("architectures", "auto_map", "_name_or_path")])
    said = "\n".join([names, appends, *chat_templates(folder).values()])
    return next((prompt for prompt, pattern in files.embedders.items() if re.search(pattern, said)), None)


def read_pixels(images: Section) -> dict[str, int]:
    """Return min_pixels and max_pixels of the settings of an image processor, as transformers 5.23 reads them.

    Raises:
        CheckpointError: one is no positive number, or they are in the wrong order.
    """
    size = images.inner("size")
    sizes = {} if size is None else size.values
    found = {}
    for key, default in DEFAULT_PIXELS.items():
        written = [images.values.get(key), sizes.get(EDGES[key]), sizes.get(key), default]
        value = next(value for value in written if value is not None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise images.refuse(key if images.values.get(key) is not None else "size", "a positive number of pixels")
        found[key] = value
    if found["min_pixels"] > found["max_pixels"]:
        words = f"min_pixels={found['min_pixels']} is above max_pixels={found['max_pixels']}"
        raise CheckpointError(f"{images.file}: {words}; it must be at most that")
    return found


def write_files(
    out: str | Path,
    layout: str,
    config: dict,
    source: str | Path | None,
    training_config: str | None,
    keys: HfKeys,
    files: HfProcessor,
) -> list[str]:
    """Write all files of an exported folder but the weights.

    There is a processor if there is a tokenizer.json or its parts, in which the tokens that stand for images and videos
    become special tokens. The pixel budget is that of the run, or of the folder that the weights came in.

    Args:
        out: an existing folder.
        layout: that of the family.
        config: content of config.json.
        source: folder with the tokenizer and maybe others of KEPT_FILES; None: there is no such folder.
        training_config: the run's configuration in YAML, for prompt and pixels; None: no run has trained the weights.
        keys: the family's keys of config.json.
        files: what its processor has of its own.

    Returns:
        A sentence for each thing that the folder lacks; the card says the same.

    Raises:
        CheckpointError: a file of the source is damaged, or its tokenizer and config.json contradict each other.
    """
    out, notes = Path(out), []
    if source is not None:
        keep_files(source, out)
    replace_sentencepiece(out)
    is_new, has_tokenizer = not (out / "config.json").is_file(), (out / "tokenizer.json").is_file()
    text = config.get("text_config") or config
    if is_new and has_tokenizer:
        config = config | _token_ids(out / "tokenizer.json", text["vocab_size"])
    is_trained = training_config is not None
    written = used_template(chat_templates(out)) or ""
    known = prompt_of_template(written, files.prompts) or embedder_prompt(config, out, files)
    prompt = prompt_of(training_config) or known or "qwen"
    config = config_of_run(config, training_config)
    config = {key: value for key, value in config.items() if not is_trained or key not in TOKEN_BUDGET}
    write_json(out / "config.json", config)
    write_generation_config(out, text)
    for name in CHAT_TEMPLATES if is_trained else ():  # a trained model has the prompt of its run
        (out / name).unlink(missing_ok=True)
    if has_tokenizer:
        ids = {token: config.get(key, default) for key, (token, default) in SPECIAL_TOKENS.items()}
        add_special_tokens(out, ids, files.processor)
        _write_processor(out, config["vision_config"], training_config, files)
        _write_templates(out, text["hidden_size"], files.prompts[prompt], is_trained)
    else:
        notes.append("There is no tokenizer.json, so transformers cannot make a processor of this folder.")
    (out / PROCESSOR_FILE).unlink(missing_ok=True)  # it would be read instead of the two that are written
    card = _model_card(out, layout, text, prompt, training_config, notes, source, keys, files)
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


def _write_templates(out: Path, width: int, template: Template, is_trained: bool) -> None:
    """Write the chat template and the files of sentence-transformers."""
    end = end_of_sequence(out)
    written = chat_template(template, end)
    write_chat_template(out, written, True, is_trained)
    _end_once(out, written)
    instruction = template.system if template.takes_instruction else None
    prompts = {} if instruction is None else dict.fromkeys(("query", "document"), instruction)
    kinds = ("text", "image") if template.has_image_positions else ("text",)
    write_sentence_transformers(out, width, sentence_transformers_template(template, end), prompts, kinds)


def _model_card(
    out: Path,
    layout: str,
    language: Mapping,
    prompt: str,
    training_config: str | None,
    notes: list[str],
    source: str | Path | None,
    keys: HfKeys,
    files: HfProcessor,
) -> str:
    """Return README.md."""
    header = ["library_name: transformers", "pipeline_tag: feature-extraction"]
    sizes = {"size": language["hidden_size"], "layers": language["num_hidden_layers"]}
    what = [CARD_TEXT.format(name=files.name, **sizes), *notes]
    text = _prompt_text(files.prompts[prompt], "the end-of-sequence token" if notes else end_of_sequence(out))
    if notes:
        return model_card(
            header, base_model(source, BASE_OWNERS, training_config), ["llave", layout], what, steps_to_embed(text)
        )
    template = used_template(chat_templates(out)) or ""
    is_own = prompt_of_template(template, files.prompts) == prompt
    embed = how_to_embed(text, keys.architecture, VERSIONS, is_own, training_config)
    tags = ["llave", layout, "sentence-transformers"]
    return model_card(header, base_model(source, BASE_OWNERS, training_config), tags, what, embed)


def _end_once(out: Path, template: str) -> None:
    """Let tokenizer.json append no <|endoftext|> if the chat template is ours, or writes this token itself."""
    used = used_template(chat_templates(out)) or template
    spec = read_json(out / "tokenizer.json", error=CheckpointError)
    rest = without_appended(spec, END_OF_TEXT)
    if (used == template or END_OF_TEXT in used) and rest != spec.get("post_processor"):
        write_json(out / "tokenizer.json", spec | {"post_processor": rest})


def _token_ids(file: Path, rows: int) -> dict[str, int]:
    """Return the ids of the special tokens in a tokenizer, with the last rows of the embedding for those it lacks."""
    spec = read_json(file, error=CheckpointError)
    listed = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    free = iter(range(rows - 1, -1, -1))
    return {key: listed[token] if token in listed else next(free) for key, (token, _) in SPECIAL_TOKENS.items()}


def _write_processor(out: Path, vision: Mapping, training_config: str | None, files: HfProcessor) -> None:
    """Write the files that AutoProcessor reads beside the tokenizer; settings that we do not know are kept."""
    patch = vision.get("patch_size", 14)
    _, images, _ = processor_sections(out)
    if training_config is None and images:
        pixels = read_pixels(images[-1])  # transformers 5.x reads processor_config.json first
    else:
        data = {} if training_config is None else OmegaConf.create(training_config).get("data") or {}
        given = {key: data.get(key) for key in DEFAULT_PIXELS}
        budget = pixel_budget(DataConfig(**given), patch)
        pixels = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(files.mean),
        "image_std": list(files.std),
        "merge_size": MERGED,
        "patch_size": patch,
        "processor_class": files.processor,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {EDGES[key]: value for key, value in pixels.items()},
        "temporal_patch_size": FRAMES,
    }
    own = {
        IMAGE_FILE: {"image_processor_type": "Qwen2VLImageProcessor", **pixels},  # 4.57 does not read its `size`
        VIDEO_FILE: {"video_processor_type": files.video_processor},
    }
    for name, kind in own.items():
        kept = read_json(out / name, error=CheckpointError) if (out / name).is_file() else {}
        others = {key: value for key, value in kept.items() if key not in EDGES and key != "image_processor_type"}
        write_json(out / name, others | common | kind)


def _prompt_text(template: Template, end: str) -> PromptText:
    """Return the prompt for the code of a card."""
    if not template.is_chat:
        tail = end if template.tail is None else template.tail
        image = f"<|image_pad|>{template.after_images}"
        is_stripped = template.tail is None
        return PromptText("", image, tail, None, template.has_image_positions, is_stripped)
    system = "{}" if template.takes_instruction else template.system
    turn = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    instruction = template.system if template.takes_instruction else None
    image = VISION_MARKS.format("<|image_pad|>")
    return PromptText(f"{turn}<|im_start|>user\n", image, template.tail, instruction)

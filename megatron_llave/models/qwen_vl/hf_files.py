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
from megatron_llave.models.hf.model_card import base_model, model_card, prompt_of
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
    without_appended,
    write_chat_template,
    write_generation_config,
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
    """Of the colours of a picture, with which its pixels are normalised."""
    std: tuple[float, ...]
    """Their standard deviation."""
    prompts: Mapping[str, Template]
    """Prompts by value of data.prompt."""
    embedders: Mapping[str, str]
    """Value of data.prompt of a released embedding model -> a pattern of what only its folder says: in architectures,
    auto_map or _name_or_path of config.json, in a chat template, or APPENDS."""


CARD_TEXT = """A {name} embedding model: its vision encoder, and its decoder of {layers} layers. It maps a text, an
image, or both to one L2-normalised embedding of {size} numbers. Compare embeddings by their dot product, which is the
cosine similarity; matching items have a high one."""
CARD_EMBED = """Needs torch, torchvision, pillow, and transformers, 4.57 or newer (tested with 4.57 and 5.23)."""
CARD_CODE = """import torch
from PIL import Image
from transformers import AutoProcessor, {architecture}

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder)
model = {architecture}.from_pretrained(folder).eval()

HEAD = {head!r}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TAIL = {tail!r}


@torch.no_grad()
def embed(text, image=None{argument}):
    # 1. The prompt: an image comes first in the user's turn; the last token is the one that is pooled.
    prompt = {start} + ("" if image is None else IMAGE) + text + TAIL
    images = None if image is None else [image]
    inputs = processor(text=[prompt], images=images, return_tensors="pt").to(model.device, model.dtype)
    # 2. The last token of the last hidden state, which is after the final norm.
    state = model.model(**inputs).last_hidden_state[0, -1]
    # 3. Length 1.
    return torch.nn.functional.normalize(state.float(), dim=0)


query = embed("Find an image that matches the caption: a red square on white.")
target = embed("Represent the given image.", Image.new("RGB", (64, 48), "red"))
print(float(query @ target))"""
CARD_STEPS = """1. The prompt is {head!r}, the text, {tail!r}. Images come before the text.
2. The embedding is the last token's hidden state after the decoder's final norm,
3. divided by its L2 norm."""
CARD_NO_CHAT = """Load it with megatron_llave: it was trained with data.prompt={prompt}, which has no chat turns.
The embedding is the last token's hidden state after the decoder's final norm, divided by its L2 norm."""

BASE_OWNERS = "Qwen|Alibaba-NLP|TIGER-Lab|VLM2Vec|OpenSearch-AI"


def chat_template(template: Template, end: str) -> str:
    """Return a prompt as a Jinja template for apply_chat_template of transformers.

    A user's message alone is the whole input of an embedding, so what closes the prompt always follows it, with or
    without add_generation_prompt. Images come where the message has them; a system message takes the place of the
    template's own.

    Args:
        template: of the prompt.
        end: text of the tokenizer's end-of-sequence token.
    """
    marks = "<|vision_start|>{}<|vision_end|>" if template.is_chat else "{}"
    after = repr(template.after_images)
    pieces = (
        "{% set content = message['content'] %}"
        "{% set parts = [{'type': 'text', 'text': content}] if content is string else content %}"
        "{% for part in parts %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {marks.format('<|image_pad|>')!r} }}}}"
        f"{{% elif part['type'] == 'video' %}}{{{{ {marks.format('<|video_pad|>')!r} }}}}"
        f"{{% else %}}{{{{ part['text']{'' if template.tail is not None else ' | trim'} }}}}{{% endif %}}"
        f"{{% if not loop.last and loop.nextitem.get('text', ' ') %}}{{{{ {after} }}}}{{% endif %}}"
        "{% endfor %}"
    )
    tail = repr(end if template.tail is None else template.tail)
    if not template.is_chat:
        return f"{{% for message in messages %}}{pieces}{{% endfor %}}{{{{ {tail} }}}}"
    turn = f"<|im_start|>system\n{template.system}<|im_end|>\n"
    system = f"{{% if loop.first and message['role'] != 'system' %}}{{{{ {turn!r} }}}}{{% endif %}}"
    return (
        f"{{% for message in messages %}}{'' if template.system is None else system}"
        f"{{{{ '<|im_start|>' + message['role'] + '\n' }}}}{pieces}"
        f"{{{{ {tail} if loop.last and message['role'] == 'user' else '<|im_end|>\n' }}}}"
        "{% endfor %}"
    )


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
    is_new, has_tokenizer = not (out / "config.json").is_file(), (out / "tokenizer.json").is_file()
    text = config.get("text_config") or config
    if is_new and has_tokenizer:
        config = config | _token_ids(out / "tokenizer.json", text["vocab_size"])
    is_trained = training_config is not None
    prompt = prompt_of(training_config) or embedder_prompt(config, out, files) or "qwen"
    config = {key: value for key, value in config.items() if not is_trained or key not in TOKEN_BUDGET}
    write_json(out / "config.json", config)
    write_generation_config(out, text)
    for name in CHAT_TEMPLATES if is_trained else ():  # a trained model has the prompt of its run
        (out / name).unlink(missing_ok=True)
    if has_tokenizer:
        ids = {token: config.get(key, default) for key, (token, default) in SPECIAL_TOKENS.items()}
        add_special_tokens(out, ids, files.processor)
        _write_processor(out, config["vision_config"], training_config, files)
        template = chat_template(files.prompts[prompt], end_of_sequence(out))
        write_chat_template(out, template, True, is_trained)
        _end_once(out, template)
    else:
        notes.append("There is no tokenizer.json, so transformers cannot make a processor of this folder.")
    (out / PROCESSOR_FILE).unlink(missing_ok=True)  # it would be read instead of the two that are written
    header = ["library_name: transformers", "pipeline_tag: feature-extraction"]
    sizes = {"size": text["hidden_size"], "layers": text["num_hidden_layers"]}
    what = [CARD_TEXT.format(name=files.name, **sizes), *notes]
    embed = _how_to_embed(prompt, has_tokenizer, keys, files.prompts[prompt])
    card = model_card(header, base_model(source, BASE_OWNERS), ["llave", layout], what, embed)
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


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


def _how_to_embed(prompt: str, has_processor: bool, keys: HfKeys, template: Template) -> list[str]:
    """Return lines of the card."""
    if not template.is_chat:
        return [CARD_NO_CHAT.format(prompt=prompt)]
    system = "{}" if template.takes_instruction else template.system
    turn = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    words = {"head": f"{turn}<|im_start|>user\n", "tail": template.tail}
    if not has_processor:
        return [CARD_STEPS.format(**words)]
    argument = f", instruction={template.system!r}" if template.takes_instruction else ""
    start = "HEAD.format(instruction)" if template.takes_instruction else "HEAD"
    code = CARD_CODE.format(architecture=keys.architecture, argument=argument, start=start, **words)
    return [CARD_EMBED, "", "```python", code, "```"]

"""The files beside the weights in a Hugging Face folder: config.json, tokenizer, processor, model card.

hf_config.py makes the config.json that is written here. An export writes these files last; an import keeps those that a
later export gives back. Tensors are not read or written here.

Sources of the formats: transformers' processing_llava_onevision.py and image_processing_llava_onevision.py; the folders
of llava-hf.
"""

from pathlib import Path

from megatron_llave.config.model import ModelConfig
from megatron_llave.files import write_json
from megatron_llave.models.hf.model_card import base_model, model_card, prompt_of
from megatron_llave.models.hf.side_files import (
    CHAT_TEMPLATES,
    add_special_tokens,
    end_of_sequence,
    keep_side_files,
    room_for_tokens,
    write_chat_template,
    write_generation_config,
)
from megatron_llave.models.llava_onevision.prompt import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, QWEN_HEAD, QWEN_TAIL

IMAGE_TEXTS = ("<image>", "<video>")
CARD_TEXT = """A LLaVE model: a SigLIP vision encoder, a two-layer projector, and a Qwen2 decoder of {layers} layers.
It maps a text, an image, or both to one L2-normalised embedding of {size} numbers. Compare embeddings by their dot
product, which is the cosine similarity; matching items have a high one."""
CARD_EMBED = """Needs torch, torchvision, pillow, and transformers, 4.52 or newer (tested with 5.23)."""
CARD_CODE = """import torch
from PIL import Image
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder)
model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()

HEAD = {head!r}
TAIL = {tail!r}


@torch.no_grad()
def embed(text, image=None):
    # 1. The prompt: an image comes first in the user's turn; the assistant's turn is one newline.
    prompt = HEAD + ("" if image is None else "<image>\\n") + text + TAIL
    inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device, model.dtype)
    # 2. The last token of the last hidden state, which is after the final norm.
    state = model.model(**inputs).last_hidden_state[0, -1]
    # 3. Length 1.
    return torch.nn.functional.normalize(state.float(), dim=0)


query = embed("Find an image that matches the caption: a red square on white.")
target = embed("Represent the given image.", Image.new("RGB", (64, 48), "red"))
print(float(query @ target))"""
CARD_STEPS = """1. The prompt is {head!r}, the text, {tail!r}.
   An image comes first, as `<image>` and a newline before the text.
2. The embedding is the last token's hidden state after the decoder's final norm,
3. divided by its L2 norm."""
CARD_QWEN = """This is the layout of LLaVA-NeXT, which transformers does not read: load it with the released LLaVE code,
or with megatron_llave, which also exports it to transformers' own layout."""
CARD_PLAIN = """Load it with megatron_llave: it was trained with the prompt template `plain`, which has no chat turns.

1. The prompt is the image, if there is one, the text, and the end-of-sequence token.
2. The embedding is the last token's hidden state after the decoder's final norm,
3. divided by its L2 norm."""

BASE_OWNERS = "llava-hf|lmms-lab|BAAI|zhibinlan"


def room_for_image_tokens(model: ModelConfig, layout: str, folder: Path | None) -> ModelConfig:
    """`model` with a vocabulary that has rows for <image> and <video>, which the layout of transformers needs."""
    return room_for_tokens(model, folder, IMAGE_TEXTS) if layout == "llava_onevision" else model


def write_side_files(
    out: str | Path, layout: str, config: dict, source: str | Path | None, training_config: str | None
) -> list[str]:
    """Write all files of an exported folder but the weights.

    llava_onevision gets a processor if there is a tokenizer.json or its parts: <image> and <video> become special
    tokens with the ids that config.json gives them. Otherwise the folder has no processor, and its card says so.

    Args:
        out: an existing folder.
        layout: llava_onevision or llava_qwen.
        config: content of config.json.
        source: folder with the tokenizer and maybe others of SIDE_FILES; None: there is no such folder.
        training_config: the run's configuration in YAML, for the prompt; None: the weights were not trained by a run.

    Returns:
        A sentence for each thing that the folder lacks; the card says the same.

    Raises:
        CheckpointError: a file of the source is damaged, or its tokenizer and config.json contradict each other.
    """
    out = Path(out)
    if source is not None:
        keep_side_files(source, out)
    write_json(out / "config.json", config)
    write_generation_config(out, config.get("text_config") or config)
    notes = []
    is_trained, has_tokenizer = training_config is not None, (out / "tokenizer.json").is_file()
    for name in CHAT_TEMPLATES:  # a processor's template has <image>, a tokenizer's has not; a layout has one of them
        kept = out / name
        has_image = kept.is_file() and "<image>" in kept.read_text("utf-8", errors="replace")
        if is_trained or has_image != (layout == "llava_onevision"):
            kept.unlink(missing_ok=True)  # a trained model has the prompt of its run, whatever its weights came with
    if layout == "llava_qwen":
        (out / "video_preprocessor_config.json").unlink(missing_ok=True)
    elif has_tokenizer:
        ids = dict(zip(IMAGE_TEXTS, (config["image_token_index"], config["video_token_index"])))
        add_special_tokens(out, ids, "LlavaOnevisionProcessor")
        _write_processor(out, config)
    else:
        notes.append("There is no tokenizer.json, so transformers cannot make a processor of this folder.")
    if has_tokenizer:
        is_plain = prompt_of(training_config) == "plain"
        template = PLAIN_CHAT_TEMPLATE.replace("END", repr(end_of_sequence(out))) if is_plain else CHAT_TEMPLATE
        write_chat_template(out, template, layout == "llava_onevision", is_trained)
    card = _model_card(layout, config, training_config, notes, source)
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


def _write_processor(out: Path, config: dict) -> None:
    """Write the files that AutoProcessor reads beside the tokenizer."""
    vision = config["vision_config"]
    tile, patch = vision["image_size"], vision["patch_size"]
    image_processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": tile, "width": tile},
    }
    processor = {
        "image_token": "<image>",
        "num_image_tokens": (tile // patch) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": config["vision_aspect_ratio"],
        "vision_feature_select_strategy": "full",
    }
    write_json(out / "preprocessor_config.json", image_processor)
    write_json(out / "processor_config.json", processor)


def _model_card(layout: str, config: dict, training_config: str | None, notes: list[str], source: Path | None) -> str:
    """Return README.md."""
    language = config.get("text_config") or config
    header = ["library_name: transformers"] if layout == "llava_onevision" else []
    header += ["pipeline_tag: feature-extraction"]
    what = [CARD_TEXT.format(size=language["hidden_size"], layers=language["num_hidden_layers"]), *notes]
    if prompt_of(training_config) == "plain":
        embed = [CARD_PLAIN]
    elif layout == "llava_qwen" or notes:
        reason = [CARD_QWEN, ""] if layout == "llava_qwen" else []
        embed = [*reason, CARD_STEPS.format(head=QWEN_HEAD, tail=QWEN_TAIL)]
    else:
        embed = [CARD_EMBED, "", "```python", CARD_CODE.format(head=QWEN_HEAD, tail=QWEN_TAIL), "```"]
    return model_card(header, base_model(source, BASE_OWNERS), ["llave", layout], what, embed)

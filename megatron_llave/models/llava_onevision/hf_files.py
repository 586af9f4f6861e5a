"""The files beside the weights in a Hugging Face folder: config.json, tokenizer, processor, model card.

hf_config.py makes the config.json that is written here. An export writes these files last; an import keeps those that a
later export gives back. Tensors are not read or written here.

Sources of the formats: transformers' processing_llava_onevision.py and image_processing_llava_onevision.py; the folders
of llava-hf.
"""

from pathlib import Path

from megatron_llave.config.model import ModelConfig
from megatron_llave.files import write_json
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
from megatron_llave.models.hf.side_checks import chat_templates, used_template
from megatron_llave.models.hf.side_files import (
    CHAT_TEMPLATES,
    add_special_tokens,
    end_of_sequence,
    keep_side_files,
    replace_sentencepiece,
    room_for_tokens,
    write_chat_template,
    write_generation_config,
)
from megatron_llave.models.llava_onevision.hf_config import NEWLINE_TOKEN
from megatron_llave.models.llava_onevision.prompt import (
    IMAGE_AND_NEWLINE,
    IMAGE_TEXT,
    NEWLINE_TEXT,
    QWEN_HEAD,
    QWEN_TAIL,
    chat_template,
    prompt_of_template,
    sentence_transformers_template,
)

TOKENS = {
    "llava_onevision": {"<image>": "image_token_index", "<video>": "video_token_index"},
    "llava": {"<image>": "image_token_index", NEWLINE_TEXT: NEWLINE_TOKEN},
}
"""Layout of transformers -> its special tokens, and the key of config.json that has the id."""
IMAGES = {"llava_onevision": IMAGE_TEXT, "llava": IMAGE_AND_NEWLINE}
"""What stands for an image in a prompt."""
PROCESSORS = {"llava_onevision": "LlavaOnevisionProcessor", "llava": "LlavaProcessor"}
CARD_TEXT = """A LLaVE model: a SigLIP vision encoder, a two-layer projector, and a Qwen2 decoder of {layers} layers.
It maps a text, an image, or both to one L2-normalised embedding of {size} numbers. Compare embeddings by their dot
product, which is the cosine similarity; matching items have a high one."""
CARD_QWEN = """This is the layout of LLaVA-NeXT, which transformers does not read: load it with the released LLaVE code,
or with megatron_llave, which also exports it to transformers' own layout."""
CARD_LLAVA = """An image is one tile, and a token `{newline}` after it, whose embedding is what
LLaVA-OneVision learns as its `image_newline`."""
VERSIONS = "4.52 or newer (tested with 5.23)"

BASE_OWNERS = "llava-hf|lmms-lab|BAAI|zhibinlan"


def room_for_image_tokens(model: ModelConfig, layout: str, folder: Path | None) -> ModelConfig:
    """`model` with a vocabulary that has rows for the tokens that a layout of transformers needs."""
    return room_for_tokens(model, folder, TOKENS[layout]) if layout in TOKENS else model


def write_side_files(
    out: str | Path, layout: str, config: dict, source: str | Path | None, training_config: str | None
) -> list[str]:
    """Write all files of an exported folder but the weights.

    llava_onevision and llava get a processor if there is a tokenizer: its special tokens have the ids that config.json
    gives them. Otherwise the folder has no processor, and its card says so.

    Args:
        out: an existing folder.
        layout: one of LAYOUTS.
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
    config = config_of_run(config, training_config)
    write_json(out / "config.json", config)
    write_generation_config(out, config.get("text_config") or config)
    notes, of_transformers = [], layout in TOKENS
    if of_transformers:
        replace_sentencepiece(out)
    has_tokenizer = (out / "tokenizer.json").is_file()
    if of_transformers and has_tokenizer:
        ids = {text: config[key] for text, key in TOKENS[layout].items()}
        add_special_tokens(out, ids, PROCESSORS[layout])
        _write_processor(out, layout, config)
    elif of_transformers:
        notes.append("There is no tokenizer.json, so transformers cannot make a processor of this folder.")
    if layout != "llava_onevision":
        (out / "video_preprocessor_config.json").unlink(missing_ok=True)
    end = end_of_sequence(out) if has_tokenizer else "the end-of-sequence token"
    prompt = _write_templates(out, layout, config, end if has_tokenizer else None, training_config)
    card = _model_card(out, layout, config, prompt, end, training_config, notes, source)
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


def _write_templates(out: Path, layout: str, config: dict, end: str | None, training_config: str | None) -> str:
    """Write the chat template and the files of sentence-transformers; without a tokenizer, `end` is None, neither.

    Returns:
        data.prompt of the run, or else of the template that the folder came with, or else qwen.
    """
    is_trained, of_transformers = training_config is not None, layout in TOKENS
    given = map(prompt_of_template, chat_templates(out).values())
    prompt = prompt_of(training_config) or next(filter(None, given), "qwen")
    for name in CHAT_TEMPLATES:  # a processor's template has <image>, a tokenizer's has not; a layout has one of them
        kept = out / name
        has_image = kept.is_file() and "<image>" in kept.read_text("utf-8", errors="replace")
        if is_trained or has_image != of_transformers:
            kept.unlink(missing_ok=True)  # a trained model has the prompt of its run, whatever its weights came with
    if end is not None:
        write_chat_template(
            out, chat_template(prompt, end, IMAGES.get(layout, IMAGE_TEXT)), of_transformers, is_trained
        )
    if end is not None and of_transformers:
        most_images = 1 if layout == "llava_onevision" else None
        template = sentence_transformers_template(prompt, end, IMAGES[layout], most_images)
        write_sentence_transformers(out, config["text_config"]["hidden_size"], template, {})
    return prompt


def _write_processor(out: Path, layout: str, config: dict) -> None:
    """Write the files that AutoProcessor reads beside the tokenizer."""
    vision = config["vision_config"]
    tile, patch = vision["image_size"], vision["patch_size"]
    image_processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": PROCESSORS[layout],
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": tile, "width": tile},
    }
    processor = {
        "image_token": "<image>",
        "processor_class": PROCESSORS[layout],
        "vision_feature_select_strategy": "full",
    }
    if layout == "llava":
        image_processor |= {"image_processor_type": "SiglipImageProcessor"}
        processor |= {"num_additional_image_tokens": 0, "patch_size": patch}
    else:
        grids = {"do_pad": True, "image_grid_pinpoints": config["image_grid_pinpoints"]}
        image_processor |= {"image_processor_type": "LlavaOnevisionImageProcessor", **grids}
        ratio = {"vision_aspect_ratio": config["vision_aspect_ratio"]}
        processor |= {"num_image_tokens": (tile // patch) ** 2, "video_token": "<video>", **ratio}
    write_json(out / "preprocessor_config.json", image_processor)
    write_json(out / "processor_config.json", processor)


def _model_card(
    out: Path,
    layout: str,
    config: dict,
    prompt: str,
    end: str,
    training_config: str | None,
    notes: list[str],
    source: str | Path | None,
) -> str:
    """Return README.md."""
    language, image = config.get("text_config") or config, IMAGES.get(layout, IMAGE_TEXT)
    text = (
        PromptText(QWEN_HEAD, f"{image}\n", QWEN_TAIL)
        if prompt == "qwen"
        else PromptText("", image, end, is_stripped=True)
    )
    newline = [CARD_LLAVA.format(newline=NEWLINE_TEXT)] if layout == "llava" else []
    what = [CARD_TEXT.format(size=language["hidden_size"], layers=language["num_hidden_layers"]), *newline, *notes]
    header, tags = ["pipeline_tag: feature-extraction"], ["llave", layout]
    if layout in TOKENS:
        header.insert(0, "library_name: transformers")
    if layout in TOKENS and not notes:
        tags.append("sentence-transformers")
        template = used_template(chat_templates(out))
        is_own = template is not None and prompt_of_template(template) == prompt
        embed = how_to_embed(text, config["architectures"][0], VERSIONS, is_own, training_config)
    else:
        embed = [*([CARD_QWEN, ""] if layout == "llava_qwen" else []), *steps_to_embed(text)]
    return model_card(header, base_model(source, BASE_OWNERS, training_config), tags, what, embed)

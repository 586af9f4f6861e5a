"""The files beside the weights in a Hugging Face folder: config.json, tokenizer, processor, model card.

hf_config.py makes the config.json that is written here. An export writes these files last; an import keeps those that a
later export gives back. Tensors are not read or written here.

Sources of the formats: transformers' processing_llava_onevision.py, image_processing_llava_onevision.py and
tokenization_qwen2.py; the folders of llava-hf.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_llave.config.model import ModelConfig
from megatron_llave.data.tokenizer import END_TOKENS, TOKENIZERS, load_tokenizer
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json, write_json
from megatron_llave.models.llava_onevision.prompt import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, QWEN_HEAD, QWEN_TAIL

TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
CHAT_TEMPLATES = ("chat_template.json", "chat_template.jinja")
SIDE_FILES = (*TOKENIZER_FILES, *CHAT_TEMPLATES, "generation_config.json", "video_preprocessor_config.json")
"""Files of a folder that are kept beside config.json. The files of the image processor are written anew, so that they
always agree with config.json."""

# How Qwen2's tokenizer cuts text before the byte pairs are joined.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

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

BASE_OWNERS = r"(llava-hf|lmms-lab|BAAI|zhibinlan)/[\w.-]+"  # an `_name_or_path` of another shape may be a local folder


def keep_side_files(source: str | Path, out: str | Path) -> None:
    """Copy config.json and the SIDE_FILES that exist; make tokenizer.json if only its parts are there.

    Raises:
        CheckpointError: the parts of the tokenizer are damaged.
    """
    source, out = Path(source), Path(out)
    for name in ("config.json", *SIDE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer.json").is_file() and _has_parts(out):
        (out / "tokenizer.json").write_text(make_tokenizer_json(out), encoding="utf-8")


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
        training_config: the run's configuration in YAML, for the card; None: the weights were not trained by a run.

    Returns:
        A sentence for each thing that the folder lacks; the card says the same.

    Raises:
        CheckpointError: a file of the source is damaged, or its tokenizer and config.json contradict each other.
    """
    out = Path(out)
    if source is not None:
        keep_side_files(source, out)
    write_json(out / "config.json", config)
    if not (out / "generation_config.json").is_file():
        language = config.get("text_config") or config
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: language[key] for key in keys if language.get(key) is not None}
        write_json(out / "generation_config.json", generation)
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
        _add_image_tokens(out, config)
        _write_processor(out, config)
    else:
        notes.append("There is no tokenizer.json, so transformers cannot make a processor of this folder.")
    if has_tokenizer:
        _write_chat_template(out, layout, _is_plain(training_config), is_trained)
    card = _model_card(layout, config, training_config, notes, _base_model(source))
    (out / "README.md").write_text(card, encoding="utf-8")
    return notes


def room_for_image_tokens(model: ModelConfig, layout: str, folder: Path | None) -> ModelConfig:
    """`model` with a vocabulary that has rows for <image> and <video>, two tokens that transformers' layout needs.

    An embedding cut to the tokenizer's size, as the official LLaVE repository cuts it in memory, has none left; rows of
    zeros are added to it. They are never used: visual tokens take their place.

    Args:
        model: sizes of the weights.
        layout: llava_onevision, or llava_qwen, which needs no such rows.
        folder: has the tokenizer, if there is one.

    Raises:
        CheckpointError: the tokenizer is damaged.
    """
    file = None if folder is None else folder / "tokenizer.json"
    if layout != "llava_onevision" or file is None or not file.is_file():
        return model
    try:
        ids = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{file} is not a readable tokenizer.json: {' '.join(str(error).split())}") from error
    new = sum(token not in ids for token in ("<image>", "<video>"))
    rows = max(model.language.vocab_size, max(ids.values()) + 1 + new)
    return replace(model, language=replace(model.language, vocab_size=rows))


def make_tokenizer_json(folder: str | Path) -> str:
    """Return the tokenizer.json (Qwen2's byte-level BPE) of a folder that has only vocab.json and merges.txt.

    Its special tokens come from added_tokens_decoder in tokenizer_config.json, and from added_tokens.json.

    Raises:
        CheckpointError: a file is missing or damaged, or two tokens have one id.
    """
    folder = Path(folder)
    vocab, merges = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    try:
        model = Tokenizer(models.BPE(*models.BPE.read_file(vocab, merges)))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        why = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: no tokenizer can be made of vocab.json and merges.txt: {why}") from error
    model.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    spec = json.loads(model.to_str())
    for name in ("tokenizer_config.json", "added_tokens.json"):
        if (folder / name).is_file():
            _add_tokens(spec, listed_tokens(folder / name), folder / "vocab.json", name)
    return json.dumps(spec, ensure_ascii=False, indent=2)


def listed_tokens(file: Path) -> list[dict]:
    """Return the added tokens that tokenizer_config.json or added_tokens.json lists, each with its id.

    Raises:
        CheckpointError: the file is damaged.
    """
    values = read_json(file, error=CheckpointError)
    try:
        if file.name == "added_tokens.json":
            listed = [(token_id, {"content": content}) for content, token_id in values.items()]
        else:
            listed = (values.get("added_tokens_decoder") or {}).items()
        tokens = [{**SPECIAL_TOKEN, **token, "id": int(i)} for i, token in listed]
        _require_tokens(tokens)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file} has no list of added tokens that can be read: {error!r}") from error
    return tokens


def _require_tokens(tokens: Any) -> None:
    """Raise a KeyError or TypeError unless these are a list of tokens, each with a text and an id."""
    for token in tokens:
        if not isinstance(token["content"], str) or not isinstance(token["id"], int):
            raise TypeError(f"the token {token} has no content or no id")


def _add_tokens(spec: dict, tokens: list[dict], file: Path, says: str) -> bool:
    """Add special tokens to the content of a tokenizer.json; return False if all of them were there already.

    `file` has the other tokens and `says` is the file that lists these, for the message if an id is taken.
    """
    present = {token["content"] for token in spec["added_tokens"]}
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    owners = {token_id: content for content, token_id in ids.items()}
    new = sorted((token for token in tokens if token["content"] not in present), key=lambda token: token["id"])
    for token in tokens:
        content, wanted = token["content"], token["id"]
        right = f"'{content}' must have the id {wanted}, as {says} says"
        if ids.get(content, wanted) != wanted:
            raise CheckpointError(f"{file}: {right}, but has {ids[content]}")
        if owners.setdefault(wanted, content) != content:
            raise CheckpointError(f"{file}: {right}, but that is '{owners[wanted]}'")
    for token in new:
        # The library numbers added tokens from the vocabulary's size on, so that after a gap the id can only be given
        # in the vocabulary.
        if token["id"] != len(ids) or max(ids.values(), default=-1) + 1 != len(ids):
            spec["model"]["vocab"][token["content"]] = token["id"]
        ids[token["content"]] = token["id"]
    spec["added_tokens"] = sorted(spec["added_tokens"] + new, key=lambda token: token["id"])
    return bool(new)


def _add_image_tokens(out: Path, config: dict) -> None:
    """Make <image> and <video> special tokens with the ids of config.json, in every file that lists such tokens."""
    ids = {"<image>": config["image_token_index"], "<video>": config["video_token_index"]}
    spec = read_json(out / "tokenizer.json", error=CheckpointError)
    try:
        _require_tokens(spec["added_tokens"])
        _require_tokens({"content": content, "id": token_id} for content, token_id in spec["model"]["vocab"].items())
    except (AttributeError, KeyError, TypeError) as error:
        kind = "it has no added_tokens or no vocabulary with ids"
        raise CheckpointError(
            f"{out / 'tokenizer.json'} cannot take <image> as a token: {kind}; BPE has them"
        ) from error
    tokens = [{"id": token_id, "content": content, **SPECIAL_TOKEN} for content, token_id in ids.items()]
    if _add_tokens(spec, tokens, out / "tokenizer.json", "config.json"):
        write_json(out / "tokenizer.json", spec)
    known = {token["content"] for token in spec["added_tokens"]}
    file = out / "tokenizer_config.json"
    settings = read_json(file, error=CheckpointError) if file.is_file() else _tokenizer_config(known)
    if isinstance(settings.get("added_tokens_decoder"), dict):
        for content, token_id in ids.items():
            settings["added_tokens_decoder"].setdefault(str(token_id), {"content": content, **SPECIAL_TOKEN})
    write_json(file, settings | {"processor_class": "LlavaOnevisionProcessor"})
    if (out / "added_tokens.json").is_file():
        write_json(out / "added_tokens.json", read_json(out / "added_tokens.json", error=CheckpointError) | ids)


def _tokenizer_config(known: set[str]) -> dict:
    """Return a tokenizer_config.json for a tokenizer.json without one, with the special tokens that it has."""
    ends = [token for token in END_TOKENS if token in known]
    end = {"eos_token": ends[0], "pad_token": ends[-1]} if ends else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **end}


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


def _write_chat_template(out: Path, layout: str, is_plain: bool, is_trained: bool) -> None:
    """Write the prompt as the chat template of the processor and of the tokenizer, unless another one is kept."""
    settings_file, template = out / "tokenizer_config.json", CHAT_TEMPLATE
    if is_plain:
        end = load_tokenizer(out / "tokenizer.json").eos_id
        token = Tokenizer.from_file(str(out / "tokenizer.json")).id_to_token(end)
        template = PLAIN_CHAT_TEMPLATE.replace("END", repr(token))
    has_file = any((out / name).is_file() for name in CHAT_TEMPLATES)
    if layout == "llava_onevision" and not has_file:
        write_json(out / "chat_template.json", {"chat_template": template})  # the name that all versions read
    if settings_file.is_file():
        settings = read_json(settings_file, error=CheckpointError)
    else:
        settings = _tokenizer_config(set(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()))
    if is_trained or "chat_template" not in settings and (layout == "llava_onevision" or not has_file):
        write_json(settings_file, settings | {"chat_template": template})


def _is_plain(training_config: str | None) -> bool:
    """Whether the weights were trained with data.prompt=plain."""
    return training_config is not None and OmegaConf.select(OmegaConf.create(training_config), "data.prompt") == "plain"


def _model_card(layout: str, config: dict, training_config: str | None, notes: list[str], base: str | None) -> str:
    """Return README.md: the header for the hub, what the model is, how to embed with it, and how it was trained."""
    language = config.get("text_config") or config
    header = ["library_name: transformers"] if layout == "llava_onevision" else []
    header += ["pipeline_tag: feature-extraction"]
    header += [f"base_model: {base}"] if base else []
    header += ["tags:", "- embedding", "- multimodal", "- llave", f"- {layout}"]
    lines = ["---", *header, "---", "", "# Multimodal embedding model", ""]
    lines += [CARD_TEXT.format(size=language["hidden_size"], layers=language["num_hidden_layers"]), *notes, ""]
    lines += ["## How to embed", ""]
    if _is_plain(training_config):
        lines += [CARD_PLAIN]
    elif layout == "llava_qwen" or notes:
        reason = [CARD_QWEN, ""] if layout == "llava_qwen" else []
        lines += [*reason, CARD_STEPS.format(head=QWEN_HEAD, tail=QWEN_TAIL)]
    else:
        lines += [CARD_EMBED, "", "```python", CARD_CODE.format(head=QWEN_HEAD, tail=QWEN_TAIL), "```"]
    lines += ["", "## Training", ""]
    if training_config is None:
        lines += ["Converted, not trained: the weights are those the conversion started from."]
    else:
        lines += ["Trained by megatron_llave with this configuration:", "", "```yaml", training_config.strip(), "```"]
    return "\n".join(lines) + "\n"


def _base_model(source: str | Path | None) -> str | None:
    """Return the hub name of the model that the source was made from, according to its config.json."""
    file = None if source is None else Path(source) / "config.json"
    name = read_json(file, error=CheckpointError).get("_name_or_path") if file is not None and file.is_file() else None
    return name if re.fullmatch(BASE_OWNERS, str(name)) else None


def _has_parts(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))

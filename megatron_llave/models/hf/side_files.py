"""The files beside the weights that all families have: tokenizer, chat template and generation settings.

An import keeps those that a later export gives back. The families say what their own files hold.

Sources of the formats: transformers' tokenization_qwen2.py and tokenization_utils_base.py.
"""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_llave.config.model import ModelConfig
from megatron_llave.data.tokenizer import END_TOKENS, TOKENIZERS, load_tokenizer, tokenizer_in
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json, write_json
from megatron_llave.models.hf.sentencepiece_json import tokenizer_json

SENTENCEPIECE = TOKENIZERS[1]
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
CONTENT_IN_PARTS = "{% for message in messages %}{% for part in message['content'] %}{% endfor %}{% endfor %}"
"""At the beginning of each template that is written, without effect on what it makes: by such a loop vLLM sees that a
template takes messages whose content is in parts. Into others it writes images as text, in its own way."""
SPECIAL_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def keep_side_files(source: str | Path, out: str | Path, names: Sequence[str] = SIDE_FILES) -> None:
    """Copy config.json and those of `names` that exist; make tokenizer.json if only its parts are there.

    Raises:
        CheckpointError: the parts of the tokenizer are damaged.
    """
    source, out = Path(source), Path(out)
    for name in ("config.json", *names):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer.json").is_file() and all((out / name).is_file() for name in ("vocab.json", "merges.txt")):
        (out / "tokenizer.json").write_text(make_tokenizer_json(out), encoding="utf-8")


def replace_sentencepiece(out: Path) -> None:
    """Replace a SentencePiece model that is the only tokenizer of a folder by a tokenizer.json with the same ids.

    A model that a tokenizer.json cannot express stays.
    """
    file = out / SENTENCEPIECE
    text = None if (out / "tokenizer.json").is_file() or not file.is_file() else tokenizer_json(file)
    if text is not None:
        (out / "tokenizer.json").write_text(text, encoding="utf-8")
        file.unlink()


def write_generation_config(out: Path, language: Mapping[str, Any]) -> None:
    """Write generation_config.json with the token ids of the decoder's section, unless the file is kept."""
    if not (out / "generation_config.json").is_file():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: language[key] for key in keys if language.get(key) is not None}
        write_json(out / "generation_config.json", generation)


def room_for_tokens(model: ModelConfig, folder: Path | None, tokens: Collection[str]) -> ModelConfig:
    """`model` with a vocabulary that has rows for the tokenizer and for special tokens that transformers needs.

    An embedding cut to the tokenizer's size, as the official LLaVE repository cuts it in memory, has none left; rows of
    zeros are added to it. They are never used: visual tokens take their place.

    Args:
        model: sizes of the weights.
        folder: has the tokenizer, if there is one.
        tokens: the special tokens.

    Raises:
        CheckpointError: the tokenizer is damaged.
    """
    file = None if folder is None else tokenizer_in(folder)
    text = tokenizer_json(file) if file is not None and file.name == SENTENCEPIECE else None
    if file is None or file.name == SENTENCEPIECE and text is None:
        return model
    try:
        ids = (Tokenizer.from_file(str(file)) if text is None else Tokenizer.from_str(text)).get_vocab()
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{file} is not a readable tokenizer.json: {' '.join(str(error).split())}") from error
    new = sum(token not in ids for token in tokens)
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


def vocabulary(spec: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the pieces of a tokenizer.json, but for added tokens.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it has none.
    """
    pieces = spec["model"]["vocab"]
    if isinstance(pieces, list):  # unigram: pieces and scores
        return {piece: i for i, (piece, _) in enumerate(pieces)}
    return dict(pieces.items())


def _add_tokens(spec: dict, tokens: list[dict], file: Path, says: str) -> bool:
    """Add special tokens to the content of a tokenizer.json; return False if all of them were there already.

    `file` has the other tokens and `says` is the file that lists these, for the message if an id is taken.
    """
    present = {token["content"] for token in spec["added_tokens"]}
    ids = vocabulary(spec) | {token["content"]: token["id"] for token in spec["added_tokens"]}
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
            if isinstance(spec["model"]["vocab"], list):
                what = f"its vocabulary of {len(ids)} ids is a list, which can have no gap"
                names = ", ".join(token["content"] for token in tokens)
                raise CheckpointError(f"{file} cannot take {names} as tokens: {what}")
            spec["model"]["vocab"][token["content"]] = token["id"]
        ids[token["content"]] = token["id"]
    spec["added_tokens"] = sorted(spec["added_tokens"] + new, key=lambda token: token["id"])
    return bool(new)


def add_special_tokens(out: Path, ids: Mapping[str, int], processor: str) -> None:
    """Make special tokens with these ids, in every file that lists such tokens.

    Args:
        out: folder with a tokenizer.json.
        ids: token -> its id.
        processor: the class that AutoProcessor makes of the folder.

    Raises:
        CheckpointError: the tokenizer is damaged, or a token or an id is taken.
    """
    spec = read_json(out / "tokenizer.json", error=CheckpointError)
    try:
        _require_tokens(spec["added_tokens"])
        _require_tokens({"content": content, "id": token_id} for content, token_id in vocabulary(spec).items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        kind = "it has no added_tokens or no vocabulary with ids"
        raise CheckpointError(
            f"{out / 'tokenizer.json'} cannot take {next(iter(ids))} as a token: {kind}; BPE and unigram have them"
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
    write_json(file, settings | {"processor_class": processor})
    if (out / "added_tokens.json").is_file():
        write_json(out / "added_tokens.json", read_json(out / "added_tokens.json", error=CheckpointError) | ids)


def _tokenizer_config(known: set[str]) -> dict:
    """Return a tokenizer_config.json for a tokenizer.json without one, with the special tokens that it has."""
    ends = [token for token in END_TOKENS if token in known]
    end = {"eos_token": ends[0], "pad_token": ends[-1]} if ends else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **end}


def end_of_sequence(folder: Path) -> str:
    """Return the text of the token that ends a sequence, with which data.prompt=plain ends an input."""
    end = load_tokenizer(folder / "tokenizer.json").eos_id
    return Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(end)


def without_appended(spec: Mapping[str, Any], token: str) -> Any:
    """Return the post_processor of a tokenizer.json without the step that only appends `token` to a text.

    The step is a TemplateProcessing, alone or in a Sequence; None: nothing else is left. What does anything more to a
    text stays.
    """
    processor = spec.get("post_processor")
    inner = processor.get("processors") if isinstance(processor, dict) else None
    if not isinstance(inner, list):
        return None if _appends(processor, token, spec) else processor
    kept = [step for step in inner if not _appends(step, token, spec)]
    return processor if len(kept) == len(inner) else processor | {"processors": kept} if kept else None


def _appends(step: Any, token: str, spec: Mapping[str, Any]) -> bool:
    try:
        text, added = step["single"]
        ids = [known["id"] for known in spec["added_tokens"] if known["content"] == token]
        is_token = added["SpecialToken"]["id"] == token and step["special_tokens"][token]["ids"] == ids
        return step["type"] == "TemplateProcessing" and "Sequence" in text and is_token
    except (KeyError, TypeError, ValueError):
        return False


def write_chat_template(out: Path, template: str, has_processor: bool, is_trained: bool) -> None:
    """Write the prompt as the chat template of the processor and of the tokenizer, unless another one is kept.

    Args:
        out: folder with a tokenizer.json.
        template: the prompt in Jinja.
        has_processor: whether the layout has a processor, whose template wins over the tokenizer's.
        is_trained: whether a run trained the weights, so that no other template may be kept in the tokenizer's file.
    """
    settings_file = out / "tokenizer_config.json"
    template = CONTENT_IN_PARTS + template
    has_file = any((out / name).is_file() for name in CHAT_TEMPLATES)
    if has_processor and not has_file:
        write_json(out / "chat_template.json", {"chat_template": template})  # the name that all versions read
    if settings_file.is_file():
        settings = read_json(settings_file, error=CheckpointError)
    else:
        settings = _tokenizer_config(set(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()))
    if is_trained or "chat_template" not in settings and (has_processor or not has_file):
        write_json(settings_file, settings | {"chat_template": template})

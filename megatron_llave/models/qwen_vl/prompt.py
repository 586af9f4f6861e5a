"""Prompts of the Qwen-VL families: from a text, images and videos to token ids, with IMAGE for what is seen.

`qwen` is the chat template of the released models, whose assistant's turn is one newline, as for LLaVA-OneVision; the
pooled last token is the newline after it. `plain`, for small models that are trained from scratch, is images, text and
the end-of-sequence token. The others are those of released embedding models:

- `vlm2vec_v2` (TIGER-AI-Lab/VLM2Vec 6e1e1d4, src/model/processor.py and src/model/model.py): the text as it is, without
  chat turns and without <|vision_start|>; the last token of the text is pooled. Its code finds images by
  <|vision_start|> when it makes positions, so that visual tokens count like text.
- `gme` (gme_inference.py of Alibaba-NLP/gme-Qwen2-VL-2B-Instruct, which VLM2Vec has in
  src/model/baseline_backbone/gme): the instruction is the system message; <|endoftext|> is pooled.
- `qwen3_vl_embedding` (QwenLM/Qwen3-VL-Embedding 8ce3aab, src/models/qwen3_vl_embedding.py): the instruction is the
  system message, and gets a full stop where it ends without punctuation. Its code ends the prompt with the beginning of
  the assistant's turn, and leaves the token that is pooled to the tokenizer: <|endoftext|>, section 2 of its report.

The instruction of an input, for the last two, is the rest of its first line where that begins with "Instruct:".
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llave.data.packing import IMAGE
from megatron_llave.data.placeholders import PLACEHOLDER, count_placeholders
from megatron_llave.data.prompt import fit_to_length, join_at_images, split_at_images
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.errors import ConfigError, DataError

IMAGE_TEXT = "<image>"
START, END = "<|vision_start|>", "<|vision_end|>"
_INSTRUCTION = re.compile(r"Instruct:[ \t]*(.*?)[ \t\r]*(?:\n|\Z)")


@dataclass(frozen=True)
class Template:
    """A prompt: a system turn where there is a system message, the user's turn, and what closes it."""

    system: str | None = None
    """The system message of inputs without an instruction; None: there is no system turn."""
    tail: str | None = None
    """What follows the user's content; None: the end-of-sequence token."""
    is_chat: bool = True
    """Whether the user's content is in a turn, and images are between <|vision_start|> and <|vision_end|>."""
    takes_instruction: bool = False
    """Whether the instruction of an input takes the place of the system message. Images then stand directly before the
    text, without the line end after a leading placeholder."""
    ends_instruction: bool = False
    """Whether an instruction gets a full stop where it ends without punctuation."""
    after_images: str = ""
    """What separates each image that has no placeholder from what follows it."""
    has_image_positions: bool = True
    """Whether visual tokens have the positions of rows and columns; otherwise they count like text."""


PLAIN = Template(is_chat=False)
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def templates(system: str | None) -> dict[str, Template]:
    """Return the prompts by value of data.prompt, given the system message of the family's chat template, if any."""
    return {
        "qwen": Template(system, f"{_ASSISTANT}\n<|im_end|>\n"),
        "plain": PLAIN,
        "vlm2vec_v2": Template(tail="", is_chat=False, after_images=" ", has_image_positions=False),
        "gme": Template("You are a helpful assistant.", f"{_ASSISTANT}<|endoftext|>", takes_instruction=True),
        "qwen3_vl_embedding": Template(
            "Represent the user's input.",
            f"{_ASSISTANT}<|endoftext|>",
            takes_instruction=True,
            ends_instruction=True,
        ),
    }


def require_special_tokens(template: Template, tokenizer: Tokenizer, source: object) -> None:
    """Raise a ConfigError if a special token of a template is none of the tokenizer, whose file is `source`."""
    texts = f"<|im_start|>{template.system or ''}{START}{END}{template.tail}" if template.is_chat else ""
    for token in re.findall(r"<\|\w+\|>", texts):
        if len(tokenizer.encode(token)) != 1:
            raise ConfigError(f"{source} has no token {token}, which data.prompt needs; set data.prompt=plain")


def user_content(text: str, media: Sequence[str], template: Template) -> str:
    """Return the user's content, in which <image> stands for each image or pair of frames.

    Args:
        text: with placeholders, or without: an image without one comes first.
        media: what is written for each image or video: <image>, perhaps with time stamps.
        template: of the prompt.

    Raises:
        DataError: the text has more placeholders than there are images.
    """
    written = count_placeholders(text)
    if written > len(media):
        what = f"text has {written} image placeholders for {len(media)} images: {text[:60]!r}"
        raise DataError(f"{what}; a backslash before a placeholder makes it ordinary text: \\{IMAGE_TEXT}")
    if template is PLAIN:
        return "".join(media) + PLACEHOLDER.sub("", text).strip()
    first = len(media) - written
    waiting = iter(media[first:])
    if template.takes_instruction:
        text = re.sub(rf"\A((?:{PLACEHOLDER.pattern})+)\n", r"\1", text)
    placed = PLACEHOLDER.sub(lambda _: next(waiting), text)
    return template.after_images.join(filter(None, [*media[:first], placed]))


def encode_prompt(
    text: str, media: Sequence[str], tokenizer: Tokenizer, template: Template, max_length: int, visual_tokens: int
) -> list[int]:
    """Return the token ids of one sequence, with IMAGE once per image, or per pair of frames that has a time stamp.

    `visual_tokens` is the number of tokens that all IMAGEs together expand to. If the expanded sequence is longer than
    `max_length`, the user's text is cut at its end; the instruction, images and the end of the template stay.

    Raises:
        DataError: even an empty text does not fit, or the text has more placeholders than there are images.
    """
    instruction = None
    if template.takes_instruction:
        found = _INSTRUCTION.match(text)
        instruction = found[1] if found else None
        text = text[found.end() :] if found else text
    pieces, encode = split_at_images(user_content(text, media, template), tokenizer)
    head, user = _head(template, instruction, tokenizer)
    pieces[0] = user + pieces[0]
    around = [tokenizer.encode(token) for token in (START, END)] if template.is_chat else [[], []]
    body = join_at_images([encode(piece) for piece in pieces], [*around[0], IMAGE, *around[1]])
    # A line end at the beginning of the text is one token with that of "user\n", and is never cut.
    num_user = len(tokenizer.encode(user))
    tail = [tokenizer.eos_id] if template.tail is None else tokenizer.encode(template.tail)
    kept = {IMAGE, *around[0], *around[1]}
    head, body = head + body[:num_user], body[num_user:]
    return fit_to_length(head, body, tail, visual_tokens, max_length, kept, " or lower data.max_pixels")


def _head(template: Template, instruction: str | None, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Return the ids before the user's turn, and the text with which that begins after a special token."""
    if not template.is_chat:
        return [], ""
    opening = tokenizer.encode("<|im_start|>")
    if template.system is None:
        return opening, "user\n"
    if instruction and template.ends_instruction and not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    [message, *more], encode = split_at_images(instruction or template.system, tokenizer)
    if more:
        raise DataError(f"the instruction {instruction[:60]!r} has an image placeholder; images belong into the text")
    return [*opening, *encode(f"system\n{message}"), *tokenizer.encode("<|im_end|>\n<|im_start|>")], "user\n"

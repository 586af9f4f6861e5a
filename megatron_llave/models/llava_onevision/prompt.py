"""Prompts: from a text and its number of images to token ids, with one IMAGE id for all visual tokens of an image.

There are two templates: `qwen` of the released models, in which the pooled last token is the newline after the final
<|im_end|>, and `plain` for small models that are trained from scratch. packing.py expands IMAGE.
"""

from megatron_llave.data.packing import IMAGE
from megatron_llave.data.placeholders import PLACEHOLDER, count_placeholders, split_literals
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.errors import DataError

IMAGE_TEXT = "<image>"
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_HEAD = f"{QWEN_SYSTEM}<|im_start|>user\n"
QWEN_TAIL = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"


def user_content(text: str, num_images: int) -> str:
    """Return the user turn as the official repository writes it: placeholders are <image>, a single one comes first.

    An image without a placeholder gets one at the front. If the only placeholder is already first, the text after it
    stays as it is; if it is moved, the remaining text loses its surrounding white space.

    Raises:
        DataError: the text has more placeholders than there are images.
    """
    content = PLACEHOLDER.sub(IMAGE_TEXT, text)
    written = count_placeholders(content)
    if written > num_images:
        what = f"text has {written} image placeholders for {num_images} images: {text[:60]!r}"
        raise DataError(f"{what}; a backslash before a placeholder makes it ordinary text: \\{IMAGE_TEXT}")
    if written == 1 and not content.startswith(IMAGE_TEXT):
        content = f"{IMAGE_TEXT}\n{PLACEHOLDER.sub('', content).strip()}".strip()
    return f"{IMAGE_TEXT}\n" * (num_images - written) + content


def qwen_prompt(content: str) -> str:
    """Return the chat template of the released models around a user turn; the assistant's turn is one newline."""
    return QWEN_HEAD + content + QWEN_TAIL


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text without placeholders, in which marks behind a backslash are ordinary text."""
    return [token for piece in split_literals(text) for token in tokenizer.encode(piece)]


def encode_prompt(
    text: str, num_images: int, tokenizer: Tokenizer, template: str, max_length: int, visual_tokens: int
) -> list[int]:
    """Return the token ids of one sequence, with IMAGE once per image.

    `visual_tokens` is the number of tokens that all IMAGEs together expand to. If the expanded sequence is longer than
    `max_length`, the user's text is cut at its end; images and the end of the template stay. (The official repository
    cuts the expanded sequence at its end, so that the pooled token is then one of the text or of an image.)

    Raises:
        DataError: even an empty text does not fit, or the text has more placeholders than there are images.
    """
    if template == "plain":
        words = encode_text(PLACEHOLDER.sub("", text).strip(), tokenizer)
        head, tail = [], [tokenizer.eos_id]
        body = [IMAGE] * num_images + words
    else:
        pieces = PLACEHOLDER.split(qwen_prompt(user_content(text, num_images)))
        ids = encode_text(pieces[0], tokenizer)
        for piece in pieces[1:]:
            ids += [IMAGE, *encode_text(piece, tokenizer)]
        if len(ids) - num_images + visual_tokens <= max_length:
            return ids
        # Special tokens bound what the tokenizer joins, so the tail's ids do not depend on the text before them.
        num_head, num_tail = len(tokenizer.encode(QWEN_HEAD)), len(tokenizer.encode(QWEN_TAIL))
        head, body, tail = ids[:num_head], ids[num_head:-num_tail], ids[-num_tail:]
    fixed = len(head) + len(tail) + visual_tokens
    if fixed > max_length:
        raise DataError(
            f"{visual_tokens} visual tokens and {len(head) + len(tail)} of the prompt template exceed "
            f"data.max_length={max_length}; raise it to at least {fixed}"
        )
    room = max_length - fixed
    return head + (body if len(body) - num_images <= room else _keep_text(body, room)) + tail


def _keep_text(ids: list[int], room: int) -> list[int]:
    """Return every IMAGE, and the first `room` of the other ids."""
    kept = []
    for token in ids:
        if token == IMAGE:
            kept.append(token)
        elif room > 0:
            kept.append(token)
            room -= 1
    return kept

"""Prompts: from a text and its number of images to token ids, with one IMAGE id for all visual tokens of an image.

There are two templates: `qwen` of the released models, in which the pooled last token is the newline after the final
<|im_end|>, and `plain` for small models that are trained from scratch. packing.py expands IMAGE.
"""

import re

from megatron_llave.data.packing import IMAGE
from megatron_llave.data.placeholders import PLACEHOLDER, count_placeholders
from megatron_llave.data.prompt import fit_to_length, join_at_images, split_at_images
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.errors import DataError
from megatron_llave.models.hf.sentence_transformers_files import PARTS, refuse_images

IMAGE_TEXT = "<image>"
NEWLINE_TEXT = "<image_newline>"
IMAGE_AND_NEWLINE = IMAGE_TEXT + NEWLINE_TEXT
"""What stands for an image in a folder of the layout llava, whose token <image> is one tile."""
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_USER = "user\n"
QWEN_HEAD = f"{QWEN_SYSTEM}<|im_start|>{QWEN_USER}"
QWEN_ASSISTANT = "<|im_start|>assistant\n\n<|im_end|>\n"
QWEN_TAIL = f"<|im_end|>\n{QWEN_ASSISTANT}"
TOO_MANY_IMAGES = (
    "transformers does not cut several images of one input into tiles as in training; give one image in each input"
)

# The same prompts as Jinja templates, for apply_chat_template of transformers. A user's message alone is the whole
# input of an embedding, so the assistant's turn is always closed after it: the last token is the one that is pooled,
# with or without add_generation_prompt.
_IMAGES_AND_TEXT = (
    "{% set content = message['content'] %}"
    "{% set parts = [] if content is string else content %}"
    "{% set num_images = parts | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set num_videos = parts | selectattr('type', 'equalto', 'video') | list | length %}"
    "{% set text = content if content is string else"
    " parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
)
_QWEN_CONTENT = "'<image>\n' * (num_images - written) + '<video>\n' * num_videos + text"
_PLACE_FIRST = (
    "{% set written = text.count('<image>') %}"
    "{% if written == 1 and not text.startswith('<image>') %}"
    "{% set text = ('<image>\n' + text.replace('<image>', '').strip()).strip() %}"
    "{% endif %}"
)
_PLAIN_CONTENT = "'<image>' * images + '<video>' * num_videos + text.replace('<image>', '').strip()"
_PLAIN_IMAGES = "{% set images = [num_images, text.count('<image>')] | max %}"


def chat_template(prompt: str, end: str, image: str = IMAGE_TEXT) -> str:
    """Return a prompt as a Jinja template.

    Args:
        prompt: qwen or plain.
        end: the tokenizer's end-of-sequence token.
        image: what stands for an image in what the tokenizer reads.
    """
    if prompt == "plain":
        rendered = f"{_PLAIN_IMAGES}{{{{ {_with_image(_PLAIN_CONTENT, image)} }}}}"
        return f"{{% for message in messages %}}{_IMAGES_AND_TEXT}{rendered}{{% endfor %}}{{{{ {end!r} }}}}"
    return (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        f"{{{{ {QWEN_SYSTEM!r} }}}}"
        "{% endif %}"
        f"{_IMAGES_AND_TEXT}"
        f"{_PLACE_FIRST}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        f"{{{{ {_with_image(_QWEN_CONTENT, image)} }}}}"
        "{{ '<|im_end|>\n' }}"
        "{% if loop.last and message['role'] == 'user' %}"
        f"{{{{ {QWEN_ASSISTANT!r} }}}}"
        "{% endif %}"
        "{% endfor %}"
    )


def sentence_transformers_template(
    prompt: str, end: str, image: str = IMAGE_TEXT, most_images: int | None = None
) -> str:
    """Return a prompt as the template of sentence-transformers: of its prompt, the images and the text of an input.

    Args:
        prompt: qwen or plain.
        end: the tokenizer's end-of-sequence token.
        image: what stands for an image in what the tokenizer reads.
        most_images: number of images that transformers makes the tokens of training of; None: of any.
    """
    counts = (
        "{% set text = ns.instruction + ns.text %}"
        "{% set num_images = ns.images | select('equalto', 'image') | list | length %}"
        "{% set num_videos = ns.images | select('equalto', 'video') | list | length %}"
    )
    if most_images is not None:
        counts += refuse_images(most_images, TOO_MANY_IMAGES)
    if prompt == "plain":
        return f"{PARTS}{counts}{_PLAIN_IMAGES}{{{{ {_with_image(_PLAIN_CONTENT, image)} + {end!r} }}}}"
    rendered = f"{QWEN_HEAD!r} + {_with_image(_QWEN_CONTENT, image)} + {QWEN_TAIL!r}"
    return f"{PARTS}{counts}{_PLACE_FIRST}{{{{ {rendered} }}}}"


def _with_image(expression: str, image: str) -> str:
    return expression if image == IMAGE_TEXT else f"({expression}).replace({IMAGE_TEXT!r}, {image!r})"


def prompt_of_template(template: str) -> str | None:
    """Return the prompt that a chat template is that of, with any end-of-sequence token; None: of none."""
    unknown = "<|end|>"
    for prompt in ("qwen", "plain"):
        for image in (IMAGE_TEXT, IMAGE_AND_NEWLINE):
            pattern = re.escape(chat_template(prompt, unknown, image)).replace(re.escape(repr(unknown)), "'[^']*'")
            if re.fullmatch(pattern, template):
                return prompt
    return None


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
        pieces, encode = split_at_images(PLACEHOLDER.sub("", text).strip(), tokenizer)
        head, body, tail = [], [IMAGE] * num_images + encode(pieces[0]), [tokenizer.eos_id]
    else:
        ids = _encode_qwen(user_content(text, num_images), tokenizer)
        if len(ids) - num_images + visual_tokens <= max_length:
            return ids
        # Special tokens bound what the tokenizer joins, so the tail's ids do not depend on the text before them.
        num_head, num_tail = len(tokenizer.encode(QWEN_HEAD)), len(tokenizer.encode(QWEN_TAIL))
        head, body, tail = ids[:num_head], ids[num_head:-num_tail], ids[-num_tail:]
    return fit_to_length(head, body, tail, visual_tokens, max_length)


def _encode_qwen(content: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the chat template around a user turn, with IMAGE for each placeholder."""
    pieces, encode = split_at_images(content, tokenizer)
    if encode == tokenizer.encode:
        pieces[0] = QWEN_HEAD + pieces[0]
        pieces[-1] += QWEN_TAIL
        return join_at_images([encode(piece) for piece in pieces])
    # Special tokens bound what the tokenizer joins: these are the ids of the template with ordinary text in it.
    pieces[0] = QWEN_USER + pieces[0]
    head, tail = tokenizer.encode(QWEN_HEAD.removesuffix(QWEN_USER)), tokenizer.encode(QWEN_TAIL)
    return [*head, *join_at_images([encode(piece) for piece in pieces]), *tail]

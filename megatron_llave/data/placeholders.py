r"""Marks in a text: placeholders that say where an image goes, and special tokens of tokenizers.

A placeholder is <image>, or <|image_1|>, <|image_2|>, ... as in MMEB. Pairs are written with them whatever model is
trained; a family's prompt replaces them. A backslash before a mark, as in \<image>, makes it ordinary text. What users
write goes through `mark_user_text`, so that their texts hold no mark by accident; the texts of MMEB are taken as they
are, as in the official LLaVE repository.
"""

import re

from megatron_llave.errors import DataError

_PLACEHOLDER = r"<image>|<\|image_\d+\|>"
_SPECIAL = r"<video>|<image_newline>|<\|[^<>|\s]+\|>|</?s>|<(?:bos|eos|pad|unk)>"
PLACEHOLDER = re.compile(rf"(?<!\\)(?:{_PLACEHOLDER})")
LEADING_PLACEHOLDERS = re.compile(rf"(?:\s*(?:{_PLACEHOLDER})\s*)*")
MARK = re.compile(rf"{_PLACEHOLDER}|{_SPECIAL}")
_BARE_MARK = re.compile(rf"(?<!\\)(?:{_PLACEHOLDER}|{_SPECIAL})")
_BARE_SPECIAL = re.compile(rf"(?<!\\)(?!{_PLACEHOLDER})(?:{_SPECIAL})")
_ESCAPED = re.compile(rf"\\(?={_PLACEHOLDER}|{_SPECIAL})")


def count_placeholders(text: str) -> int:
    """Image placeholders written in the text."""
    return len(PLACEHOLDER.findall(text))


def remove_placeholders(text: str) -> str:
    """The text as if it had been written without image placeholders.

    Each is removed with the white space after it, one at the end of the text also with that before it.
    """
    before, *rest = PLACEHOLDER.split(text)
    kept = before + "".join(part.lstrip() for part in rest)
    return kept.rstrip() if rest and not rest[-1].strip() else kept


def mark_user_text(text: str, num_images: int) -> str:
    r"""Put a backslash before each mark that a user can only have meant literally; doing it twice changes nothing.

    Special tokens are always literal. Placeholders are literal in a text without images; with images they place them.

    Raises:
        DataError: there are images, but more placeholders than images.
    """
    if num_images == 0:
        return _BARE_MARK.sub(r"\\\g<0>", text)
    written = count_placeholders(text)
    if written > num_images:
        raise DataError(
            f"text has {written} image placeholders for {num_images} images: {text[:60]!r}; write \\<image> where "
            "<image> is literal text"
        )
    return _BARE_SPECIAL.sub(r"\\\g<0>", text)


def has_literals(text: str) -> bool:
    """Whether a mark in the text is escaped by a backslash."""
    return _ESCAPED.search(text) is not None


def unescape(text: str) -> str:
    """The text without the backslash before each escaped mark."""
    return _ESCAPED.sub("", text)

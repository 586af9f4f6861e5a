"""Marks in a text that say where an image goes: <image>, or <|image_1|>, <|image_2|>, ... as in MMEB.

Training pairs are written with them whatever model is trained; a family's prompt replaces them. A backslash before a
mark makes it ordinary text, so that texts about HTML or SVG can be written: `\\<image>`.
"""

import re

_MARK = r"<image>|<\|image_\d+\|>"
PLACEHOLDER = re.compile(rf"(?<!\\)(?:{_MARK})")
_LITERAL = re.compile(rf"\\(?={_MARK})")


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


def split_literals(text: str) -> list[str]:
    """Pieces of a text without placeholders that a tokenizer must encode one by one.

    A mark that a backslash makes ordinary text is cut behind its first character, because the tokenizer of a model may
    know the uncut mark as the special token of an image. The backslash is left out.
    """
    first, *rest = _LITERAL.split(text)  # each of the rest begins with a mark
    starts = [*(part[:1] for part in rest), ""]
    return [body + start for body, start in zip([first, *(part[1:] for part in rest)], starts)]

"""Marks in a text that say where an image goes: <image>, or <|image_1|>, <|image_2|>, ... as in MMEB.

Training pairs are written with them whatever model is trained; a family's prompt replaces them.
"""

import re

PLACEHOLDER = re.compile(r"<image>|<\|image_\d+\|>")


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

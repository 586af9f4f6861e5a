"""What the prompts of all families have in common: token ids of texts with images in them, and the cut to a length."""

import sys
from collections.abc import Callable, Collection, Sequence

from megatron_llave.data.packing import IMAGE
from megatron_llave.data.placeholders import PLACEHOLDER, has_literals, unescape
from megatron_llave.data.tokenizer import Tokenizer
from megatron_llave.errors import DataError

Encode = Callable[[str], list[int]]


def split_at_images(text: str, tokenizer: Tokenizer) -> tuple[list[str], Encode]:
    """Return the pieces of a text between its image placeholders, and what encodes them.

    Marks that a backslash escapes lose it; where the tokenizer would take one for a special token, pieces are encoded
    as ordinary text.
    """
    pieces = [unescape(piece) for piece in PLACEHOLDER.split(text)]
    is_literal = has_literals(text) and any(tokenizer.encode(p) != tokenizer.encode_plain(p) for p in pieces)
    return pieces, tokenizer.encode_plain if is_literal else tokenizer.encode


def join_at_images(encoded: Sequence[list[int]], image: Sequence[int] = (IMAGE,)) -> list[int]:
    """Return the ids of the pieces, with those of an image between every two of them."""
    ids = list(encoded[0])
    for piece in encoded[1:]:
        ids += [*image, *piece]
    return ids


def fit_to_length(
    head: list[int],
    body: list[int],
    tail: list[int],
    visual_tokens: int,
    max_length: int,
    kept: Collection[int] = (IMAGE,),
    remedy: str = "",
) -> list[int]:
    """Return head, body and tail, of which the body's text is cut at its end if the whole exceeds `max_length`.

    Args:
        head: ids of the template before the user's content.
        body: ids of the content.
        tail: ids of the template after it; the last one is pooled.
        visual_tokens: number of tokens that all IMAGEs together expand to.
        max_length: the longest sequence, in tokens, with IMAGEs expanded.
        kept: ids of the body that are never cut.
        remedy: what would be right beside a larger data.max_length, for the message.

    Raises:
        DataError: even an empty text does not fit.
    """
    around_images = sum(token in kept and token != IMAGE for token in body)
    template = len(head) + len(tail) + around_images
    fixed = template + visual_tokens
    if fixed > max_length:
        raise DataError(
            f"{visual_tokens} visual tokens and {template} of the prompt template exceed "
            f"data.max_length={max_length}; raise it to at least {fixed}{remedy}"
        )
    if not fixed and not body:
        raise DataError("the text is empty, and its prompt has no token of its own to pool; give it a text")
    cut, room = [], max_length - fixed
    for token in body:
        if token in kept:
            cut.append(token)
        elif room > 0:
            cut.append(token)
            room -= 1
    return head + cut + tail


def encode_within(
    encode: Callable[[int], list[int]], text: str, added: int, max_length: int, too_long: str
) -> tuple[list[int], bool]:
    """Return the ids of a prompt, and whether its text was cut.

    Args:
        encode: from the longest sequence, in tokens, to the ids of the prompt.
        text: for the message.
        added: number of tokens that expanding all IMAGEs adds.
        max_length: the longest sequence, data.max_length.
        too_long: cut or skip, data.too_long.

    Raises:
        DataError: the text is cut and `too_long` is skip, or what `encode` raises.
    """
    tokens = encode(max_length)
    is_cut = len(tokens) + added == max_length and len(encode(sys.maxsize)) > len(tokens)
    if is_cut and too_long == "skip":
        raise DataError(f"text of {len(text)} characters is beyond data.max_length={max_length} tokens")
    return tokens, is_cut

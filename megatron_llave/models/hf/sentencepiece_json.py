"""A SentencePiece model as a tokenizer.json, which transformers, sentence-transformers and vLLM read.

A run on data of llave prepare has a SentencePiece model. transformers reads such models too, but not without
further packages, and not with special tokens that it lacks. The ids of a text are the same.

Source: transformers' convert_slow_tokenizer.py (SpmConverter, 5.23); sentencepiece_model.proto of SentencePiece 0.2.
"""

from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
UNIGRAM, BPE = 1, 2
PIECE, TRAINER, NORMALIZER = 1, 2, 3
"""Fields of the file."""
PIECE_KIND, OF_THE_USER, UNUSED = 3, 4, 5
"""The field of a piece that says its kind, and kinds that are not known here."""
MODEL_TYPE, RULES, ADD_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 3, 1, 3, 4, 5
"""Fields of the trainer, and of the normalizer."""
DROPPED = "\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f"
SPACES = f"\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029{SPACE}\ufeff\ufffd"
"""The rules nmt_nfkc drop the first, make spaces of the second, and apply NFKC to others, but for KEPT."""
KEPT, STAND_IN = "\uff5e", "\ue0f5"
PROBES = [
    *(f"a{chr(code)}b" for code in (*range(1, 256), *map(ord, SPACES), *range(0x200B, 0x2010), 0x3000, 0xAC00)),
    *(
        KEPT,
        " a  b ",
        "\u1100\u1161",
        "\uff76\uff9e",
        "e\u0301",
        "\ufb01n \u2167",
        "\U0001f469\u200d\U0001f680 \U0001f600",
    ),
]
"""Texts whose ids are compared, because versions of SentencePiece have had other rules under the same name."""


def tokenizer_json(file: Path) -> str | None:
    """Return the content of a tokenizer.json with the same ids.

    Args:
        file: a SentencePiece model.

    Returns:
        JSON; None: the file is no such model, or one of a kind that is not known here: of words or characters, with
        other rules than nmt_nfkc, or without the space before a text.
    """
    data = file.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        top = dict(_fields(data))
        kinds = {dict(_fields(piece)).get(PIECE_KIND) for field, piece in _fields(data) if field == PIECE}
        trainer, normalizer = (dict(_fields(top.get(field, b""))) for field in (TRAINER, NORMALIZER))
    except (IndexError, RuntimeError, ValueError):
        return None
    kind, ids = trainer.get(MODEL_TYPE, UNIGRAM), range(model.get_piece_size())
    is_usual = all(normalizer.get(field, 1) for field in (ADD_PREFIX, REMOVE_SPACES, ESCAPE_SPACES))
    if (
        kind not in (UNIGRAM, BPE)
        or kinds & {OF_THE_USER, UNUSED}
        or normalizer.get(RULES) != b"nmt_nfkc"
        or not is_usual
        or model.eos_id() < 0
    ):
        return None
    tokenizer = Tokenizer(_model(model, kind))
    special = [model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE), decoders.Fuse()])
    is_same = all(tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text) for text in PROBES)
    return tokenizer.to_str(pretty=True) if is_same else None


def _model(model: sentencepiece.SentencePieceProcessor, kind: int) -> models.Model:
    """Return the pieces of a model and how they are joined."""
    ids = range(model.get_piece_size())
    pieces, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
    has_bytes = any(map(model.is_byte, ids))
    if kind == UNIGRAM:
        return models.Unigram(list(zip(pieces, scores)), model.unk_id(), has_bytes)
    usual = [i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[model.unk_id()]
    return models.BPE(
        vocabulary, _merges(pieces, scores, usual), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes
    )


def _normalizer() -> normalizers.Normalizer:
    """Return the rules nmt_nfkc, and what is done to spaces.

    The library's own Precompiled loses a combining character after one that NFKC replaces, and does not compose Korean
    letters. This one differs from SentencePiece where a combining character follows a character that NFKC replaces
    by several, as a ligature: it joins the last of these.
    """
    replace, pattern = normalizers.Replace, Regex
    return normalizers.Sequence(
        [
            replace(pattern(f"[{DROPPED}]"), ""),
            replace(pattern(f"[{SPACES}]"), " "),
            replace(KEPT, STAND_IN),
            normalizers.NFKC(),
            replace(STAND_IN, KEPT),
            replace(pattern(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )


def _merges(pieces: list[str], scores: list[float], usual: list[int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that give a piece, those first that SentencePiece joins first."""
    known = {pieces[i] for i in usual}
    pairs = []
    for index in sorted(usual, key=lambda i: -scores[i]):
        piece = pieces[index]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs += [(left, right) for left, right in splits if left in known and right in known]
    return pairs


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message of Protocol Buffers; fixed sizes are passed over.

    Raises:
        IndexError: the data end in a field.
        ValueError: they are no such message.
    """
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        if key & 7 == 0:
            value, place = _number(data, place)
            yield key >> 3, value
        elif key & 7 == 2:
            size, place = _number(data, place)
            yield key >> 3, data[place : place + size]
            place += size
        elif key & 7 in (1, 5):
            place += 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"a field of kind {key & 7}")


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Return the number that is written at a place in groups of 7 bits, and the place after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place

"""A tokenizer.json that is made of a SentencePiece model gives the same ids, also of texts in other alphabets."""

import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.models.hf.sentencepiece_json import tokenizer_json
from megatron_llave.prepare.tokenizer import train_sentencepiece

PARTS = [
    *(
        "red",
        "square",
        "a",
        "Find an image that",
        "caption:",
        "  ",
        "\t",
        "\n",
        "\u00e9",
        "e\u0301",
        "\ufb01n",
        "\u2167",
    ),
    *(
        "\uff11\uff12",
        "\u4f60\u597d",
        "\U0001f600",
        "\U0001f469\u200d\U0001f680",
        "\u200b",
        "\u00df",
        "\u2026",
        "\u00bd",
    ),
    *(
        "\u3000",
        "\u00a0",
        "-",
        "!",
        "qzx",
        "\uff76\uff9e",
        "\ud55c\uad6d",
        "\u1100\u1161",
        "\uff5e",
        "<image>",
        "\u2581",
    ),
    *("\x07", "\x7f", "\ufffd"),
]
TEXTS = [f"Find an image that matches the caption: a red square {'e' * (i % 5)} {i} caf\u00e9" for i in range(60)]


def trained(kind: str, folder: Path, **options: object) -> Path:
    file = folder / "tokenizer.model"
    file.write_bytes(train_sentencepiece(TEXTS, 320, kind, hard_vocab_limit=False, **options))
    return file


@pytest.mark.parametrize("has_bytes", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_the_same(kind: str, has_bytes: bool, tmp_path: Path) -> None:
    file = trained(kind, tmp_path, byte_fallback=has_bytes)
    theirs, draw = sentencepiece.SentencePieceProcessor(model_file=str(file)), random.Random(0)
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(file))
    assert ours.get_vocab_size() == theirs.get_piece_size()
    for _ in range(500):
        parts = draw.choices(PARTS, k=draw.randrange(9))
        text = draw.choice(["", " "]).join(parts)
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), repr(text)
    # Special tokens are found in a text, which SentencePiece never does.
    assert ours.encode("a</s>").ids == [*theirs.encode("a"), theirs.eos_id()]
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(file))
    literal = load_tokenizer(tmp_path / "tokenizer.json").encode_plain
    for text in ("a</s>", "a </s> b", "<unk>", "red <s> a<unk>", "</s"):
        assert literal(text) == theirs.encode(text), text


def test_a_combining_character_after_a_ligature_is_the_difference(tmp_path: Path) -> None:
    file = trained("unigram", tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(file))
    assert ours.encode("\ufb01\u0301").ids == theirs.encode("f\u00ed") != theirs.encode("\ufb01\u0301")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("word", {}),
        ("char", {}),
        ("bpe", {"normalization_rule_name": "identity"}),
        ("unigram", {"add_dummy_prefix": False}),
        ("unigram", {"remove_extra_whitespaces": False}),
        ("unigram", {"eos_id": -1}),
        ("unigram", {"user_defined_symbols": ["red square"]}),
    ],
)
def test_other_models_have_none(kind: str, options: dict, tmp_path: Path) -> None:
    assert tokenizer_json(trained(kind, tmp_path, **options)) is None


def test_a_damaged_file_has_none(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    for data in (b"a SentencePiece model", b"", trained("bpe", tmp_path).read_bytes()[:-40]):
        file.write_bytes(data)
        assert tokenizer_json(file) is None

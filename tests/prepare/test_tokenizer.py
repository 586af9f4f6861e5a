"""A tokenizer is trained on any texts, however few, and encodes every text; or it is copied from elsewhere."""

import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from golden_model import ONEVISION, byte_tokenizer

from megatron_llave.data.tokenizer import load_tokenizer
from megatron_llave.errors import ConfigError
from megatron_llave.prepare import tokenizer
from megatron_llave.prepare.tokenizer import copy_tokenizer, find_other, train_tokenizer

CHINESE = ["".join(chr(0x4E00 + random.Random(n).randrange(20000)) for _ in range(12)) for n in range(400)]


@pytest.mark.parametrize(
    "texts",
    [[], ["a"], ["a cat"] * 300, ["\U0001f600"], ["\u200b"], ["x" * 3000], ["word " * 20000], CHINESE],
    ids=["none", "letter", "same", "emoji", "invisible", "no spaces", "long", "chinese"],
)
def test_any_texts_do_and_every_text_can_be_encoded(texts: list[str]) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(texts))
    assert 256 < model.get_piece_size() <= 1200 and model.eos_id() >= 0
    for text in ("h\u00e9llo \u732b \U0001f600 xyz", *texts[:1]):
        assert model.unk_id() not in model.encode(text)
    assert model.decode(model.encode("h\u00e9llo \u732b \U0001f600 xyz")) == "h\u00e9llo \u732b \U0001f600 xyz"


def test_equal_texts_give_equal_bytes_and_frequent_words_become_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a red car number {number}" for number in range(50)]
    model = train_tokenizer(iter(texts))
    assert model == train_tokenizer(texts)
    assert len(sentencepiece.SentencePieceProcessor(model_proto=model).encode("a red car")) <= 3
    monkeypatch.setattr(tokenizer, "MOST_TEXTS", 10)
    assert train_tokenizer(texts) == train_tokenizer(texts) != model  # of a sample
    with pytest.raises(ConfigError, match="--vocabulary 300 must be at least 400, which includes 256 bytes"):
        train_tokenizer(texts, 300)


def test_a_copy_is_the_only_tokenizer_of_the_folder(tmp_path: Path) -> None:
    shutil.copytree(ONEVISION, tmp_path / "hf")
    written = byte_tokenizer(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tokenizer.model").write_bytes(b"of an earlier run")
    for source in (tmp_path / "hf", written):
        copy_tokenizer(find_other(source), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [Path(written).name]
    assert load_tokenizer(tmp_path / "out" / Path(written).name).vocab_size > 0

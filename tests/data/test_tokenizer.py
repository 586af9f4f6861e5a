"""Both kinds of tokenizer file through one interface, and the errors for files that are neither."""

import io
import json
import pickle

import pytest
import sentencepiece
import tokenizers

from megatron_llave.checkpoint.pretrained import Pretrained
from megatron_llave.config.data import DataConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.tokenizer import find_tokenizer, load_tokenizer, tokenizer_in
from megatron_llave.errors import DataError

WORDS = "the quick brown fox jumps over a lazy dog while small birds watch from high trees".split()


@pytest.fixture
def sentencepiece_file(tmp_path):
    """A unigram model of a few words."""
    model = io.BytesIO()
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=40, minloglevel=2
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def save_words(path, vocabulary, special):
    """A word-level tokenizer.json."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(special)
    model.enable_truncation(max_length=2)
    model.save(str(path))
    return path


def test_sentencepiece_round_trip(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    ids = tokenizer.encode("the quick fox")
    assert tokenizer.vocab_size == 40
    assert tokenizer.eos_id == 2
    assert ids and tokenizer.eos_id not in ids and max(ids) < tokenizer.vocab_size
    peer = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert peer.decode(ids) == "the quick fox"
    assert tokenizer.encode("") == []


def test_ids_belong_to_the_caller(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    first = tokenizer.encode("fox")
    first.append(99)
    assert tokenizer.encode("fox") == first[:-1]


def test_worker_processes_that_are_not_forked_get_the_same_tokenizer(sentencepiece_file, tmp_path):
    words = save_words(tmp_path / "tokenizer.json", {"[UNK]": 0, "fox": 1, "<|im_end|>": 9}, ["<|im_end|>"])
    for path in (sentencepiece_file, words):
        copy = pickle.loads(pickle.dumps(load_tokenizer(path)))
        assert copy.encode("the fox") == load_tokenizer(path).encode("the fox")


def test_hugging_face_parses_special_tokens_and_ignores_stored_truncation(tmp_path):
    vocabulary = {"[UNK]": 0, "fox": 1, "dog": 2, "<|im_end|>": 9, "<|endoftext|>": 5}
    path = save_words(tmp_path / "tokenizer.json", vocabulary, ["<|im_end|>", "<|endoftext|>"])
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("fox<|im_end|>dog fox") == [1, 9, 2, 1]
    assert tokenizer.eos_id == 9  # <|im_end|> before <|endoftext|>
    assert tokenizer.vocab_size == 10  # ids may have gaps; the embedding needs the highest


@pytest.mark.parametrize("token", ["<|endoftext|>", "</s>"])
def test_end_token_falls_back(tmp_path, token):
    path = save_words(tmp_path / "tokenizer.json", {"[UNK]": 0, "fox": 1, token: 7}, [token])
    assert load_tokenizer(path).eos_id == 7


def test_a_folder_with_both_files_has_one_tokenizer_for_data_and_weights(sentencepiece_file, tmp_path):
    """tokenizer.json has the special tokens; the same file is found beside data, in assets and in an HF folder."""
    assert sentencepiece_file.parent == tmp_path
    assert tokenizer_in(tmp_path) == sentencepiece_file
    words = save_words(tmp_path / "tokenizer.json", {"[UNK]": 0, "fox": 1, "<|im_end|>": 9}, ["<|im_end|>"])
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("tokenizer.json", "tokenizer.model"):
        (assets / name).write_bytes((tmp_path / name).read_bytes())
    assert tokenizer_in(tmp_path) == find_tokenizer(DataConfig(path=str(tmp_path))) == words
    assert Pretrained(tmp_path, RunConfig(), is_hf=True).find_tokenizer() == str(words)
    assert Pretrained(tmp_path, RunConfig(), is_hf=False).find_tokenizer() == str(assets / "tokenizer.json")
    chosen = DataConfig(path=str(tmp_path), tokenizer=str(sentencepiece_file))
    assert find_tokenizer(chosen) == sentencepiece_file


def test_no_end_token_is_an_error(tmp_path):
    path = save_words(tmp_path / "tokenizer.json", {"[UNK]": 0, "fox": 1}, [])
    with pytest.raises(DataError, match=r"<\|im_end\|>"):
        load_tokenizer(path)


def test_sentencepiece_without_end_piece_is_an_error(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 4), model_writer=model, vocab_size=35, eos_id=-1, minloglevel=2
    )
    path = tmp_path / "noeos.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(DataError, match="end-of-sequence"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.model", None),
        ("damaged.model", b"\x00\x01not a model"),
        ("empty.model", b""),
        ("damaged.json", b"{not json"),
        ("other.json", json.dumps({"version": 1}).encode()),
        ("tokenizer.txt", b"fox"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=name) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)

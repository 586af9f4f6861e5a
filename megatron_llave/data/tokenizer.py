"""Turns text into token ids with a SentencePiece `.model` or a Hugging Face `tokenizer.json`, behind one interface.

Used by models/llava_onevision/prompt.py, which puts the chat template around the text. In a folder that holds both
files tokenizer.json is the one that is read, whether the folder holds data, a checkpoint's assets or a Hugging Face
model: it lists the special tokens that a model has added (<|im_end|>, <image>), which the SentencePiece model beside it
lacks, and transformers reads it first as well.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_llave.config.data import REMOTE, DataConfig
from megatron_llave.data.placeholders import MARK
from megatron_llave.errors import ConfigError, DataError

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Names of the files that can be a folder's tokenizer; the first one that is there is read."""

# Known end-of-sequence tokens, the most specific one first: Qwen's chat models end a turn with <|im_end|>.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>", "<eos>")


CACHED_TEXTS = 4096
"""Number of texts whose ids are cached, since instructions and class names are repeated very often."""


class Tokenizer(Protocol):
    """What the package needs from a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of rows that the embedding needs: the highest possible id plus one."""

    @property
    def eos_id(self) -> int:
        """The id that ends a sequence."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, with nothing added before or after them."""

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of the text, in which special tokens such as <|im_end|> are ordinary text."""


class SentencePieceTokenizer:
    """A SentencePiece model; it has only those special tokens that the model file defines."""

    def __init__(self, path: Path):
        """Read the model; raise DataError if the file is not a model or has no end-of-sequence piece."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path} is not a readable SentencePiece model: {_one_line(error)}") from error
        self.vocab_size: int = self._model.get_piece_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{path} has no end-of-sequence piece; train the model with eos_id >= 0")
        self._ids = _cached(self._model.encode)
        self._path = path

    def __reduce__(self) -> tuple:
        """Pickle the path alone: a process that is not forked (a data worker on Python 3.14) reads the file again."""
        return type(self), (self._path,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text."""
        return list(self._ids(text))

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of the text; SentencePiece never finds control pieces in a text."""
        return self.encode(text)


class HuggingFaceTokenizer:
    """A tokenizer.json; special tokens in the text become special ids, as in the official LLaVE repository."""

    def __init__(self, path: Path):
        """Read the file; raise DataError if it is not a tokenizer or has no known end-of-sequence token."""
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise DataError(f"{path} is not a readable tokenizer.json: {_one_line(error)}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size: int = max(self._model.get_vocab().values(), default=-1) + 1
        end_ids = [self._model.token_to_id(token) for token in END_TOKENS]
        known_ids = [token_id for token_id in end_ids if token_id is not None]
        if not known_ids:
            raise DataError(f"{path} has none of the end-of-sequence tokens {', '.join(END_TOKENS)}")
        self.eos_id: int = known_ids[0]
        self._ids = _cached(lambda text: self._model.encode(text, add_special_tokens=False).ids)
        self._plain: tokenizers.Tokenizer | None = None
        self._path = path

    def __reduce__(self) -> tuple:
        """Pickle the path alone, like SentencePieceTokenizer."""
        return type(self), (self._path,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text."""
        return list(self._ids(text))

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of the text by a copy of the tokenizer that knows no special tokens; made at the first use."""
        if self._plain is None:
            described = json.loads(self._model.to_str())
            added = described["added_tokens"]
            described["added_tokens"] = [t for t in added if not t["special"] and not MARK.fullmatch(t["content"])]
            vocabulary, special = described["model"]["vocab"], {t["content"] for t in added if t["special"]}
            if isinstance(vocabulary, list):  # a Unigram model has them among its pieces; no text holds a NUL
                renamed = [[f"\0{piece}" if piece in special else piece, score] for piece, score in vocabulary]
                described["model"]["vocab"] = renamed
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(described))
        return self._plain.encode(text, add_special_tokens=False).ids


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer file.

    Raises:
        DataError: the file is missing or damaged, or its name ends in neither .model nor .json.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"tokenizer {path} is no file; it must be a SentencePiece .model or a tokenizer.json")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise DataError(f"tokenizer {path} is neither a SentencePiece .model nor a Hugging Face tokenizer.json")


def _cached(encode: Callable[[str], list[int]]) -> Callable[[str], tuple[int, ...]]:
    return lru_cache(maxsize=CACHED_TEXTS)(lambda text: tuple(encode(text)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def tokenizer_in(folder: Path) -> Path | None:
    """Return the tokenizer file of a folder: the first of TOKENIZERS that it holds, or None."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def find_tokenizer(data: DataConfig) -> Path:
    """Return the file that `data.tokenizer` names, or else the tokenizer in the folder of the data.

    Raises:
        DataError: `data.tokenizer` is not set and the folder holds no tokenizer.
    """
    if data.tokenizer:
        return Path(data.tokenizer)
    file = tokenizer_in(Path(data.path))
    if not REMOTE.match(str(data.path)) and not Path(data.path).exists():
        raise DataError(f"data.path={data.path} does not exist; llave prepare makes such a folder")
    if file is None:
        make = "set data.tokenizer, or make one with llave prepare tokenizer"
        raise DataError(f"{Path(data.path)} has neither {' nor '.join(TOKENIZERS)}; {make}")
    return file


def tokenizer_of_run(data: DataConfig, vocab_size: int) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names or that is found in `data.path`.

    Args:
        data: of the run.
        vocab_size: model.language.vocab_size, the number of rows of the token embedding.

    Raises:
        DataError: the tokenizer is missing or damaged.
        ConfigError: it has more ids than the embedding has rows.
    """
    path = find_tokenizer(data)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        what = f"{path} has {tokenizer.vocab_size} token ids"
        raise ConfigError(f"{what}, more than model.language.vocab_size={vocab_size}")
    return tokenizer

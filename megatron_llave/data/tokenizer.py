"""Text -> token ids, from a SentencePiece `.model` or a Hugging Face `tokenizer.json`, behind one small interface.

Used by models/llava_onevision/prompt.py, which puts the chat template around the text. In a folder that holds both
files tokenizer.json is the one that is read, whether the folder holds data, a checkpoint's assets or a Hugging Face
model: it lists the special tokens that a model has added (<|im_end|>, <image>), which the SentencePiece model beside it
lacks, and transformers reads it first as well.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_llave.config.schema import DataConfig
from megatron_llave.errors import DataError

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Names of the files that can be a folder's tokenizer; the first one that is there is read."""

# The end-of-sequence tokens in use, most specific first: Qwen's chat models end a turn with <|im_end|>.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>", "<eos>")


CACHED_TEXTS = 4096
"""Texts whose ids are kept: instructions and class names come again and again."""


class Tokenizer(Protocol):
    """What the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Rows the embedding needs: the highest id that can come out, plus one."""

    @property
    def eos_id(self) -> int:
        """Id that ends a sequence."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing added before or after."""


class SentencePieceTokenizer:
    """A SentencePiece model; special tokens exist only where the model defines them."""

    def __init__(self, path: Path):
        """Read the model; raises DataError when it is none or has no end-of-sequence piece."""
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
        """A process that is not forked, such as a data worker on Python 3.14, reads the file again."""
        return type(self), (self._path,)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return list(self._ids(text))


class HuggingFaceTokenizer:
    """A tokenizer.json; special tokens written in the text become special ids, as in the released code."""

    def __init__(self, path: Path):
        """Read the file; raises DataError when it is no tokenizer or has no known end-of-sequence token."""
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise DataError(f"{path} is not a readable tokenizer.json: {_one_line(error)}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size: int = max(self._model.get_vocab().values(), default=-1) + 1
        found = [self._model.token_to_id(token) for token in END_TOKENS]
        known = [token_id for token_id in found if token_id is not None]
        if not known:
            raise DataError(f"{path} has none of the end-of-sequence tokens {', '.join(END_TOKENS)}")
        self.eos_id: int = known[0]
        self._ids = _cached(lambda text: self._model.encode(text, add_special_tokens=False).ids)
        self._path = path

    def __reduce__(self) -> tuple:
        """As of SentencePieceTokenizer."""
        return type(self), (self._path,)

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return list(self._ids(text))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer file.

    Raises:
        DataError: the file is missing, damaged, or neither a .model nor a .json.
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
    found = tokenizer_in(Path(data.path))
    if found is None:
        raise DataError(f"{Path(data.path)} has neither {' nor '.join(TOKENIZERS)}; set data.tokenizer")
    return found

"""The tokenizer of a data folder: a SentencePiece model that is trained on its texts, or a copy of another one.

The sources of llave prepare make one, and its command `tokenizer` does so for other texts.
"""

import io
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import sentencepiece

from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.data.index import read_index
from megatron_llave.data.shards import read_samples, unpack_pair
from megatron_llave.data.tokenizer import TOKENIZERS, load_tokenizer, tokenizer_in
from megatron_llave.errors import CheckpointError, ConfigError, DataError
from megatron_llave.files import atomic_write
from megatron_llave.options.prepare import VOCABULARY
from megatron_llave.prepare.openmoji.tasks import REPRESENT_IMAGE

TRAINED_FILE = TOKENIZERS[1]
"""Name of the file that holds a trained tokenizer."""
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 400, 1_000_000
MOST_TEXTS = 20_000
"""Number of texts that a tokenizer is trained on; of more different ones, as many are drawn."""
MOST_CHARACTERS = 0.75
"""Share of a vocabulary's pieces, beyond the 256 bytes and the special ones, that may be single characters."""
LONGEST_PIECE = 1000
"""Characters of a text that are shown to the trainer at a time; it leaves out what is much longer."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str, **options: object) -> bytes:
    """Train a SentencePiece model (unigram or bpe), whose `</s>` ends a text; return the bytes of the model.

    Equal texts give equal bytes. `options` are further options of SentencePiece's trainer.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        character_coverage=1.0,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCABULARY) -> bytes:
    """Train a tokenizer on any texts, however few or many; return the bytes of the SentencePiece model.

    It has `vocab_size` pieces, or fewer where the texts do not give so many. Bytes stand for characters that are rare
    or not in the texts, so that every text can be encoded.

    Raises:
        ConfigError: vocab_size is below SMALLEST_VOCABULARY.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"--vocabulary {vocab_size} must be at least {SMALLEST_VOCABULARY}, which includes 256 bytes")
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(f"--vocabulary {vocab_size} must be at most {LARGEST_VOCABULARY}")
    given = list(dict.fromkeys(texts))
    drawn = Random(0).sample(given, MOST_TEXTS) if len(given) > MOST_TEXTS else given
    # The trainer needs one usable text at least; this one belongs to every image that is a target.
    pieces = [
        piece
        for text in [*drawn, REPRESENT_IMAGE]
        for piece in re.findall(rf"(?s).{{1,{LONGEST_PIECE}}}(?!\S)|\S+", text)
    ]
    counts = Counter(character for piece in pieces for character in piece)
    known = {character for character, _ in counts.most_common(int((vocab_size - 259) * MOST_CHARACTERS))}
    shown = ("".join(c if c in known else " " for c in piece[:LONGEST_PIECE]) for piece in pieces)
    # Of few texts a unigram model would keep little more than single characters.
    return train_sentencepiece(shown, vocab_size, "bpe", hard_vocab_limit=False, byte_fallback=True)


def texts_of(source: str | Path) -> Iterator[str]:
    """Yield the texts of a folder of shards, or the lines of a text file.

    Raises:
        DataError: the source cannot be read.
    """
    source = Path(source)
    if source.is_dir():
        for subset in read_index(source).subsets.values():
            for shard in subset.shards:
                for sample in read_samples(source / shard.file):
                    pair = unpack_pair(sample, f"{source / shard.file}: pair {sample['__key__']}")
                    yield from (side.text for side in (pair.query, *pair.targets, *pair.hard_negatives))
        return
    try:
        with open(source, encoding="utf-8-sig") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text") from error


def write_trained(texts: Iterable[str], file: str | Path, vocab_size: int = VOCABULARY) -> int:
    """Train a tokenizer on `texts` and write it; return its number of pieces.

    Raises:
        ConfigError: vocab_size is too small.
        DataError: there is no text, or the file cannot be written.
    """
    given = [text for text in texts if text.strip()]
    if not given:
        raise DataError(f"there is no text to train the tokenizer {file} on")
    model = train_tokenizer(given, vocab_size)
    try:
        with atomic_write(file) as partial:
            partial.write_bytes(model)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error
    return load_tokenizer(file).vocab_size


def find_other(path: str | Path) -> Path:
    """Return the tokenizer file that `path` is or holds: a file, a data folder, a checkpoint or a Hugging Face folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(path)
    file = path if path.is_file() else tokenizer_in(path)
    if file is None:
        try:
            written = find_pretrained(path).find_tokenizer()
        except CheckpointError as error:
            raise DataError(
                f"--tokenizer {path} is no tokenizer file, and no folder that holds one: {error}"
            ) from error
        if written is None:
            raise DataError(f"--tokenizer {path} holds neither {' nor '.join(TOKENIZERS)}")
        file = Path(written)
    load_tokenizer(file)
    return file


def copy_tokenizer(file: Path, directory: Path) -> None:
    """Copy a tokenizer file into a data folder, where it becomes the only one."""
    name = f"tokenizer{file.suffix}"
    with atomic_write(directory / name) as partial:
        shutil.copyfile(file, partial)
    for other in TOKENIZERS:
        if other != name:
            (directory / other).unlink(missing_ok=True)

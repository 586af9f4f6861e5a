"""Weights that a run or an embedder starts from, wherever they are: a checkpoint, a run's folder, or an HF folder."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Module

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.state import load_weights
from megatron_llave.config.checks import has_sizes, require_same_model
from megatron_llave.config.load import load_config
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.tokenizer import find_tokenizer, tokenizer_in
from megatron_llave.errors import CheckpointError
from megatron_llave.models import family_of, open_hf, read_hf_config
from megatron_llave.models.hf.weights import fill_from_hf

HF_CONFIG = "config.json"

HASH_THREADS, HASH_BYTES = 8, 2**22
"""Files that are hashed at a time, and bytes of each that are held."""


@dataclass(frozen=True)
class Pretrained:
    """Where weights are, and what model they are of."""

    folder: Path
    cfg: RunConfig
    """Of an HF folder: the model that its config.json describes, all else by default."""
    is_hf: bool

    @property
    def assets(self) -> Path:
        """Folder that may hold a tokenizer."""
        return self.folder if self.is_hf else self.folder / folders.ASSETS

    def load(self, chunks: list[Module], groups: ProcessGroupCollection, average: bool = False) -> None:
        """Fill this rank's chunks, at the layout of `groups`.

        Raises:
            CheckpointError: the weights are damaged, not whole, of another model, or have no averages.
        """
        folders.require_average(self.folder, self.cfg, average)
        if self.is_hf:
            fill_from_hf(chunks, open_hf(self.folder), groups)
        else:
            load_weights(self.folder, chunks, groups, average)

    def find_tokenizer(self) -> str | None:
        """Return the tokenizer file that belongs to these weights, or None if their folder holds none."""
        file = tokenizer_in(self.assets)
        return None if file is None else str(file)

    def fingerprint(self) -> str:
        """Of the weights: a hash of their files' names and of every byte in them.

        The same wherever the folder lies and however many ranks load it; one rank is enough. A sample would not
        do: a fine-tune of the projector alone changes few of them. SHA-256 does 1.9 GB/s on a core of an AMD EPYC with
        SHA instructions, BLAKE2b 1.3, and the files of a checkpoint are hashed side by side.

        Raises:
            CheckpointError: a file cannot be read, or is gone since the weights were loaded.
        """
        if self.is_hf:
            found = [self.folder / HF_CONFIG, *self.folder.rglob("*.safetensors")]
        else:  # without other folders in it, such as that of an evaluation
            found = [*self.folder.iterdir(), *self.assets.rglob("*")]
        files = sorted(path for path in found if path.is_file())
        digest = hashlib.sha256()
        try:
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                for path, own in zip(files, pool.map(_hash, files)):
                    digest.update(f"{path.relative_to(self.folder)} {own}\n".encode())
        except OSError as error:
            why = f"{error.strerror}; is a run removing it?"
            raise CheckpointError(f"{error.filename} cannot be read: {why}") from error
        return digest.hexdigest()

    def identity(self, cfg: RunConfig, average: bool) -> dict[str, str]:
        """What the embeddings of these weights depend on, under the configuration that they are used with."""
        tokenizer = hashlib.sha256(find_tokenizer(cfg.data).read_bytes()).hexdigest()
        values = {
            "weights": self.fingerprint(),
            "averaged": average,
            "tokenizer": tokenizer,
            "precision": cfg.model.precision,
            **family_of(cfg.model).input_settings(cfg.data, cfg.model),
        }
        return {key: str(value) for key, value in values.items()}

    def adopt(self, model: ModelConfig) -> ModelConfig:
        """`model` with the vocabulary of these weights; with all their sizes and grids where it gives no size itself.

        Raises:
            ConfigError: it is another model; names the key and both values.
        """
        own = self.cfg.model
        if not has_sizes(model):
            sizes = {"family": own.family, "vision": own.vision, "language": own.language}
            return replace(model, **sizes, image_grids=model.image_grids or own.image_grids)
        require_same_model(model, own, f"the weights in {self.folder}")
        return replace(model, language=replace(model.language, vocab_size=own.language.vocab_size))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def find_pretrained(path: str | Path) -> Pretrained:
    """What lies at `path`.

    Raises:
        CheckpointError: neither a checkpoint, nor a run's folder, nor an HF folder of a supported model.
    """
    path = Path(path)
    if (path / HF_CONFIG).is_file():
        return Pretrained(path, read_hf_config(path).run, is_hf=True)
    try:
        folder = folders.find(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; a Hugging Face folder would hold {HF_CONFIG}") from error
    return Pretrained(folder, load_config(folder / folders.CONFIG, leave_out=["parallel"]), is_hf=False)

"""Weights that a run or an embedder starts from: of a checkpoint, an output directory or a Hugging Face folder."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Module

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.state import load_weights
from megatron_llave.config.checks import has_sizes, require_same_model
from megatron_llave.config.model import ModelConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.tokenizer import find_tokenizer, tokenizer_in
from megatron_llave.distributed.collectives import from_first_rank
from megatron_llave.errors import CheckpointError, require
from megatron_llave.files import read_json, sha256_of
from megatron_llave.hub import local_folder, name_of
from megatron_llave.models import family_of, open_hf, read_hf_config
from megatron_llave.models.hf.peft_files import ADAPTER_CONFIG
from megatron_llave.models.hf.weights import fill_from_hf, require_plausible
from megatron_llave.models.lora import merging

HF_CONFIG = "config.json"

BASE = "base.json"
"""The file of the assets that says which weights the adapters of a checkpoint are for."""
HASH_THREADS = 8
"""Number of files that are hashed at the same time."""


@dataclass(frozen=True)
class Base:
    """Which weights the adapters of a checkpoint are for."""

    source: str
    """Folder that they were in, an absolute path, or the model of the hub with its commit."""
    sha256: str
    """Pretrained.fingerprint of them."""


@dataclass(frozen=True)
class Pretrained:
    """Where weights are, and the configuration of their model."""

    folder: Path
    cfg: RunConfig
    """For an HF folder, the model that its config.json describes; every other key has its default."""
    is_hf: bool
    compared: set[Path] = field(default_factory=set, compare=False, repr=False)
    """Folders of the base whose hash `find_base` has compared."""

    @property
    def assets(self) -> Path:
        """Return the folder that may hold a tokenizer."""
        return self.folder if self.is_hf else self.folder / folders.ASSETS

    @property
    def place(self) -> str:
        """Return org/name@commit of a model of the hub, which every machine finds; else the folder's absolute path."""
        return name_of(self.folder) or os.path.abspath(self.folder)

    def require_plausible(self) -> None:
        """Refuse a Hugging Face folder whose config.json is of another model, before a model is built for it.

        Raises:
            CheckpointError: names what its weights lack.
        """
        if self.is_hf:
            require_plausible(open_hf(self.folder))

    def load(
        self,
        chunks: list[Module],
        groups: ProcessGroupCollection,
        average: bool = False,
        base: str | None = None,
    ) -> None:
        """Fill this rank's chunks, at the parallel layout of `groups`.

        Adapters go into the chunks' own, which have the same rank and targets, or are merged if these have none. The
        chunks' adapters stay as they are if the folder has none.

        Args:
            chunks: this rank's chunks.
            groups: the parallel layout.
            average: whether to load the averaged weights of a run with loss.reward=ema.
            base: folder of the weights that the folder's adapters are for; None: where they were.

        Raises:
            CheckpointError: the weights are damaged, incomplete, of another model, or have no averages; or those that
                the adapters are for are gone, or others.
        """
        folders.require_average(self.folder, self.cfg, average)
        lora = self.cfg.lora
        if lora.leaves_out_base:
            self.find_base(base)._load_frozen(chunks, groups)
        if self.is_hf:
            self._load_frozen(chunks, groups)
            return
        rules = family_of(self.cfg.model).hf.rules(self.cfg.model)
        is_merged = lora.rank > 0 and not any(hasattr(chunk, "lora") for chunk in chunks)
        with merging(chunks, lora, rules, groups.tp) if is_merged else nullcontext():
            load_weights(self.folder, chunks, groups, average)

    def _load_frozen(self, chunks: list[Module], groups: ProcessGroupCollection) -> None:
        """Fill the weights without this folder's adapters, which those of its successor have replaced."""
        if self.is_hf:
            fill_from_hf(chunks, open_hf(self.folder), groups)
        else:
            load_weights(self.folder, chunks, groups)

    def as_base(self, folder: str | None) -> Base:
        """Return the record of the weights that adapters are trained for in a run that starts from these.

        Args:
            folder: of the weights that the adapters are for which these are; None: where they were.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if self.cfg.lora.leaves_out_base:
            base = self.find_base(folder)
            return Base(base.place, read_base(self.folder).sha256)
        return Base(self.place, self.fingerprint())

    def find_base(self, folder: str | None) -> "Pretrained":
        """Find the weights that the adapters of this checkpoint are for; the first rank compares their hash, once.

        Args:
            folder: where they are now; None: where they were.

        Raises:
            CheckpointError: they are gone, or others.
        """
        record = read_base(self.folder)
        what = f"{self.folder} holds adapters without the weights that they are for"
        hint = "name their folder: lora.base, or --base of llave convert"
        try:
            base = find_pretrained(folder or record.source)
        except CheckpointError as error:
            raise CheckpointError(f"{what}: {error}; {hint}") from error
        if base.folder not in self.compared and (not dist.is_initialized() or dist.get_rank() == 0):
            if base.fingerprint() != record.sha256:
                raise CheckpointError(f"{what}, and {base.folder} holds others (SHA-256); {hint}")
            self.compared.add(base.folder)
        return base

    def find_tokenizer(self) -> str | None:
        """Return the tokenizer file that belongs to these weights, or None if their folder holds none."""
        file = tokenizer_in(self.assets)
        return None if file is None else str(file)

    def fingerprint(self) -> str:
        """Return a hash of the names of the files that hold the weights, and of every byte in them.

        It does not depend on where the folder is, nor on the number of ranks; one rank computes it. A sample of the
        bytes would not be enough, since a fine-tune of the projector changes few of them. SHA-256 reads 1.9 GB/s on one
        core of an AMD EPYC with SHA instructions, BLAKE2b 1.3 GB/s; several files are hashed at the same time.

        Raises:
            CheckpointError: a file cannot be read, or has been removed since the weights were loaded.
        """
        if self.is_hf:
            paths = [self.folder / HF_CONFIG, *self.folder.glob("*.safetensors")]
        else:  # without other folders in it, such as that of an evaluation
            paths = [*self.folder.iterdir(), *self.assets.rglob("*")]
        files = sorted(path for path in paths if path.is_file())
        digest = hashlib.sha256()
        try:
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                for path, file_digest in zip(files, pool.map(sha256_of, files)):
                    digest.update(f"{path.relative_to(self.folder)} {file_digest}\n".encode())
        except OSError as error:
            why = f"{error.strerror}; is a run removing it?"
            raise CheckpointError(f"{error.filename} cannot be read: {why}") from error
        return digest.hexdigest()

    def identity(self, cfg: RunConfig, average: bool) -> dict[str, str]:
        """Return everything that the embeddings of these weights depend on under this configuration, by name."""
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
        """Return `model` with the vocabulary of these weights, and if it gives no sizes, with all of theirs.

        Raises:
            ConfigError: `model` gives other sizes than the weights have; names the key and both values.
        """
        stored, weights = self.cfg.model, f"the weights in {self.folder}"
        if not has_sizes(model):
            is_same = model.family in (ModelConfig.family, stored.family)
            require(is_same, f"model.family={model.family} contradicts {weights}, where it is {stored.family}")
            sizes = {"family": stored.family, "vision": stored.vision, "language": stored.language}
            return replace(model, **sizes, image_grids=model.image_grids or stored.image_grids)
        require_same_model(model, stored, weights)
        return replace(model, language=replace(model.language, vocab_size=stored.language.vocab_size))


def read_base(folder: Path) -> Base:
    """Read which weights the adapters of checkpoint `folder` are for.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = folder / folders.ASSETS / BASE
    values = read_json(file, hint="a run with lora.rank writes it", error=CheckpointError)
    if values.keys() != {"source", "sha256"} or not all(isinstance(value, str) for value in values.values()):
        raise CheckpointError(f"{file} is damaged: it does not say which weights the adapters are for")
    return Base(**values)


def find_pretrained(path: str | Path) -> Pretrained:
    """Find the weights at `path`: a checkpoint, an output directory, an HF folder, or a model of the hub (hub.py).

    Raises:
        CheckpointError: `path` is neither a checkpoint, nor an output directory, nor an HF folder of a known model, nor
            the name of such a model on the hub.
    """
    path = local_folder(path)
    if not os.path.exists(path):  # unlike those of Path, false for a name that no file can have
        raise CheckpointError(f"{path} does not exist; name a checkpoint, an output directory or a Hugging Face folder")
    if os.path.isfile(path / HF_CONFIG):
        return Pretrained(path, read_hf_config(path).run, is_hf=True)
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{path} has an adapter and no model; llave convert import merges or keeps it")
    try:
        folder = folders.find(path)
    except folders.NoCheckpointError as error:
        raise CheckpointError(f"{error}; a Hugging Face folder would hold {HF_CONFIG}") from error
    return Pretrained(folder, folders.saved_config(folder), is_hf=False)


def of_first_rank(pretrained: Pretrained) -> Pretrained:
    """Return the weights that the first rank has found, on all ranks; a collective over all of them.

    While the ranks look, a running training may save another checkpoint, and a model of the hub may change.
    """
    own = name_of(pretrained.folder) or pretrained.folder
    found = from_first_rank(lambda: own)
    return pretrained if found == own else find_pretrained(found)

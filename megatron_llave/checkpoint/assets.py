"""The folder `assets/` of a checkpoint: what it keeps of the Hugging Face folder that its weights came from."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.pretrained import BASE, Base, Pretrained
from megatron_llave.data.tokenizer import TOKENIZERS
from megatron_llave.errors import CheckpointError
from megatron_llave.files import read_json, write_json
from megatron_llave.models import open_hf, read_hf_config
from megatron_llave.models.hf.config_json import HfConfig
from megatron_llave.models.hf.tensor_files import CODES, DTYPE_CODES, write_tensor_files
from megatron_llave.models.hf.weights import HfWeights

UNUSED_FILE = "unused.safetensors"
"""Tensors that the embedder does not use."""
DTYPES_FILE = "tensors.json"
"""Dtype of every tensor of the Hugging Face folder, by canonical name."""
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by canonical name."""


def keep_assets(weights: HfWeights, folder: Path) -> None:
    """Write all that an export gives back unchanged into a new folder."""
    folder.mkdir()
    weights.format.keep_files(weights.files.folder, folder)
    head = weights.format.lm_head
    unused = [name for name in weights.unused if name != head or not _head_is_embedding(weights)]
    stored = {name: (weights.shape(name), weights.dtypes[name]) for name in unused}
    write_tensor_files(folder, stored, ((name, weights.read(name)) for name in unused), 2**63, UNUSED_FILE)
    dtypes = {name: CODES[dtype] for name, dtype in sorted(weights.dtypes.items())}
    write_json(folder / DTYPES_FILE, dtypes)


def _head_is_embedding(weights: HfWeights) -> bool:
    """Whether tied weights are stored twice; then an export copies the embedding, which may have been trained."""
    head, embedding = weights.format.lm_head, weights.format.embedding
    return weights.config.tied and torch.equal(weights.read(head), weights.read(embedding))


def start_assets(output: Path, pretrained: Pretrained | None, tokenizer: Path, base: Base | None = None) -> None:
    """Fill `assets/` in the output directory, from where each checkpoint takes it; the first rank calls this once.

    Args:
        output: output directory of the run.
        pretrained: the weights that the run starts from, if any.
        tokenizer: the file that the run reads its tokenizer from.
        base: which weights the adapters are for that its checkpoints hold without them.
    """
    folder = output / folders.ASSETS
    shutil.rmtree(folder, ignore_errors=True)
    if pretrained is not None and pretrained.is_hf:
        keep_assets(open_hf(pretrained.folder), folder)
    elif pretrained is not None and pretrained.assets.is_dir():
        shutil.copytree(pretrained.assets, folder, copy_function=folders.link)
    folder.mkdir(exist_ok=True)
    (folder / BASE).unlink(missing_ok=True)
    if base is not None:
        write_json(folder / BASE, asdict(base))
    if pretrained is None or str(tokenizer) != pretrained.find_tokenizer():
        for name in TOKENIZERS:
            (folder / name).unlink(missing_ok=True)
        shutil.copyfile(tokenizer, folder / f"tokenizer{tokenizer.suffix}")


@dataclass(frozen=True)
class Assets:
    """What a checkpoint keeps of the HF folder that its weights came from; empty for a model trained from scratch."""

    folder: Path | None
    config: HfConfig | None
    dtypes: dict[str, torch.dtype]
    """Dtype of every tensor of that folder, by canonical name."""
    unused: Shapes
    """Shape and dtype of the tensors in unused.safetensors."""

    def read(self, name: str) -> Tensor:
        """Read one tensor of unused.safetensors."""
        with safe_open(self.folder / UNUSED_FILE, framework="pt") as handle:
            return handle.get_tensor(name)


def read_assets(folder: Path) -> Assets:
    """Read the assets of checkpoint folder `folder`.

    Raises:
        CheckpointError: a file of the assets is damaged.
    """
    assets = folder / folders.ASSETS
    if not (assets / DTYPES_FILE).is_file():
        return Assets(assets if assets.is_dir() else None, None, {}, {})
    try:
        codes = read_json(assets / DTYPES_FILE)
        dtypes = {name: DTYPE_CODES[code] for name, code in codes.items()}
        with safe_open(assets / UNUSED_FILE, framework="pt") as handle:
            unused = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    except Exception as error:  # safetensors and json raise their own types; each means that an export is incomplete
        raise CheckpointError(f"{assets} is damaged: {' '.join(str(error).split())}") from error
    config = read_hf_config(assets, with_other_files=False)  # which were compared when the weights were imported
    return Assets(assets, config, dtypes, {name: (unused[name], dtypes[name]) for name in unused})

"""Hugging Face folder -> checkpoint -> Hugging Face folder, tensor by tensor, in one process (tools/convert_hf.py).

A converted checkpoint, and every checkpoint of a run that starts from one, carries in `assets/` what the embedder has
no use for and an export gives back: config.json and tokenizer (hf_files.py), unused.safetensors (the vocabulary
projection, the tower's last norm), and tensors.json with the dtypes that the tensors came in.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors import safe_open
from torch import Tensor

from megatron_llave import checkpoint, config_file
from megatron_llave.config_checks import validate
from megatron_llave.config_model import ModelConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.hf_config import HfConfig, build_config_json, check_preset, read_config
from megatron_llave.hf_files import keep_side_files, write_side_files
from megatron_llave.hf_weights import (
    EMBEDDING,
    HF_EMBEDDING,
    LM_HEAD,
    POST_NORM,
    HfWeights,
    hf_shapes,
    layout_name,
    open_weights,
    pad_rows,
    require_whole,
    rules,
)
from megatron_llave.model.transformer_settings import DTYPES
from megatron_llave.pretrained import TOKENIZERS, Pretrained
from megatron_llave.tensor_files import CODES, DTYPE_CODES, SHARD_BYTES, whole_folder, write_tensor_files
from megatron_llave.weight_stream import model_without_memory, read_weights, write_weights

UNUSED_FILE = "unused.safetensors"
DTYPES_FILE = "tensors.json"
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def import_hf(source: str | Path, out: str | Path, groups: ProcessGroupCollection, preset: str | None = None) -> Path:
    """Write the weights of an HF folder as a checkpoint that loads at every layout.

    The weights keep their dtype, bf16 or fp32; float16 is widened to fp32, which loses nothing.

    Args:
        source: layout llava_onevision or llava_qwen, safetensors.
        out: the checkpoint's folder; must not exist.
        groups: of this single process.
        preset: the model the user takes it for; None: whatever config.json says.

    Raises:
        UserError: the folder is no such model, damaged, not whole, or contradicts the preset; or `out` is taken or
            cannot be written. No half-written checkpoint is left.
    """
    config = read_config(source)
    if preset is not None:
        check_preset(config.model, preset)
    weights = open_weights(source, config)
    used = {name: dtype for name, dtype in weights.dtypes.items() if not weights.is_unused(name)}
    for name, dtype in used.items():
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{source}: {weights.names[name]} is {dtype}; save it as float32 or less first")
    precision = "bf16" if set(used.values()) == {torch.bfloat16} else "fp32"
    cfg = replace(config.run, model=replace(config.model, precision=precision))
    validate(cfg)
    embedder = model_without_memory(cfg.model, groups)
    shapes = {name: tuple(parameter.shape) for name, parameter in embedder.named_parameters()}
    require_whole(weights, hf_shapes(shapes, cfg.model))
    table = rules(cfg.model)

    def read(name: str) -> Tensor:
        value = table[name].join([weights.read(theirs) for theirs in table[name].names])
        return pad_rows(value, shapes[name][0]).to(DTYPES[precision])

    with whole_folder(out, "checkpoint") as folder:
        write_weights(folder, cfg, embedder, groups, read)
        keep_assets(weights, folder / checkpoint.ASSETS)
    return Path(out)


def keep_assets(weights: HfWeights, folder: Path) -> None:
    """Write what an export gives back as it came into a new folder."""
    folder.mkdir()
    keep_side_files(weights.files.folder, folder)
    unused = [name for name in weights.unused if name != LM_HEAD or not _head_is_embedding(weights)]
    stored = {name: (weights.shape(name), weights.dtypes[name]) for name in unused}
    write_tensor_files(folder, stored, ((name, weights.read(name)) for name in unused), 2**63, UNUSED_FILE)
    dtypes = {name: CODES[dtype] for name, dtype in sorted(weights.dtypes.items())}
    (folder / DTYPES_FILE).write_text(json.dumps(dtypes, indent=0) + "\n")


def _head_is_embedding(weights: HfWeights) -> bool:
    """Tied weights of which the file holds both copies; the export copies the (perhaps trained) embedding again."""
    return weights.config.tied and torch.equal(weights.read(LM_HEAD), weights.read(HF_EMBEDDING))


def start_assets(output: Path, pretrained: Pretrained | None, tokenizer: Path) -> None:
    """Fill `assets/` of a run's folder, which its checkpoints then carry; one rank does it, before the first step.

    Args:
        output: the run's folder.
        pretrained: what the run starts from, if anything.
        tokenizer: the file that the run reads its tokenizer from.
    """
    folder = output / checkpoint.ASSETS
    shutil.rmtree(folder, ignore_errors=True)
    if pretrained is not None and pretrained.is_hf:
        keep_assets(open_weights(pretrained.folder, read_config(pretrained.folder)), folder)
    elif pretrained is not None and pretrained.assets.is_dir():
        shutil.copytree(pretrained.assets, folder, copy_function=checkpoint.link)
    folder.mkdir(exist_ok=True)
    if pretrained is None or str(tokenizer) != pretrained.find_tokenizer():
        for name in TOKENIZERS:
            (folder / name).unlink(missing_ok=True)
        shutil.copyfile(tokenizer, folder / f"tokenizer{tokenizer.suffix}")


@dataclass(frozen=True)
class Assets:
    """What a checkpoint carries of the HF folder its weights came from; empty for a model trained from scratch."""

    folder: Path | None
    config: HfConfig | None
    dtypes: dict[str, torch.dtype]
    """Of every tensor of the folder, by canonical name."""
    unused: Shapes
    """Of the tensors in unused.safetensors."""

    def read(self, name: str) -> Tensor:
        """One tensor of unused.safetensors."""
        with safe_open(self.folder / UNUSED_FILE, framework="pt") as handle:
            return handle.get_tensor(name)


def read_assets(folder: Path) -> Assets:
    """The assets in checkpoint folder `folder`.

    Raises:
        CheckpointError: they are damaged.
    """
    assets = folder / checkpoint.ASSETS
    if not (assets / DTYPES_FILE).is_file():
        return Assets(assets if assets.is_dir() else None, None, {}, {})
    try:
        codes = json.loads((assets / DTYPES_FILE).read_text())
        dtypes = {name: DTYPE_CODES[code] for name, code in codes.items()}
        with safe_open(assets / UNUSED_FILE, framework="pt") as handle:
            unused = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    except Exception as error:  # safetensors and json raise their own kinds; all mean that an export cannot be whole
        raise CheckpointError(f"{assets} is damaged: {' '.join(str(error).split())}") from error
    return Assets(assets, read_config(assets), dtypes, {name: (unused[name], dtypes[name]) for name in unused})


def export_hf(
    source: str | Path,
    out: str | Path,
    groups: ProcessGroupCollection,
    layout: str | None = None,
    dtype: str | None = None,
    average: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a checkpoint as an HF folder.

    Args:
        source: a checkpoint or a run's folder, saved at any layout.
        out: the HF folder; must not exist.
        groups: of this single process.
        layout: llava_onevision or llava_qwen; None: the one the weights came in, else llava_onevision.
        dtype: float32, bfloat16 or float16 for all tensors; None: each as it came, else as in the checkpoint.
        average: the averaged weights of a run with loss.reward=ema.
        shard_bytes: largest file of weights, unless one tensor is larger.

    Returns:
        Notes on what the folder lacks, such as a processor; none for a whole one.

    Raises:
        UserError: no checkpoint or a damaged one; `out` is taken or cannot be written; values too large for float16.
            No half-written folder is left.
    """
    folder = checkpoint.find(source)
    cfg = config_file.load(folder / checkpoint.CONFIG, leave_out=["parallel"])
    checkpoint.require_average(folder, cfg, average)
    assets = read_assets(folder)
    layout = layout or (assets.config.layout if assets.config else "llava_onevision")
    embedder = model_without_memory(cfg.model, groups)
    model = with_room_for_image_tokens(cfg.model, assets) if layout == "llava_onevision" else cfg.model
    plan = _plan_export(model, embedder, assets, layout, dtype and getattr(torch, dtype))
    tied = LM_HEAD not in plan or _is_copied_head(assets)
    common = {shape[1] for shape in plan.values()}
    dtype_name = str(common.pop()).removeprefix("torch.") if len(common) == 1 else "float32"
    config = build_config_json(model, layout, tied, dtype_name, assets.config)
    values = _export_values(folder, model, embedder, groups, assets, plan, average)
    named = {layout_name(name, layout): shape for name, shape in plan.items()}
    with whole_folder(out, "exported model") as partial:
        write_tensor_files(partial, named, ((layout_name(n, layout), v) for n, v in values), shard_bytes)
        trained = (folder / checkpoint.CONFIG).read_text() if cfg.train.steps else None
        notes = write_side_files(partial, layout, config, assets.folder, trained)
    return notes


def with_room_for_image_tokens(model: ModelConfig, assets: Assets) -> ModelConfig:
    """`model` with a vocabulary that has rows for <image> and <video>, two tokens that transformers' layout needs.

    An embedding cut to the tokenizer's size, as the released code cuts it in memory, has none left; rows of zeros are
    added to it. They are never used: visual tokens take their place.
    """
    file = None if assets.folder is None else assets.folder / "tokenizer.json"
    if file is None or not file.is_file():
        return model
    try:
        ids = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{file} is not a readable tokenizer.json: {' '.join(str(error).split())}") from error
    new = sum(token not in ids for token in ("<image>", "<video>"))
    rows = max(model.language.vocab_size, max(ids.values()) + 1 + new)
    return replace(model, language=replace(model.language, vocab_size=rows))


def _is_copied_head(assets: Assets) -> bool:
    return LM_HEAD in assets.dtypes and LM_HEAD not in assets.unused


def _plan_export(
    model: ModelConfig, embedder: torch.nn.Module, assets: Assets, layout: str, dtype: torch.dtype | None
) -> Shapes:
    """Shape and dtype of every tensor by canonical name, in the order of `_export_values`."""
    stored, table = DTYPES[model.precision], rules(model)
    plan: Shapes = {}
    for name, parameter in embedder.named_parameters():
        for theirs, shape in table[name].shapes(tuple(parameter.shape)).items():
            if name == EMBEDDING:
                shape = (model.language.vocab_size, *shape[1:])
            plan[theirs] = shape, dtype or assets.dtypes.get(theirs, stored)
        if name == EMBEDDING and _is_copied_head(assets):
            plan[LM_HEAD] = plan[HF_EMBEDDING][0], dtype or assets.dtypes[LM_HEAD]
    is_same_layout = assets.config is not None and assets.config.layout == layout
    for name, (shape, own) in assets.unused.items():
        if name == LM_HEAD:
            shape = (model.language.vocab_size, *shape[1:])
        if is_same_layout or name == LM_HEAD or name.startswith(POST_NORM):
            plan[name] = shape, dtype or own
    for kind in ("weight", "bias"):  # both layouts have it, though nothing uses it
        plan.setdefault(POST_NORM + kind, ((model.vision.hidden_size,), dtype or stored))
    return plan


def _export_values(
    folder: Path,
    model: ModelConfig,
    embedder: torch.nn.Module,
    groups: ProcessGroupCollection,
    assets: Assets,
    plan: Shapes,
    average: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Canonical name and value of every tensor of the plan, in its order."""
    table = rules(model)
    written = set()
    for name, value in read_weights(folder, embedder, groups, average):
        parts = dict(zip(table[name].names, table[name].split(value)))
        if name == EMBEDDING and _is_copied_head(assets):
            parts[LM_HEAD] = parts[HF_EMBEDDING]
        for theirs, part in parts.items():
            yield theirs, _cast(theirs, pad_rows(part, plan[theirs][0][0]), plan[theirs][1])
        written |= parts.keys()
    for name, (shape, dtype) in plan.items():
        if name in assets.unused:
            yield name, _cast(name, pad_rows(assets.read(name), shape[0]), dtype)
        elif name not in written:
            yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if dtype == torch.float16 and not torch.equal(cast.isfinite(), value.isfinite()):
        raise CheckpointError(f"{name} has values beyond float16's range; export with --dtype bfloat16 or float32")
    return cast

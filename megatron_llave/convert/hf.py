"""Hugging Face folder -> checkpoint -> Hugging Face folder, tensor by tensor, in one process (tools/convert_hf.py).

A converted checkpoint, and every checkpoint of a run that starts from one, carries in `assets/` what the embedder has
no use for and an export gives back: config.json and tokenizer, unused.safetensors (the vocabulary projection, the
tower's last norm), and tensors.json with the dtypes that the tensors came in.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.assets import Assets, Shapes, keep_assets, read_assets
from megatron_llave.checkpoint.stream import model_without_memory, read_weights, write_weights
from megatron_llave.config.checks import validate
from megatron_llave.config.load import load_config
from megatron_llave.config.model import ModelConfig
from megatron_llave.errors import CheckpointError
from megatron_llave.files import whole_folder
from megatron_llave.models.blocks.settings import DTYPES
from megatron_llave.models.hf.mapping import pad_rows
from megatron_llave.models.hf.tensor_files import SHARD_BYTES, write_tensor_files
from megatron_llave.models.llava_onevision.hf_config import build_config_json, check_preset, read_config
from megatron_llave.models.llava_onevision.hf_files import write_side_files
from megatron_llave.models.llava_onevision.hf_weights import (
    EMBEDDING,
    HF_EMBEDDING,
    LM_HEAD,
    POST_NORM,
    hf_shapes,
    layout_name,
    open_weights,
    require_whole,
    rules,
)


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
        keep_assets(weights, folder / folders.ASSETS)
    return Path(out)


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
    folder = folders.find(source)
    cfg = load_config(folder / folders.CONFIG, leave_out=["parallel"])
    folders.require_average(folder, cfg, average)
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
        trained = (folder / folders.CONFIG).read_text() if cfg.train.steps else None
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

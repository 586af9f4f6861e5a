"""Hugging Face folder -> checkpoint -> Hugging Face folder, tensor by tensor, in one process (llave convert).

A converted checkpoint, and every checkpoint of a run that starts from one, has in `assets/` what the embedder does not
use but an export gives back: config.json and tokenizer, unused.safetensors (the vocabulary projection and the last norm
of the vision encoder), and tensors.json with the original dtypes of the tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.assets import Assets, Shapes, keep_assets, read_assets
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.checkpoint.stream import read_weights, write_weights
from megatron_llave.config.checks import require_same_model, validate
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.model import ModelConfig
from megatron_llave.convert.training_record import shared_config, training_record
from megatron_llave.errors import CheckpointError, one_of, require
from megatron_llave.files import whole_folder
from megatron_llave.hub import name_of
from megatron_llave.models import family_of, model_without_memory, open_hf, read_hf_config
from megatron_llave.models.blocks.settings import DTYPES
from megatron_llave.models.hf.mapping import hf_shapes, pad_rows
from megatron_llave.models.hf.peft_files import find_weights
from megatron_llave.models.hf.tensor_files import SHARD_BYTES, write_tensor_files
from megatron_llave.models.hf.weights import HfFormat, HfWeights, require_complete


def import_hf(
    source: str | Path,
    out: str | Path,
    groups: ProcessGroupCollection,
    preset: str | None = None,
    base: str | Path | None = None,
    tell: Callable[[str], object] = lambda note: None,
) -> Path:
    """Write the weights of an HF folder as a checkpoint that loads at every parallel layout.

    Weights keep their dtype, bf16 or fp32; float16 becomes fp32, which loses nothing. A LoRA adapter is merged into
    them (models/hf/peft_files.py).

    Args:
        source: an HF folder of any known family and layout, with safetensors; or a folder with an adapter; or the name
            of either on the hub.
        out: folder of the checkpoint; must not exist.
        groups: process groups of this single process.
        preset: the preset whose sizes the model must have; None: any.
        base: folder of the weights that an adapter is for; None: `source`, or the folder that the adapter names.
        tell: is called with each note about the folder (HfConfig.notes).

    Raises:
        UserError: the folder is no known model, damaged, incomplete, or contradicts the preset; or `out` exists or
            cannot be written. No partial checkpoint is left.
    """
    source, adapter = find_weights(source, base)
    config = read_hf_config(source, with_adapter=source == adapter)
    if preset is not None:
        check_preset(config.model, preset)
    weights = open_hf(source, config, adapter)
    precision = precision_of(weights)
    origin = replace(config.run.checkpoint, init=name_of(source))
    cfg = replace(config.run, model=replace(config.model, precision=precision), checkpoint=origin)
    validate(cfg)
    embedder = model_without_memory(cfg.model, groups)
    shapes = {name: tuple(parameter.shape) for name, parameter in embedder.named_parameters()}
    rules = weights.format.rules(cfg.model)
    require_complete(weights, hf_shapes(shapes, rules))

    def read(name: str) -> Tensor:
        value = rules[name].join([weights.read(theirs) for theirs in rules[name].names])
        return pad_rows(value, shapes[name][0]).to(DTYPES[precision])

    with whole_folder(out, "checkpoint") as folder:
        write_weights(folder, cfg, embedder, groups, read)
        keep_assets(weights, folder / folders.ASSETS)
        folders.write_manifest(folder, 0, None)
    for note in config.notes:
        tell(note)
    return Path(out)


def precision_of(weights: HfWeights) -> str:
    """Return model.precision of a checkpoint of these weights: bf16 if all that are used are bfloat16, else fp32.

    Raises:
        CheckpointError: one of them has a dtype that fp32 cannot hold.
    """
    used = {name: dtype for name, dtype in weights.dtypes.items() if not weights.is_unused(name)}
    for name, dtype in used.items():
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            what = f"{weights.files.folder}: {weights.names[name]} is {dtype}"
            raise CheckpointError(f"{what}; save it as float32 or less first")
    return "bf16" if set(used.values()) == {torch.bfloat16} else "fp32"


def check_preset(model: ModelConfig, preset: str) -> None:
    """Refuse a model that is not of the preset's sizes; the vocabulary's size and the tile grids may differ.

    Raises:
        ConfigError: names the first key that differs and both values, or a preset that Hugging Face folders of the
            model's family do not have.
    """
    one_of("preset", preset, family_of(model).hf.presets)
    require_same_model(config_from_dict({"model": {"preset": preset}}).model, model, "config.json")


def export_hf(
    source: str | Path,
    out: str | Path,
    groups: ProcessGroupCollection,
    layout: str | None = None,
    dtype: str | None = None,
    average: bool = False,
    shard_bytes: int = SHARD_BYTES,
    base: str | None = None,
) -> list[str]:
    """Write a checkpoint as an HF folder; adapters are merged into the weights that they are for.

    Args:
        source: a checkpoint or output directory, saved at any parallel layout.
        out: the HF folder; must not exist.
        groups: process groups of this single process.
        layout: one of the family's; None: the one that the weights came in, else the family's first.
        dtype: float32, bfloat16 or float16 for all tensors; None: the dtype that each tensor was imported with, else
            that of the checkpoint.
        average: export the averaged weights of a run with loss.reward=ema.
        shard_bytes: bytes of the largest file of weights, unless a single tensor is larger.
        base: folder of the weights that the checkpoint's adapters are for; None: where they were.

    Returns:
        Notes on what the folder lacks, such as a processor; none for a complete one.

    Raises:
        UserError: the checkpoint is missing or damaged; `base` is given for one that holds all of its weights; `out`
            exists or cannot be written; values are too large for float16. No partial folder is left.
    """
    folder = folders.find(source)
    cfg = folders.saved_config(folder)
    folders.require_average(folder, cfg, average)
    ok = base is None or cfg.lora.leaves_out_base
    require(ok, f"--base {base}: {folder} holds all of its weights; leave out --base, which is for adapters alone")
    assets = read_assets(folder)
    hf = family_of(cfg.model).hf
    layout = export_layout(cfg.model, assets, layout)
    embedder = model_without_memory(cfg.model, groups)
    model = hf.room_for_tokens(cfg.model, layout, assets.folder)
    plan = _plan_export(model, embedder, assets, layout, dtype and getattr(torch, dtype))
    tied = hf.lm_head not in plan or _is_copied_head(assets, hf)
    common = {shape[1] for shape in plan.values()}
    dtype_name = str(common.pop()).removeprefix("torch.") if len(common) == 1 else "float32"
    config = hf.build_config(model, layout, tied, dtype_name, assets.config)
    if cfg.lora.rank:
        parameters = _merged_weights(folder, embedder, groups, average, base)
    else:
        parameters = read_weights(folder, embedder, groups, average)
    values = _export_values(parameters, model, assets, plan)
    plan, values = _with_rows(plan, values, hf.embedding, hf.embedding_rows(config))
    named = {hf.layout_name(name, layout): shape for name, shape in plan.items()}
    with whole_folder(out, "exported model") as partial:
        write_tensor_files(partial, named, ((hf.layout_name(n, layout), v) for n, v in values), shard_bytes)
        notes = hf.write_files(partial, layout, config, assets.folder, shared_config(folder, cfg))
        with (partial / "README.md").open("a", encoding="utf-8") as card:
            card.write(training_record(folder, cfg))
    return notes


def export_layout(model: ModelConfig, assets: Assets, layout: str | None) -> str:
    """Return the layout of an export: the given one, else that which the weights came in, else the family's first.

    The last two must be able to describe the model.

    Raises:
        ConfigError: the family has no such layout.
    """
    hf = family_of(model).hf
    if layout is None:
        preferred = [*([assets.config.layout] if assets.config else []), *hf.layouts]
        return next((known for known in preferred if hf.can_hold(model, known)), preferred[0])
    one_of("format", layout, hf.layouts)
    return layout


def _is_copied_head(assets: Assets, hf: HfFormat) -> bool:
    return hf.lm_head in assets.dtypes and hf.lm_head not in assets.unused


def _plan_export(
    model: ModelConfig, embedder: torch.nn.Module, assets: Assets, layout: str, dtype: torch.dtype | None
) -> Shapes:
    """Return shape and dtype of every tensor by canonical name, in the order of `_export_values`."""
    hf = family_of(model).hf
    stored, rules, vocabulary = DTYPES[model.precision], hf.rules(model), model.language.vocab_size
    plan: Shapes = {}
    for name, parameter in embedder.named_parameters():
        for theirs, shape in rules[name].shapes(tuple(parameter.shape)).items():
            shape = (vocabulary, *shape[1:]) if theirs == hf.embedding else shape
            plan[theirs] = shape, dtype or assets.dtypes.get(theirs, stored)
            if theirs == hf.embedding and _is_copied_head(assets, hf):
                plan[hf.lm_head] = shape, dtype or assets.dtypes[hf.lm_head]
    in_every_layout = hf.unused_shapes(model)
    is_same_layout = assets.config is not None and assets.config.layout == layout
    for name, (shape, came_in) in assets.unused.items():
        if name.endswith(".inv_freq"):  # a buffer of old folders, which transformers computes and does not expect
            continue
        if name == hf.lm_head:
            shape = (vocabulary, *shape[1:])
        if is_same_layout or name == hf.lm_head or name in in_every_layout:
            plan[name] = shape, dtype or came_in
    for name, shape in in_every_layout.items():
        plan.setdefault(name, (shape, dtype or stored))
    return plan


def _merged_weights(
    folder: Path, embedder: torch.nn.Module, groups: ProcessGroupCollection, average: bool, base: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter with its adapters merged. The complete model is in memory."""
    model = embedder.to_empty(device="cpu")
    find_pretrained(folder).load([model], groups, average, base)
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def _export_values(
    parameters: Iterable[tuple[str, Tensor]], model: ModelConfig, assets: Assets, plan: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """Yield canonical name and value of every tensor of the plan, in its order, given all parameters."""
    hf, written = family_of(model).hf, set()
    rules = hf.rules(model)
    for name, value in parameters:
        parts = dict(zip(rules[name].names, rules[name].split(value)))
        if hf.embedding in parts and _is_copied_head(assets, hf):
            parts[hf.lm_head] = parts[hf.embedding]
        for theirs, part in parts.items():
            yield theirs, _cast(theirs, pad_rows(part, plan[theirs][0][0]), plan[theirs][1])
        written |= parts.keys()
    for name, (shape, dtype) in plan.items():
        if name in assets.unused:
            yield name, _cast(name, pad_rows(assets.read(name), shape[0]), dtype)
        elif name not in written:
            yield name, torch.full(shape, float(name.endswith("weight")), dtype=dtype)


def _with_rows(
    plan: Shapes, values: Iterator[tuple[str, Tensor]], embedding: str, rows: Mapping[str, int]
) -> tuple[Shapes, Iterator[tuple[str, Tensor]]]:
    """Return plan and values of a folder in which some tensors are rows of the embedding, which then comes last."""
    if not rows:
        return plan, values

    def others_first() -> Iterator[tuple[str, Tensor]]:
        kept = {}
        for name, value in values:
            if name in rows or name == embedding:
                kept[name] = value
            else:
                yield name, value
        table = kept[embedding].clone()
        for name, row in rows.items():
            table[row] = kept[name]
        yield embedding, table

    others = {name: shape for name, shape in plan.items() if name not in rows and name != embedding}
    return others | {embedding: plan[embedding]}, others_first()


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if dtype == torch.float16 and not torch.equal(cast.isfinite(), value.isfinite()):
        raise CheckpointError(f"{name} has values beyond float16's range; export with --dtype bfloat16 or float32")
    return cast

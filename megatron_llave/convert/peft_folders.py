"""Adapters between checkpoints and folders in the layout of PEFT: adapter_config.json, adapter_model.safetensors.

The matrices are copied bit by bit, but for a change of their dtype. models/hf/peft_files.py reads and writes the files.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.adapters import read_adapters, write_adapters
from megatron_llave.checkpoint.assets import keep_assets, read_assets
from megatron_llave.checkpoint.pretrained import find_pretrained, read_base
from megatron_llave.config.lora import LoraConfig
from megatron_llave.config.schema import RunConfig
from megatron_llave.convert.hf import check_preset, export_layout, precision_of
from megatron_llave.convert.training_record import training_record
from megatron_llave.errors import CheckpointError, require
from megatron_llave.files import whole_folder
from megatron_llave.hub import is_pinned
from megatron_llave.models import family_of, open_hf, read_hf_config
from megatron_llave.models.hf.model_card import base_model, model_card
from megatron_llave.models.hf.peft_files import find_weights, write_adapter
from megatron_llave.models.hf.weights import HfWeights, require_plausible
from megatron_llave.models.lora import HfAdapter, targets_of

ANY_OWNER = r"[\w-]+"
CARD_TEXT = """LoRA adapters of a multimodal embedding model, rank {rank}, alpha {alpha:g}, for {targets}."""
CARD_LOAD = """`peft.PeftModel.from_pretrained(base, folder)` adds them to the base that they were trained for. The
embedding is the last token's hidden state after the decoder's final norm, divided by its length. The prompt is that of
`data.prompt: {prompt}`."""
CARD_BASE = """
The files of megatron_llave or Hugging Face from which the training read that base have, over their names and contents,
the SHA-256 `{sha256}`. It identifies these files alone:
the same weights have another one after a conversion, so that another one does not mean other embeddings."""


def export_adapter(
    source: str | Path,
    out: str | Path,
    groups: ProcessGroupCollection,
    layout: str | None = None,
    dtype: str | None = None,
    average: bool = False,
) -> None:
    """Write the adapters of a checkpoint as a folder that PEFT loads.

    Args:
        source: a checkpoint or output directory with adapters.
        out: the folder; must not exist.
        groups: process groups of this single process.
        layout: that of the base's folder, one of the family's; None: the one that the base came in, else the first.
        dtype: float32, bfloat16 or float16; None: that of the checkpoint.
        average: export the averages of a run with loss.reward=ema.

    Raises:
        UserError: the checkpoint is missing, damaged or without adapters; `out` exists or cannot be written.
    """
    folder = folders.find(source)
    cfg = folders.saved_config(folder)
    require(cfg.lora.rank > 0, f"{folder} has no adapters: lora.rank=0; leave out --adapter")
    folders.require_average(folder, cfg, average)
    assets, hf = read_assets(folder), family_of(cfg.model).hf
    layout = export_layout(cfg.model, assets, layout)
    as_type = (lambda x: x.to(getattr(torch, dtype))) if dtype else (lambda x: x)
    found = read_adapters(folder, cfg, groups, average)
    matrices = {hf.module_name(a.module, layout): (as_type(a.down), as_type(a.up)) for a in found}
    place = read_base(folder).source if cfg.lora.leaves_out_base else ""
    base, revision = place.split("@") if is_pinned(place) else (base_model(assets.folder, ANY_OWNER), None)
    with whole_folder(out, "exported adapters") as target:
        write_adapter(target, matrices, cfg.lora, base, revision)
        (target / "README.md").write_text(_card(folder, cfg, layout, base), encoding="utf-8")


def _card(folder: Path, cfg: RunConfig, layout: str, base: str | None) -> str:
    lora = cfg.lora
    what = [CARD_TEXT.format(rank=lora.rank, alpha=lora.alpha, targets=", ".join(lora.targets))]
    embed = [CARD_LOAD.format(prompt=cfg.data.prompt)]
    if lora.leaves_out_base:
        embed += [CARD_BASE.format(sha256=read_base(folder).sha256)]
    card = model_card(["library_name: peft"], base, ["lora", "llave", layout], what, embed)
    return card + training_record(folder, cfg)


def import_adapter(
    source: str | Path,
    out: str | Path,
    groups: ProcessGroupCollection,
    preset: str | None = None,
    base: str | Path | None = None,
    tell: Callable[[str], object] = lambda note: None,
) -> Path:
    """Write the adapters of a folder in PEFT's layout as a checkpoint of adapters, which a run can train on.

    Args:
        source: the folder with the adapters.
        out: folder of the checkpoint; must not exist.
        groups: process groups of this single process.
        preset: the preset whose sizes the base must have; None: any.
        base: Hugging Face folder that they are for; None: `source`, or the folder that they name.
        tell: is called with each note about the base's folder.

    Raises:
        UserError: the adapters are damaged, do not fit the base, or are not of one rank and alpha on all layers; the
            base is damaged or contradicts the preset; `out` exists or cannot be written.
    """
    base_folder, adapter = find_weights(source, base)
    if adapter is None:
        raise CheckpointError(f"{source} has no adapter_config.json; --keep-adapter is for a folder of PEFT")
    if adapter == base_folder:
        raise CheckpointError(f"{source} holds weights beside its adapters; name a folder of weights alone with --base")
    config = read_hf_config(base_folder)
    if preset is not None:
        check_preset(config.model, preset)
    weights = open_hf(base_folder, config, adapter)
    require_plausible(weights)
    found = _hf_adapters(weights)
    rules = weights.format.rules(config.model)
    targets = targets_of((a.module for a in found), rules)
    ranks = {(a.down.shape[0], a.scale) for a in found}
    if targets is None or len(ranks) > 1:
        what = "has adapters on some layers alone" if targets is None else f"has several ranks and scales: {ranks}"
        raise CheckpointError(f"{source} {what}; import it without --keep-adapter, which merges it")
    [(rank, scale)] = ranks
    lora = LoraConfig(rank=rank, alpha=rank * scale, targets=targets)
    cfg = replace(config.run, model=replace(config.model, precision=precision_of(weights)), lora=lora)
    record = find_pretrained(base_folder).as_base(None)
    write_adapters(out, cfg, groups, found, record, partial(keep_assets, replace(weights, adapter=None)))
    for note in config.notes:
        tell(note)
    return Path(out)


def _hf_adapters(weights: HfWeights) -> list[HfAdapter]:
    assert weights.adapter is not None
    read = weights.adapter.files.read
    return [
        HfAdapter(name.removesuffix(".weight"), read(update.down), read(update.up), update.scale)
        for name, update in weights.adapter.updates.items()
    ]

"""Adapters of a checkpoint apart from the weights that they are for: read, written as a checkpoint, and averaged.

Runs write them with their optimizer state (state.py). These functions know adapters alone, in one process, and are used
by convert/peft_folders.py and merge.py.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.merged_parts import describe_parts
from megatron_llave.checkpoint.pretrained import BASE, Base, read_base
from megatron_llave.checkpoint.stream import read_weights, write_weights
from megatron_llave.config.schema import RunConfig
from megatron_llave.errors import CheckpointError, require
from megatron_llave.files import whole_folder, write_json
from megatron_llave.models import family_of, model_without_memory
from megatron_llave.models.lora import HfAdapter, hf_adapters, is_adapter, our_adapters


def read_adapters(
    folder: Path, cfg: RunConfig, groups: ProcessGroupCollection, average: bool = False
) -> list[HfAdapter]:
    """Read the adapters of a checkpoint that was saved at any parallel layout.

    Args:
        folder: the checkpoint.
        cfg: the configuration in it.
        groups: process groups of this single process.
        average: read the averages of a run with loss.reward=ema.

    Raises:
        CheckpointError: the files are damaged or hold other adapters.
    """
    embedder = model_without_memory(cfg.model, groups, cfg.lora)
    tensors = dict(read_weights(folder, embedder, groups, average, is_adapter))
    return list(hf_adapters(tensors, family_of(cfg.model).hf.rules(cfg.model), cfg.lora.scale))


def write_adapters(
    out: str | Path,
    cfg: RunConfig,
    groups: ProcessGroupCollection,
    adapters: Sequence[HfAdapter],
    base: Base,
    write_assets: Callable[[Path], object],
    more: Mapping[str, Any] = {},
) -> None:
    """Write a checkpoint of adapters alone, which a run can start from.

    Args:
        out: folder of the checkpoint; must not exist.
        cfg: a configuration whose section `lora` describes the adapters.
        groups: process groups of this single process.
        adapters: all that cfg.lora.targets names.
        base: the weights that they are for.
        write_assets: is called with the folder of the assets, which it makes and fills, but for BASE.
        more: further keys of the manifest.

    Raises:
        CheckpointError: `out` exists or cannot be written. No partial folder is left.
    """
    cfg = replace(
        cfg,
        lora=replace(cfg.lora, save_base=False, base=None),
        checkpoint=replace(cfg.checkpoint, init=base.source, resume=None),
    )
    embedder = model_without_memory(cfg.model, groups, cfg.lora)
    tensors = our_adapters(adapters, family_of(cfg.model).hf.rules(cfg.model))
    dtypes = {name: parameter.dtype for name, parameter in embedder.named_parameters()}
    with whole_folder(out, "checkpoint") as folder:
        write_weights(folder, cfg, embedder, groups, lambda name: tensors[name].to(dtypes[name]), is_adapter)
        write_assets(folder / folders.ASSETS)
        (folder / folders.ASSETS / BASE).unlink(missing_ok=True)  # it may be a link
        write_json(folder / folders.ASSETS / BASE, asdict(base))
        folders.write_manifest(folder, 0, None, more)


def merge_adapter_checkpoints(
    sources: Sequence[Path],
    shares: Sequence[float],
    cfgs: Sequence[RunConfig],
    out: Path,
    groups: ProcessGroupCollection,
) -> None:
    """Write adapters whose change of the weights is the weighted mean of those of several checkpoints of one base.

    The mean of products B A is not the product of means, so each of the new matrices holds those of all checkpoints:
    its rank is the sum of their ranks, and the mean is exact up to the rounding of these matrices to the model's
    precision.

    Args:
        sources: checkpoints of adapters.
        shares: of each in the mean.
        cfgs: the configurations in them; that of the first is taken for the result, with the new rank.
        out: folder of the checkpoint; must not exist.
        groups: process groups of this single process.

    Raises:
        ConfigError: the checkpoints have other targets, or some have no adapters or the base beside them.
        CheckpointError: a checkpoint is damaged, or `out` exists or cannot be written.
    """
    first = cfgs[0].lora
    for folder, cfg in zip(sources, cfgs):
        ok = cfg.lora.leaves_out_base and set(cfg.lora.targets) == set(first.targets)
        what = f"{folder} has lora.rank={cfg.lora.rank}, lora.targets={cfg.lora.targets}"
        require(ok, f"{what}; to be merged with {sources[0]} it must be adapters alone, of {first.targets}")
    bases = [read_base(folder) for folder in sources]
    other = [folder for folder, base in zip(sources, bases) if base.sha256 != bases[0].sha256]
    if other:
        raise CheckpointError(f"{other[0]} and {sources[0]} hold adapters for different weights")
    described = describe_parts(sources, shares, cfgs)
    rank = sum(cfg.lora.rank for cfg in cfgs)
    parts = [
        {adapter.module: adapter for adapter in read_adapters(folder, cfg, groups)}
        for folder, cfg in zip(sources, cfgs)
    ]
    adapters = []
    for module in parts[0]:
        every = [part[module] for part in parts]
        up = torch.cat([share * a.scale * a.up.float() for share, a in zip(shares, every)], dim=1)
        adapters.append(HfAdapter(module, torch.cat([a.down.float() for a in every]), up, 1.0))
    cfg = replace(cfgs[0], lora=replace(first, rank=rank, alpha=float(rank)))
    copy = partial(shutil.copytree, sources[0] / folders.ASSETS, copy_function=folders.link)
    write_adapters(out, cfg, groups, adapters, bases[0], copy, described)

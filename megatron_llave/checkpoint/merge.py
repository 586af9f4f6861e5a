"""Weighted mean of the weights of several checkpoints of one model, tensor by tensor, in one process (llave merge).

The study of freezing uses it to interpolate between a run with a frozen vision encoder and a run without. It also gives
the mean of runs with different seeds or data ("model soup", arXiv 2203.05482).
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.adapters import merge_adapter_checkpoints
from megatron_llave.checkpoint.merged_parts import describe_parts
from megatron_llave.checkpoint.stream import read_weights, write_weights
from megatron_llave.config.checks import require_same_model
from megatron_llave.data.tokenizer import TOKENIZERS
from megatron_llave.errors import CheckpointError, require
from megatron_llave.files import whole_folder
from megatron_llave.models import model_without_memory

MOST = 1000
"""The largest absolute share of a checkpoint."""


def merge(parts: Sequence[tuple[str | Path, float]], out: str | Path, groups: ProcessGroupCollection) -> Path:
    """Write the weighted mean of checkpoints as a checkpoint of weights alone, which loads at every layout.

    Sums are in float32; the result has the precision, configuration and tokenizer of the first checkpoint. About one
    layer of each checkpoint is in memory at a time. Of checkpoints with adapters alone, these are merged (adapters.py).

    Args:
        parts: (checkpoint or output directory, share) of each; the shares add up to 1 and may be negative.
        out: the checkpoint's folder; must not exist.
        groups: process groups of this single process.

    Raises:
        ConfigError: fewer than two parts, shares that do not add up to 1, or checkpoints of different models.
        CheckpointError: a checkpoint is missing or damaged, or `out` exists or cannot be written. No partial folder is
            left.
    """
    shares = [share for _, share in parts]
    require(len(parts) >= 2, "a merge needs at least two checkpoints")
    ok = all(map(math.isfinite, shares)) and abs(sum(shares) - 1) < 1e-6
    require(ok, f"shares {', '.join(f'{share:g}' for share in shares)} must add up to 1, not {sum(shares):g}")
    largest = max(shares, key=abs)
    require(
        abs(largest) <= MOST,
        f"share {largest:g} is too large: the mean would be of rounding errors; at most {MOST} is possible",
    )
    sources = [folders.find(path) for path, _ in parts]
    cfgs = [folders.saved_config(folder) for folder in sources]
    for folder, cfg in zip(sources[1:], cfgs[1:]):
        require_same_model(cfg.model, cfgs[0].model, f"the weights in {sources[0]}")
        require_same_tokenizer(sources[0], folder)
    # The averages of runs with loss.reward=ema are not merged, so the result has none.
    reward = "self" if cfgs[0].loss.reward == "ema" else cfgs[0].loss.reward
    cfg = replace(cfgs[0], loss=replace(cfgs[0].loss, reward=reward))
    if any(cfg.lora.rank for cfg in cfgs):
        merge_adapter_checkpoints(sources, shares, [cfg, *cfgs[1:]], Path(out), groups)
        return Path(out)
    described = describe_parts(sources, shares, cfgs)
    embedder = model_without_memory(cfg.model, groups)
    streams = [
        read_weights(folder, model_without_memory(part_cfg.model, groups), groups)
        for folder, part_cfg in zip(sources, cfgs)
    ]
    dtypes = {name: parameter.dtype for name, parameter in embedder.named_parameters()}

    def read(name: str) -> Tensor:
        names, values = zip(*(next(stream) for stream in streams))
        assert set(names) == {name}, f"{name} is asked for, the checkpoints give {names}"
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise CheckpointError(f"{name} has the shapes {sorted(shapes)} in the checkpoints; they are no one model's")
        total = sum(share * value.float() for share, value in zip(shares, values))
        return total.to(dtypes[name])

    with whole_folder(out, "merged checkpoint") as folder:
        write_weights(folder, cfg, embedder, groups, read)
        if (sources[0] / folders.ASSETS).is_dir():
            shutil.copytree(sources[0] / folders.ASSETS, folder / folders.ASSETS, copy_function=folders.link)
        folders.write_manifest(folder, 0, None, described)
    return Path(out)


def require_same_tokenizer(one: Path, other: Path) -> None:
    """Refuse checkpoints whose tokenizers differ.

    Raises:
        CheckpointError: names both files.
    """
    for name in TOKENIZERS:
        files = [folder / folders.ASSETS / name for folder in (one, other)]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            raise CheckpointError(f"{files[0]} and {files[1]} differ: these models do not read the same token ids")

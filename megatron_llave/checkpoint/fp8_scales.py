"""The scales of model.fp8_recipe=delayed in a checkpoint: plain tensors, one dictionary for each layer of a chunk.

Delayed scaling rounds a tensor by the largest magnitudes of earlier steps, so a run that resumes needs them, and so
does an evaluation, which never updates them. The other recipes have no such state. Transformer Engine pickles the
scales into the extra state of a layer and refuses to unpickle them (since 2.20). Therefore they are read from the layer
here, and its sharded extra state only says under which key and by which rank they are saved. They are equal on all
ranks that hold the layer.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor
from torch.nn import Module

from megatron_llave.checkpoint.safe_reads import read_metadata

logger = logging.getLogger(__name__)

SCALES = ".fp8_scales"
"""What the name of a layer is followed by in the name of its scales."""
EXTRA = "._extra_state"
"""What it is followed by in the name under which torch keeps what a layer adds to its parameters in a state dict."""
TENSORS_PER_PRODUCT = 3
"""Scales of a layer's forward pass for each of its matrix products: input, weight, output."""


def saved_scales(chunk: Module, metadata: dict) -> dict[str, ShardedObject]:
    """Return the scales of every layer of a model chunk that has some, by the layer's name and SCALES."""
    scales = {}
    for name, state in _places(chunk, metadata).items():
        tensors = _tensors_of(chunk.get_submodule(name.removesuffix(SCALES)))
        if tensors:
            copies = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            scales[name] = replace(state, data=copies)
    return scales


def requested_scales(chunk: Module, metadata: dict, folder: Path) -> dict[str, ShardedObject]:
    """Return what is to be loaded from checkpoint `folder`: scales that are in it and that this chunk uses.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    places = _places(chunk, metadata)
    if not places:
        return {}
    held = read_metadata(folder).state_dict_metadata
    requested = {name: place for name, place in places.items() if place.unique_key in held}
    if not requested and dist.get_rank() == 0:
        logger.warning(
            "checkpoint %s has no scales for model.fp8_recipe=delayed: until training has set them, all are 1, which "
            "embeds badly",
            folder,
        )
    return requested


def load_scales(chunk: Module, loaded: dict[str, dict[str, Tensor]]) -> None:
    """Put scales into the layers of a chunk.

    Args:
        chunk: a model chunk with model.fp8_recipe=delayed, unless `loaded` is empty.
        loaded: what was loaded for `requested_scales`.
    """
    if not loaded:
        return
    with torch.no_grad(), get_fp8_context(chunk.config):
        for name, scales in loaded.items():
            layer = chunk.get_submodule(name.removesuffix(SCALES))
            layer.init_fp8_metadata(num_gemms=len(scales["scale_fwd"]) // TENSORS_PER_PRODUCT)
            for key, tensor in _tensors_of(layer).items():
                tensor.copy_(scales[key])


def _places(chunk: Module, metadata: dict) -> dict[str, ShardedObject]:
    """Return where scales are saved, without them, by the layer's name and SCALES; nothing unless they are delayed."""
    if not (chunk.config.fp8 and chunk.config.fp8_recipe == "delayed"):
        return {}
    states = {name: part for name, part in chunk.sharded_state_dict(metadata=metadata).items() if name.endswith(EXTRA)}
    return {
        name.removesuffix(EXTRA) + SCALES: replace(part, key=part.key.removesuffix(EXTRA) + SCALES, data=None)
        for name, part in states.items()
    }


def _tensors_of(layer: Module) -> dict[str, Tensor]:
    """Return a layer's scales [k] and histories of magnitudes [length, k], as they are in use; none outside of FP8."""
    meta = getattr(layer, "fp8_meta", {})
    if not hasattr(meta.get("scaling_fwd"), "amax_history"):
        return {}
    tensors = {}
    for way in ("fwd", "bwd"):
        tensors[f"scale_{way}"] = meta[f"scaling_{way}"].scale
        tensors[f"amax_history_{way}"] = meta[f"scaling_{way}"].amax_history
    return tensors

"""Weights of a checkpoint, written and read one after the other, without the complete model in memory.

Used by convert/hf.py and merge.py. The files are those of folders.py (megatron-core's torch_dist format) and load at
every parallel layout. megatron-core's own writer needs all tensors at once; here torch's distributed checkpoint asks
for each tensor when it is written.
"""

import copy
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.nn import Module

from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.safe_reads import WeightsReader, check_objects, safe_reads
from megatron_llave.checkpoint.state import sharded_parameters, state_metadata
from megatron_llave.config.load import save_config
from megatron_llave.config.schema import RunConfig

FILE = "__0_0.distcp"


def write_weights(
    folder: Path,
    cfg: RunConfig,
    embedder: Module,
    groups: ProcessGroupCollection,
    read: Callable[[str], Tensor],
    is_held: Callable[[str], bool] = lambda name: True,
) -> None:
    """Write a checkpoint of weights alone, step 0, into an empty folder.

    Args:
        folder: an existing, empty folder.
        cfg: the configuration that `embedder` was built from; it is saved too.
        embedder: a model of `models.model_without_memory`.
        groups: process groups of this single process.
        read: returns the value of a parameter by name, on the CPU; called once for each, in the order of the file.
        is_held: whether the checkpoint holds the parameter of this name.

    Raises:
        OSError: the disk is full, or cannot be written for another reason.
    """
    metadata = state_metadata(groups)
    state = {name: part for name, part in sharded_parameters(embedder, metadata).items() if is_held(name)}
    apply_factories(state)
    places = {}
    for name, parts in _parts(state).items():
        places |= {(part.key, part.global_offset): (name, i, len(parts)) for i, part in enumerate(parts)}
    strategy = copy.copy(get_default_save_sharded_strategy())
    strategy.save = lambda leaves, path: torch_checkpoint.save(
        {},
        storage_writer=_StreamWriter(path),
        planner=_StreamPlanner(list(nested_values(leaves)), _Values(places, read)),
        no_dist=True,
    )
    metadata.pop("dp_cp_group")
    state = {"model": state, "step": 0}
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=metadata)
    except CheckpointException as error:
        raise folders.failure(error) from error
    save_config(cfg, folder / folders.CONFIG)


def _parts(state: dict) -> dict[str, list[ShardedTensor]]:
    """Return the tensors that each parameter is saved as, factories applied: one, or the halves of a gated matrix."""
    return {name: parts if isinstance(parts, list) else [parts] for name, parts in state.items()}


class _Values:
    """Values of parameters, or of halves of them, read one after the other; only the last one is kept in memory."""

    def __init__(self, places: dict[tuple, tuple[str, int, int]], read: Callable[[str], Tensor]) -> None:
        self.places, self.read = places, read
        self.name, self.value = "", None

    def __call__(self, key: str, offset: tuple[int, ...]) -> Tensor:
        name, index, count = self.places[key, offset]
        if name != self.name:
            self.value = None  # before the next one is read
            self.name, self.value = name, self.read(name)
        return self.value.chunk(count)[index]


class _StreamPlanner(torch_checkpoint.DefaultSavePlanner):
    """Plans megatron-core's sharded tensors as torch plans its own, and reads a value when it is written."""

    def __init__(self, parts: list[ShardedBase], values: _Values) -> None:
        super().__init__(flatten_state_dict=False)
        self.parts, self.values = parts, values

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(map(_write_item, self.parts)))
        self.objects = {part.unique_key: part for part in self.parts if isinstance(part, ShardedObject)}
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return [self.objects[index.fqn].data]
        value = self.values(index.fqn, tuple(index.offset))
        return value.reshape(write_item.tensor_data.chunk.sizes)


def _write_item(part: ShardedBase) -> WriteItem:
    """Describe a part of a tensor, as a layer's parameter is one of a tensor over all layers, or an object.

    megatron-core 0.19 stores what is common to all ranks as an object.
    """
    if isinstance(part, ShardedObject):
        return WriteItem(MetadataIndex(part.unique_key), WriteItemType.BYTE_IO)
    data = TensorWriteData(_chunk(part), TensorProperties(dtype=part.dtype), torch.Size(part.global_shape))
    return WriteItem(MetadataIndex(part.key, data.chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _chunk(part: ShardedTensor) -> ChunkStorageMetadata:
    sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return ChunkStorageMetadata(torch.Size(part.global_offset), torch.Size(sizes))


class _StreamWriter(torch_checkpoint.FileSystemWriter):
    """Writes one file tensor by tensor; torch's own writer keeps all tensors of a file in memory."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with open(Path(self.path) / FILE, "wb") as stream:
            for item in plan.items:
                start = stream.tell()
                data = planner.resolve_data(item)
                if isinstance(data, Tensor) and data.untyped_storage().nbytes() != data.nbytes:
                    data = data.clone()  # torch.save writes all of a view's storage
                _save(data, stream)
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(FILE, start, length)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _save(data: Any, stream: BinaryIO) -> None:
    try:
        torch.save(data, stream)
    except RuntimeError as error:
        # On a full disk torch's zip writer fails again when it is closed, and its error hides that of the disk.
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def read_weights(
    folder: Path,
    embedder: Module,
    groups: ProcessGroupCollection,
    average: bool = False,
    is_held: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, in the model's order; about one layer at a time is in memory.

    Args:
        folder: a checkpoint that was saved at any parallel layout.
        embedder: the checkpoint's model from `models.model_without_memory`.
        groups: process groups of this single process.
        average: read the averaged weights; frozen parameters have none and are read as they are.
        is_held: whether the checkpoint holds the parameter of this name; others are left out.

    Raises:
        CheckpointError: the files are damaged or hold another model.
    """
    trained = {name for name, parameter in embedder.named_parameters() if parameter.requires_grad}
    state = sharded_parameters(embedder, state_metadata(groups))
    apply_factories(state)
    parts = _parts(state)
    check_objects(folder)
    reader = WeightsReader(folder)
    held = [item for item in embedder.named_parameters() if is_held(item[0])]
    for _, layer in groupby(held, lambda item: _layer_of(item[0])):
        values, requests = {}, []
        for name, parameter in layer:
            is_average = average and name in trained
            dtype = torch.float32 if is_average else parameter.dtype
            values[name] = torch.empty(parameter.shape, dtype=dtype)
            halves = values[name].chunk(len(parts[name]))
            prefix = folders.AVERAGE if is_average else ""
            requests += [(prefix + part.key, part, half) for part, half in zip(parts[name], halves)]
        with folders.reading(folder), safe_reads():
            torch_checkpoint.load({}, storage_reader=reader, planner=_ReadPlanner(requests), no_dist=True)
        for name in list(values):
            yield name, values.pop(name)


def _layer_of(name: str) -> str:
    """Return the layer of a parameter, which is read at once, or the name of a parameter that is in no layer."""
    layer = re.match(r".*\.layers\.\d+\.", name)
    return layer[0] if layer else name


class _ReadPlanner(torch_checkpoint.DefaultLoadPlanner):
    """Plans to read parts of a checkpoint's tensors into given memory, however they were cut when they were saved."""

    def __init__(self, requests: list[tuple[str, ShardedTensor, Tensor]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.requests = requests

    def create_local_plan(self) -> LoadPlan:
        items, self.places = [], {}
        for key, part, value in self.requests:
            saved = self.metadata.state_dict_metadata.get(key)
            if saved is None:
                raise KeyError(f"it has no tensor {key}")
            if saved.size != part.global_shape and not part.allow_shape_mismatch:
                raise ValueError(f"{key} has shape {list(saved.size)}, the model's is {list(part.global_shape)}")
            chunk = _chunk(part)
            self.places[key, chunk.offsets] = value.view(chunk.sizes)
            items += create_read_items_for_chunk_list(key, saved, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.places[index.fqn, index.offset]

"""Packs micro batches of a step into two tensors of bytes, which data workers send to all ranks of a replica.

One buffer in place of hundreds of small tensors needs one piece of shared memory, one copy to the device and one
broadcast.
"""

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_llave.batch import PackedSequences, PairBatch, StepBatches

ALIGNMENT = 16


@dataclass(frozen=True)
class StepBuffer:
    """The micro batches of one step on one data-parallel rank."""

    header: Tensor
    """[n] uint8, JSON: the values of each micro batch, and dtype, shape and offset in `payload` of its tensors."""
    payload: Tensor
    """[m] uint8, the bytes of all tensors one after the other."""

    def pin_memory(self) -> "StepBuffer":
        """Return the step in page-locked memory, for asynchronous copies to a GPU; torch's DataLoader calls this."""
        return replace(self, payload=self.payload.pin_memory())

    def to(self, device: torch.device) -> "StepBuffer":
        """Return the step with its payload on `device`; the header stays where it is."""
        return replace(self, payload=self.payload.to(device, non_blocking=True))


def pack_step(step: StepBatches) -> StepBuffer:
    """Copy the micro batches of a step, which are on the CPU, into one buffer."""
    tensors: list[Tensor] = []
    described = {f.name: getattr(step, f.name) for f in fields(step)}
    described["batches"] = [_describe(batch, tensors) for batch in step.batches]
    header = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    payload = torch.zeros(_offsets(tensors)[-1], dtype=torch.uint8)
    for tensor, offset in zip(tensors, _offsets(tensors)):
        if tensor.numel():  # an empty tensor may have strides that cannot be viewed
            payload[offset : offset + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    return StepBuffer(header, payload)


def unpack_step(step: StepBuffer) -> StepBatches:
    """Return the micro batches of a buffer; their tensors are views of its payload, on the payload's device."""
    described = json.loads(step.header.cpu().numpy().tobytes())
    batches = [_restore(PairBatch, values, step.payload) for values in described["batches"]]
    return StepBatches(**described | {"batches": batches})


def _offsets(tensors: list[Tensor]) -> list[int]:
    """Return the offset of each tensor in bytes, and the end of the last one."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return offsets


def _describe(record: Any, tensors: list[Tensor]) -> dict[str, Any]:
    """Return the values of a dataclass; tensors are added to `tensors` and described by dtype, shape and offset."""
    described = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            offset = _offsets(tensors)[-1]
            tensors.append(value)
            described[field.name] = {"dtype": str(value.dtype)[6:], "shape": list(value.shape), "offset": offset}
        elif is_dataclass(value):
            described[field.name] = _describe(value, tensors)
        else:
            described[field.name] = value
    return described


def _restore(kind: type, described: dict[str, Any], payload: Tensor) -> Any:
    values = dict(described)
    for name, value in described.items():
        if isinstance(value, dict) and "offset" in value:
            dtype, shape = getattr(torch, value["dtype"]), value["shape"]
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            tensor_bytes = payload[value["offset"] : value["offset"] + num_bytes]
            values[name] = tensor_bytes.view(dtype).view(shape)
        elif isinstance(value, dict):
            values[name] = _restore(PackedSequences, value, payload)
    return kind(**values)

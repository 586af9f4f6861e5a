"""Transformer Engine's FP8 quantization in plain torch: one scale for a tensor, or one for each block of 128 values.

The scales and formats are those of the CUDA sources (common/cast, common/recipe). An amax, the largest magnitude of a
tensor, gives the scale; columnwise data is the transposed matrix, as FP8 products of a Hopper GPU need it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from engine.names import TORCH_DTYPES
from torch import Tensor

BLOCK = 128


def require(condition: bool, message: str) -> None:
    """Refuse what the compiled extension refuses."""
    if not condition:
        raise RuntimeError(f"the compiled extension of Transformer Engine would fail: {message}")


def largest(dtype: int) -> float:
    """The largest number of an FP8 format."""
    return torch.finfo(TORCH_DTYPES[dtype]).max


def transposed(data: Tensor) -> Tensor:
    """[..., k] -> [k, ...], contiguous."""
    return data.permute(-1, *range(data.dim() - 1)).contiguous()


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Return `tensor` in FP8, or write it into `output`, by the scales of the quantizer's recipe."""
    require(tensor.is_contiguous(), "quantize needs a contiguous tensor")
    require(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16), f"quantize of {tensor.dtype}")
    if noop is not None and float(noop) == 1:
        return output
    kind = type(quantizer).__name__
    if kind == "Float8BlockQuantizer":
        return _make(quantizer, tensor, output, **_by_blocks(tensor.detach(), quantizer))
    scales = {"Float8Quantizer": _delayed_scale, "Float8CurrentScalingQuantizer": _current_scale}
    return _make(quantizer, tensor, output, **_by_tensor(tensor.detach(), quantizer, scales[kind](tensor, quantizer)))


def _amax(tensor: Tensor) -> Tensor:
    return tensor.detach().abs().max().float() if tensor.numel() else torch.zeros(())


def _delayed_scale(tensor: Tensor, quantizer: Any) -> Tensor:
    """The scale of earlier steps; the amax of this tensor goes into the history."""
    quantizer.amax.copy_(torch.maximum(quantizer.amax, _amax(tensor)))
    return quantizer.scale


def _current_scale(tensor: Tensor, quantizer: Any) -> Tensor:
    amax = _amax(tensor)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = largest(quantizer.dtype) / amax.clamp_min(quantizer.amax_epsilon)
    scale = torch.where((amax > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    return (torch.exp2(scale.log2().floor()) if quantizer.force_pow_2_scales else scale).reshape(1)


def _by_tensor(tensor: Tensor, quantizer: Any, scale: Tensor) -> dict[str, Tensor | None]:
    top = largest(quantizer.dtype)
    data = (tensor.float() * scale).clamp(-top, top).to(TORCH_DTYPES[quantizer.dtype]).view(torch.uint8)
    return {
        "data": data if quantizer.rowwise_usage else None,
        "transpose": transposed(data) if quantizer.columnwise_usage else None,
        "scale_inv": (1 / scale).float().reshape(1),
    }


def _by_blocks(tensor: Tensor, quantizer: Any) -> dict[str, Tensor | None]:
    """Blocks of 1 x 128 or 128 x 128."""
    flat = tensor.float().reshape(-1, tensor.shape[-1])
    rows, columns = flat.shape
    require(columns % 16 == 0, f"block scaling of {columns} columns, which are no multiple of 16")
    require(rows % 16 == 0 or not quantizer.columnwise_usage, f"columnwise block scaling of {rows} rows")
    values = dict.fromkeys(("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"))
    if quantizer.rowwise_usage:
        data, values["rowwise_scale_inv"] = _blocks(flat, quantizer)
        values["rowwise_data"] = data.reshape(tensor.shape)
    if quantizer.columnwise_usage:
        data, values["columnwise_scale_inv"] = _blocks(flat.T, quantizer)
        values["columnwise_data"] = data.reshape(tensor.shape[-1], *tensor.shape[:-1])
    return values


def _blocks(matrix: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """[m, n] -> FP8 bytes [m, n] and the inverses of the scales.

    Those lie as [blocks of rows, blocks of columns], and for blocks of one row as [blocks of columns, rows]; the last
    dimension is padded to a multiple of 4.
    """
    m, n = matrix.shape
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    blocks = F.pad(matrix, (0, -n % BLOCK, 0, -m % height)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)  # [blocks of rows, 1, blocks of columns, 1]
    scale = torch.exp2((largest(quantizer.dtype) / amax.clamp_min(1e-30)).log2().floor())
    scale = torch.where(amax > 0, scale, torch.ones_like(scale))
    data = (blocks * scale).to(TORCH_DTYPES[quantizer.dtype]).view(torch.uint8)
    inverse = (1 / scale)[:, 0, :, 0] if height == BLOCK else (1 / scale)[:, 0, :, 0].T
    return data.flatten(2).flatten(0, 1)[:m, :n].contiguous(), F.pad(inverse, (0, -inverse.shape[1] % 4))


def _make(quantizer: Any, tensor: Tensor, output: Any, **values: Tensor | None) -> Any:
    """The quantizer's kind of tensor that holds `values`: `output`, or a new one."""
    if output is not None:
        for name, value in values.items():  # a form that is not asked for is given up, since it would be stale
            setattr(output, f"_{name}", value)
        if "transpose" in values:
            output._transpose_invalid = values["transpose"] is None
        return output
    common = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    plain, internal = _tensor_types("data" in values)
    if "data" in values:
        common["data"], common["data_transpose"] = values["data"], values["transpose"]
        common["fp8_scale_inv"] = values["scale_inv"]
    else:
        common |= {**values, "is_2D_scaled": quantizer.block_scaling_dim == 2}
    if quantizer.internal:
        return internal(**common, fake_dtype=tensor.dtype)
    return plain(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **common)


def _tensor_types(has_one_scale: bool) -> tuple[type, type]:
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor
    from transformer_engine.pytorch.tensor.storage import float8_blockwise_tensor_storage, float8_tensor_storage

    if has_one_scale:
        return float8_tensor.Float8Tensor, float8_tensor_storage.Float8TensorStorage
    block = float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage
    return float8_blockwise_tensor.Float8BlockwiseQTensor, block


def create_empty_quantized_tensor(
    quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype, device: object, pin_memory: bool = False
) -> Any:
    """A tensor for weights that are quantized into it later."""
    values = torch.zeros(shape, dtype=dtype)
    if type(quantizer).__name__ == "Float8BlockQuantizer":
        return _make(quantizer, values, None, **_by_blocks(values, quantizer))
    return _make(quantizer, values, None, **_by_tensor(values, quantizer, torch.ones(1)))


def matrix_of(tensor: Any, columnwise: bool, name: str) -> Tensor:
    """[rows, columns] float32 of an FP8 tensor, from the one of its two forms that a product of a Hopper GPU reads."""
    form = "columnwise" if columnwise else "rowwise"
    if hasattr(tensor, "_rowwise_data"):
        data, scale = getattr(tensor, f"_{form}_data"), getattr(tensor, f"_{form}_scale_inv")
        require(data is not None, f"operand {name} of a product has no {form} data")
        data = data.reshape(len(data), -1) if columnwise else data.reshape(-1, data.shape[-1])
        rows, columns = data.shape
        by_rows = scale.repeat_interleave(BLOCK, 0) if tensor._is_2D_scaled else scale.T
        scale = by_rows[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    else:
        is_there = not tensor._transpose_invalid if columnwise else tensor._data is not None
        require(is_there, f"operand {name} of a product has no {form} data")
        data, scale = tensor._transpose if columnwise else tensor._data, tensor._scale_inv
        data = data.reshape(len(data), -1) if columnwise else data.reshape(-1, data.shape[-1])
    matrix = data.contiguous().view(TORCH_DTYPES[tensor._fp8_dtype]).float() * scale
    return matrix.T if columnwise else matrix


def dequantize(tensor: Any, dtype: int) -> Tensor:
    """The values of an FP8 tensor with one scale."""
    values = tensor._data.view(TORCH_DTYPES[tensor._fp8_dtype]).float() * tensor._scale_inv
    return values.to(TORCH_DTYPES[dtype])


def fp8_transpose(data: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    """The bytes of the transposed matrix."""
    return transposed(data)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and the gradient of the output in FP8."""
    bias = gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype)
    return bias, quantize(gradient, quantizer)


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: int, margin: float
) -> None:
    """Delayed scaling, after each pass: put the amaxes into the histories, move these on, and set the scales."""
    for own, history, scale in zip(amaxes.split([h.shape[1] for h in histories]), histories, scales):
        history[0] = own
        amax = history.amax(0) if algorithm == "max" else own.clone()
        history.copy_(history.roll(-1, 0))
        history[0] = 0
        update = largest(dtype) / amax / 2**margin
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), update, scale))


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Write the largest magnitude."""
    amax.copy_(_amax(tensor))

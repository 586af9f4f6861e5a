"""Transformer Engine's compiled extension `transformer_engine_torch` in plain torch: what dense layers call of it.

Signatures are those of the C++ sources (2.20.2); everything else raises when it is called. Arithmetic is in float32.
`CALLS` counts the calls of each kernel.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from engine.context import positions
from engine.fp8 import (  # noqa: F401
    bgrad_quantize,
    compute_amax,
    create_empty_quantized_tensor,
    dequantize,
    fp8_transpose,
    fused_amax_and_scale_update_after_reduction,
    matrix_of,
    quantize,
    require,
)
from engine.names import *  # noqa: F403
from engine.names import TORCH_DTYPES, DType, NVTE_Fused_Attn_Backend, NVTE_Mask_Type, NVTE_QKV_Format, NVTE_QKV_Layout
from torch import Tensor

CALLS: Counter[str] = Counter()
CAUSAL = (NVTE_Mask_Type.NVTE_CAUSAL_MASK, NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK)
PACKED_MASKS = (NVTE_Mask_Type.NVTE_PADDING_MASK, NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK)


def get_cublasLt_version() -> int:
    """Of CUDA 13."""
    return 130200


def get_cudnn_version() -> int:
    """9.19."""
    return 91900


def get_num_cublas_streams() -> int:
    return 4


def get_stream_priority_range(*args: object) -> tuple[int, int]:
    return 0, -5


def device_supports_multicast(*args: object) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    *args: object,
    **kwargs: object,
) -> tuple:
    """D = op(B) op(A), row by row; the gradient of a bias too with `grad`."""
    CALLS["gemm"] += 1
    require(_is_fp8(A) == _is_fp8(B), "one operand of a product is FP8, the other is not")
    a, b = _operand(A, not transa, "A"), _operand(B, transb, "B")
    if _is_fp8(A):
        CALLS["fp8 gemm"] += 1
        # cuBLASLt wants the inner and both leading dimensions in multiples of 16 bytes (gemm/cublaslt_gemm.cu).
        for size in a.shape:
            require(size % 16 == 0, f"an FP8 product of {tuple(b.shape)} and {tuple(a.shape)}: {size} is odd by 16")
    else:
        require(A.dtype == B.dtype, f"a product of {A.dtype} and {B.dtype}")
    left, right = b.T if transb else b, a.T if transa else a
    require(left.shape[1] == right.shape[0], f"a product of {tuple(left.shape)} and {tuple(right.shape)}")
    result = left @ right
    bias_gradient = None
    if bias is not None:
        if grad:
            bias_gradient = b.sum(0).to(bias.dtype)
        else:
            result = result + bias.float()
    if not transb:
        result = result.unflatten(0, B.size()[:-1])
    if D is None:
        D = result.to(A.dtype if out_dtype is None else TORCH_DTYPES[out_dtype])
    else:
        require(D.numel() == result.numel(), f"a product into {tuple(D.shape)}, it is {tuple(result.shape)}")
        CALLS["gemm that adds" if accumulate else "gemm that overwrites"] += 1
        D.copy_(D.float() + result.view_as(D) if accumulate else result.view_as(D))
    return D if quantizer is None else quantizer(D), bias_gradient, None, None


def _is_fp8(operand: Any) -> bool:
    return hasattr(operand, "_quantizer")


def _operand(operand: Any, columnwise: bool, name: str) -> Tensor:
    """[rows, columns] float32."""
    if _is_fp8(operand):
        return matrix_of(operand, columnwise, name)
    require(operand.is_contiguous() or operand.dim() == 2 and operand.T.is_contiguous(), f"operand {name} has gaps")
    return operand.reshape(-1, operand.shape[-1]).float()


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, dtype: int, *args: object
) -> tuple:
    """[n, h] -> normalised, mean [n], inverse of the standard deviation [n]."""
    values = _rows(x)
    mean, scale = values.mean(1), torch.rsqrt(values.var(1, unbiased=False) + eps)
    result = (values - mean[:, None]) * scale[:, None] * weight.float() + bias.float()
    return _normalised(result.to(TORCH_DTYPES[dtype]), out, quantizer), mean, scale


def layernorm_bwd(dz: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *args: object) -> tuple:
    gradient, normal = dz.float().reshape(x.shape), (x.float() - mean[:, None]) * scale[:, None]
    inner = gradient * weight.float()
    along = inner.mean(1, keepdim=True) + normal * (inner * normal).mean(1, keepdim=True)
    dx = scale[:, None] * (inner - along)
    return dx.to(x.dtype), (gradient * normal).sum(0).to(weight.dtype), gradient.sum(0).to(weight.dtype)


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: int, *args: object) -> tuple:
    """[n, h] -> normalised, nothing, inverse of the root of the mean square [n]."""
    values = _rows(x)
    scale = torch.rsqrt(values.square().mean(1) + eps)
    result = values * scale[:, None] * weight.float()
    return _normalised(result.to(TORCH_DTYPES[dtype]), out, quantizer), None, scale


def rmsnorm_bwd(dz: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *args: object) -> tuple:
    gradient, normal = dz.float().reshape(x.shape), x.float() * scale[:, None]
    inner = gradient * weight.float()
    dx = scale[:, None] * (inner - normal * (inner * normal).mean(1, keepdim=True))
    return dx.to(x.dtype), (gradient * normal).sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    require(x.dim() == 2 and x.is_contiguous(), f"a norm of {tuple(x.shape)}, not of contiguous rows")
    return x.float()


def _normalised(result: Tensor, out: Any, quantizer: Any) -> Any:
    if quantizer is not None:
        return quantizer(result)
    return result if out is None else out.copy_(result)


def fused_rope_forward(
    t: Tensor,
    freqs: Tensor,
    start: Tensor | None,
    form: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    ranks: int,
    rank: int,
) -> Tensor:
    """Turn queries or keys by their positions in their sequences, which context-parallel ranks may share."""
    return _turned(t, freqs, form, interleaved, cu_seqlens, (rank, ranks), 1)


def fused_rope_backward(
    t: Tensor,
    freqs: Tensor,
    start: Tensor | None,
    form: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    ranks: int,
    rank: int,
) -> Tensor:
    return _turned(t, freqs, form, interleaved, cu_seqlens, (rank, ranks), -1)


def _turned(
    t: Tensor,
    freqs: Tensor,
    form: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    rank_of_ranks: tuple[int, int],
    sign: int,
) -> Tensor:
    require(freqs.dtype == torch.float32 and freqs.dim() == 4, f"angles {tuple(freqs.shape)} of {freqs.dtype}")
    require(form != NVTE_QKV_Format.NVTE_BSHD and not interleaved, "the double turns sbhd and thd alone")
    angles = freqs[: len(t)]  # [s, 1, 1, d]
    if form == NVTE_QKV_Format.NVTE_THD:
        require(cu_seqlens.dtype == torch.int32, f"cu_seqlens of {cu_seqlens.dtype}, not int32")
        places = [place for length in cu_seqlens.diff().tolist() for place in positions(length, *rank_of_ranks)]
        require(len(places) == len(t), f"cu_seqlens of {len(places)} tokens of this rank, it has {len(t)}")
        require(max(places) < len(freqs), f"angles for {len(freqs)} positions, {max(places) + 1} are asked for")
        angles = freqs[places, 0]  # [t, 1, d]
    require(angles.shape[-1] == t.shape[-1], f"angles for {angles.shape[-1]} of {t.shape[-1]} channels")
    first, second = t.float().chunk(2, -1)
    return (t.float() * angles.cos() + sign * torch.cat([-second, first], -1) * angles.sin()).to(t.dtype)


def get_fused_attn_backend(parameters: Any) -> tuple:
    """As cuDNN 9.19 on Hopper: half precision, head sizes in multiples of 8 up to 128 (fused_attn.cpp)."""
    CALLS["choice of attention"] += 1
    none = NVTE_Fused_Attn_Backend.NVTE_No_Backend
    if parameters.qkv_dtype not in (DType.kBFloat16, DType.kFloat16):
        return none, f"queries of {parameters.qkv_dtype!r}"
    sizes = (parameters.head_dim_qk, parameters.head_dim_v)
    if any(size % 8 or size > 128 for size in sizes):
        return none, f"heads of {sizes}"
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: int,
    o_format: int,
    qkv_scale_inv_format: int,
    bias_type: int,
    attn_mask_type: int,
    softmax_type: int,
    window_size: tuple[int, int],
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    *args: object,
) -> list[Tensor]:
    """Attention of packed sequences, or of a batch of equal lengths."""
    CALLS["attention"] += 1
    require(isinstance(max_seqlen_q, int), f"max_seqlen of {type(max_seqlen_q)}")
    require(Q.dtype in (torch.bfloat16, torch.float16), f"attention of {Q.dtype}")
    require(not p_dropout, "the double has no dropout in attention")
    if _is_packed(qkv_layout):
        require(int(cu_seqlens_q.diff().max()) <= max_seqlen_q, "a sequence longer than max_seqlen")
    output = _attention(Q, K, V, attn_scale, qkv_layout, attn_mask_type, cu_seqlens_q, cu_seqlens_kv)
    return [output.to(fake_dtype), torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    set_zero: bool,
    qkv_layout: int,
    o_format: int,
    do_format: int,
    dqkv_layout: int,
    qkv_scale_inv_format: int,
    do_scale_inv_format: int,
    bias_type: int,
    attn_mask_type: int,
    softmax_type: int,
    window_size: tuple[int, int],
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,  # noqa: E741
    dO: Tensor,
    fake_dtype: torch.dtype,
    *args: object,
) -> list[Tensor | None]:
    """Gradients of queries, keys and values."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (Q, K, V)]
        output = _attention(*inputs, attn_scale, qkv_layout, attn_mask_type, cu_seqlens_q, cu_seqlens_kv)
        gradients = torch.autograd.grad(output, inputs, dO.reshape(output.shape).float())
    return [*(gradient.to(fake_dtype) for gradient in gradients), None, None]


def _is_packed(layout: int) -> bool:
    return NVTE_QKV_Layout(layout).name.startswith("NVTE_T")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    layout: int,
    mask: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
) -> Tensor:
    """[t, n, d], or [s, b, n, d], or [b, s, n, d]; one sequence after the other."""
    if _is_packed(layout):
        require(mask in PACKED_MASKS, f"packed sequences with {NVTE_Mask_Type(mask).name}")
        for boundaries, rows in ((cu_seqlens_q, query), (cu_seqlens_kv, key)):
            require(boundaries.dtype == torch.int32, f"cu_seqlens of {boundaries.dtype}, not int32")
            require(int(boundaries[-1]) == len(rows), f"cu_seqlens end at {int(boundaries[-1])} of {len(rows)}")
        lengths = [boundaries.diff().tolist() for boundaries in (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_kv)]
        parts = zip(*(x.split(own) for x, own in zip((query, key, value), lengths)))
        return torch.cat([_attend(*part, scale, mask in CAUSAL) for part in parts])
    dim = 0 if NVTE_QKV_Layout(layout).name.startswith("NVTE_B") else 1
    parts = zip(*(x.unbind(dim) for x in (query, key, value)))
    return torch.stack([_attend(*part, scale, mask in CAUSAL) for part in parts], dim)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """[s, n, d]."""
    query, key, value = (x.transpose(0, 1).float() for x in (query, key, value))  # [n, s, d]
    output = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)
    return output.transpose(0, 1)


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """[t, ...] -> [b, longest, ...], zeros behind each sequence."""
    sequences = tensor.split(cu_seqlens.diff().tolist())
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return F.pad(padded, (0, 0) * (tensor.dim() - 1) + (0, max_seq_len - padded.shape[1]))


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """[b, longest, ...] -> [t, ...]."""
    return torch.cat([row[:length] for row, length in zip(tensor, cu_seqlens.diff().tolist())])


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: Tensor) -> None:
    multi_tensor_scale(chunk, noop, lists, float(scale))


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> tuple:
    """The norm over all tensors [1], and that of each."""
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().reshape(1), norms


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW of gradients, parameters, both moments, and float32 weights for parameters of less precision."""
    require(mode == 1 and bias_correction == 1 and len(lists) in (4, 5), "the double has AdamW alone")
    CALLS["adam"] += 1
    for gradient, parameter, *moments, weight in zip(*lists, *([lists[1]] if len(lists) == 4 else [])):
        require(weight.dtype == torch.float32, "AdamW of the double updates float32 weights")
        first, second = (moment.float() for moment in moments)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**step)).sqrt_().add_(epsilon)
        weight.mul_(1 - lr * weight_decay).addcdiv_(first / (1 - beta1**step), root, value=-lr)
        for kept, new in zip((parameter, *moments), (weight, first, second)):
            if kept is not new:
                kept.copy_(new)


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"the double of transformer_engine_torch has no {name}")

    return missing

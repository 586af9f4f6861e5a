"""Pooling: the last token's hidden state becomes the embedding, in float32 and of unit length."""

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor


def last_token_pool(hidden: Tensor, last_token: Tensor, context: dist.ProcessGroup | None = None) -> Tensor:
    """Pool a packed row: hidden [t, 1, h] and last_token [n] int64 -> embeddings [n, h] float32 of unit length.

    If context ranks share the row, each has its t / c tokens and gets all embeddings: every rank adds those of its own
    last tokens (all-reduce in forward, identity in backward, so that a rank gets the gradient of its own ones).
    """
    row = hidden.squeeze(1)
    if context is None or context.size() == 1:
        return F.normalize(row.index_select(0, last_token).float(), dim=-1)
    place = last_token - context.rank() * len(row)
    is_elsewhere = (place < 0) | (place >= len(row))
    pooled = row.index_select(0, place.clamp(0, len(row) - 1)).float()  # [n, h]
    pooled = reduce_from_tensor_model_parallel_region(pooled.masked_fill(is_elsewhere[:, None], 0.0), group=context)
    return F.normalize(pooled, dim=-1)

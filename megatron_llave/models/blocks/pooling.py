"""Pooling: the last token's hidden state becomes the embedding, in float32 and of unit length."""

import torch.nn.functional as F
from torch import Tensor


def last_token_pool(hidden: Tensor, last_token: Tensor) -> Tensor:
    """Pool a packed row: hidden [t, 1, h] and last_token [n] int64 -> embeddings [n, h] float32 of unit length."""
    pooled = hidden.squeeze(1).index_select(0, last_token)  # [n, h]
    return F.normalize(pooled.float(), dim=-1)

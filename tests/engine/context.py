"""Transformer Engine's attention of context-parallel ranks in plain torch, one sequence after the other.

It stands in for `AttnFuncWithCPAndKVP2P` alone: what that function is handed, and the checks before it, are those of
Transformer Engine. Each rank has two chunks of each sequence, as its context_parallel.py draws it. There, chunks travel
from rank to rank; here, the keys and values of all ranks are gathered.

Shapes: t tokens of the rank, n heads, d channels of a head, c ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def positions(length: int, rank: int, ranks: int) -> list[int]:
    """The positions of a sequence's tokens that a rank has: those of two of its 2c chunks."""
    if ranks == 1:
        return list(range(length))
    size, rest = divmod(length, 2 * ranks)
    assert rest == 0, f"a sequence of {length} tokens for {ranks} ranks"
    return [number * size + place for number in (rank, 2 * ranks - 1 - rank) for place in range(size)]


class GatheringAttention:
    """`apply` takes what AttnFuncWithCPAndKVP2P.apply takes."""

    @staticmethod
    def apply(
        is_training: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        cu_seqlens_q_padded: Tensor,
        cu_seqlens_kv_padded: Tensor,
        dropout: float,
        scale: float,
        form: str,
        mask: str,
        *others: object,
    ) -> Tensor:
        """[t, n, d] of this rank's chunks -> the same shape."""
        from engine import extension  # which imports this module
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # not before double.enable

        group = others[8]
        extension.CALLS["attention of context ranks"] += 1
        assert (form, mask, dropout) == ("thd", "padding_causal", 0), (form, mask, dropout)
        assert torch.equal(cu_seqlens_q, cu_seqlens_q_padded) and torch.equal(cu_seqlens_q, cu_seqlens_kv_padded)
        lengths, rank, ranks = cu_seqlens_q.diff().tolist(), group.rank(), group.size()
        assert max(lengths) <= max_seqlen_q and sum(lengths) == len(query) * ranks, (lengths, max_seqlen_q, len(query))
        sizes = [length // ranks for length in lengths]
        of_ranks = [
            [rows.split(sizes) for rows in gather_from_sequence_parallel_region(x, group=group).chunk(ranks)]
            for x in (key, value)
        ]
        outputs = []
        for index, (length, own) in enumerate(zip(lengths, query.split(sizes))):
            places = torch.tensor([positions(length, other, ranks) for other in range(ranks)])
            in_order = places.flatten().argsort()
            keys, values = (torch.cat([rows[index] for rows in of_each])[in_order] for of_each in of_ranks)
            heads = (x.transpose(0, 1).float() for x in (own, keys, values))  # [n, tokens, d]
            seen = torch.arange(length) <= places[rank][:, None]
            output = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
            outputs.append(output.transpose(0, 1).to(query.dtype))
        return torch.cat(outputs)

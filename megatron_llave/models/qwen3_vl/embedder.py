"""Qwen3-VL: learned positions and deepstack in the vision encoder, and a Qwen3 decoder with interleaved positions."""

from functools import partial

import torch.nn.functional as F

from megatron_llave.models.blocks.qwen2 import DecoderKind
from megatron_llave.models.qwen_vl.embedder import QwenVlEmbedder
from megatron_llave.models.qwen_vl.vision import TowerKind


class Qwen3VLEmbedder(QwenVlEmbedder):
    """HF Qwen3VLModel as an embedder."""

    decoder_kind = DecoderKind(qkv_bias=False, qk_norm=True, interleaved_mrope=True)
    # The fused kernel that megatron-core takes for F.gelu is the tanh approximation, too.
    tower_kind = TowerKind(partial(F.gelu, approximate="tanh"), F.gelu, patch_bias=True)

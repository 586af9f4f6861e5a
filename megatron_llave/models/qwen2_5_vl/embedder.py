"""Qwen2.5-VL: RMSNorm, a gated MLP and attention in windows in the vision encoder, and the decoder of Qwen2-VL."""

import torch.nn.functional as F

from megatron_llave.models.blocks.layer_specs import RMSNorm
from megatron_llave.models.qwen_vl.embedder import QwenVlEmbedder
from megatron_llave.models.qwen_vl.vision import CLIP_MEAN, CLIP_STD, TowerKind


class Qwen25VLEmbedder(QwenVlEmbedder):
    """HF Qwen2_5_VLModel as an embedder."""

    tower_kind = TowerKind(F.silu, F.silu, RMSNorm, gated=True, mean=CLIP_MEAN, std=CLIP_STD)

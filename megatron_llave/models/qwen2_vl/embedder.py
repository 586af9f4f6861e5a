"""Qwen2-VL: LayerNorm and QuickGELU in the vision encoder, and a Qwen2 decoder with positions in three axes."""

from megatron.core.activations import quick_gelu

from megatron_llave.models.qwen_vl.embedder import QwenVlEmbedder
from megatron_llave.models.qwen_vl.vision import CLIP_MEAN, CLIP_STD, TowerKind


class Qwen2VLEmbedder(QwenVlEmbedder):
    """HF Qwen2VLModel as an embedder."""

    tower_kind = TowerKind(activation=quick_gelu, fused_activation=None, mean=CLIP_MEAN, std=CLIP_STD)

"""Qwen2-VL: LayerNorm and QuickGELU in the vision encoder, and a Qwen2 decoder with positions in three axes."""

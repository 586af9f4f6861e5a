"""Qwen2.5-VL: RMSNorm, a gated MLP and attention in windows in the vision encoder, and the decoder of Qwen2-VL."""

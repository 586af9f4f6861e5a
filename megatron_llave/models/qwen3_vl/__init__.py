"""Qwen3-VL: learned positions and deepstack in the vision encoder, and a Qwen3 decoder with interleaved positions."""

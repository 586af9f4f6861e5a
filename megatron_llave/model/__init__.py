"""The embedder: SigLIP tower, projector and Qwen2 decoder from megatron-core's blocks, pooled at the last token."""

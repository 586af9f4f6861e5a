"""LLaVE on megatron-core: large multimodal models trained into embedding models."""

__version__ = "0.1.0"

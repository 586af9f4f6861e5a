"""Embeds inputs with a trained model, in memory or into files."""

from megatron_llave.processes import without_garbage_collection

with without_garbage_collection():
    from megatron_llave.embedding.embedder import LoadedModel, embed, load_model

__all__ = ["LoadedModel", "embed", "load_model"]

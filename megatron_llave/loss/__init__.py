"""The contrastive loss: pure functions of embeddings and a process group."""

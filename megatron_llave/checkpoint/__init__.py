"""Checkpoints: folders, state, writing, streaming, resuming, merging."""

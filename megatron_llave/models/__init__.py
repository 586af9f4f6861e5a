"""Embedding models: building blocks, Hugging Face formats, and one folder per model family."""

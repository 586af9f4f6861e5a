"""The study of communication."""

"""Hugging Face weight files and name mappings; knows no model family."""

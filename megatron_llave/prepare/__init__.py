"""Offline preparation of training data and evaluation sets."""

"""Evaluation: tasks, scoring, retrieval metrics."""

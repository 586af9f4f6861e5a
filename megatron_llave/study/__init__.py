"""The paper's experiments as studies: lists of runs, run in a queue, compared seed by seed (tools/study.py)."""

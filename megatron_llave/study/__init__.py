"""The paper's experiments as studies: lists of runs, run in a queue and compared seed by seed (llave study)."""

"""FLOPs, memory and layouts, computed before a run."""

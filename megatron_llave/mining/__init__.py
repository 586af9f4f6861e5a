"""Finds hard negatives for the pairs of a folder of shards, and writes them beside it; docs/mining.md."""

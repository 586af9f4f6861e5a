"""The pairs of a finished shard, for tests that look at what was written; training reads single pairs (ShardReader)."""

from collections.abc import Iterator
from pathlib import Path

from megatron_llave.batch import Pair
from megatron_llave.data.shards import read_samples, unpack_pair


def read_shard(path: str | Path) -> Iterator[Pair]:
    """The pairs of one shard in the order of the tar."""
    for sample in read_samples(path):
        yield unpack_pair(sample, f"{path}: sample {sample['__key__']}")

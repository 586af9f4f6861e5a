"""Reads single pairs from shards: the first reading stage of the training stream."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from megatron_llave.batch import Pair
from megatron_llave.data.index import Shard
from megatron_llave.data.shards import unpack_json, unpack_pair
from megatron_llave.data.storage import Storage
from megatron_llave.data.tar_members import TarSample, find_samples, read_sample, unreadable
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN

Opened = tuple[BinaryIO, Path, list[TarSample], dict[str, int]]
"""An open shard: the file, its name, its samples, and the number of each key."""


class ShardReader:
    """Reads pairs by shard and number: the headers of a shard once, then only the pairs that are asked for."""

    def __init__(self, storage: Storage, most_open: int) -> None:
        """Keep the `most_open` most recently used shards open, each with its table of samples.

        Nothing is read before the first `read`, so that the reader can be copied into worker processes.
        """
        self.storage = storage
        self.most_open = most_open
        self._opened: OrderedDict[str, Opened | DataError] = OrderedDict()

    def read(self, shard: Shard, number: int) -> Pair:
        """Return pair `number` of a shard.

        Raises:
            DataError: the pair or the shard is damaged, or the shard has another number of pairs than the index says.
        """
        file, path, sample = self._find(shard, number)
        members = read_sample(file, path, sample)
        return unpack_pair({"__key__": sample.key, **members}, f"{path}: sample {sample.key}")

    def describe(self, shard: Shard, number: int) -> tuple[dict[str, Any], str]:
        """Return the JSON of a pair, whose images are not read, and the name of its sample for messages.

        Raises:
            DataError: as `read` does, except for what is wrong with an image.
        """
        file, path, sample = self._find(shard, number)
        where = f"{path}: sample {sample.key}"
        members = {suffix: place for suffix, place in sample.members.items() if suffix == "json"}
        return unpack_json(read_sample(file, path, replace(sample, members=members)), where), where

    def keys(self, shard: Shard) -> list[str]:
        """Return the keys of a shard's pairs in order.

        Raises:
            DataError: the shard is damaged, or has another number of pairs than the index says.
        """
        return [sample.key for sample in self._find_shard(shard)[2]]

    def members(self, shard: Shard, key: str) -> tuple[dict[str, Any], str]:
        """Return the members of the sample with a key, `__key__` among them, and its name for messages.

        Raises:
            DataError: the shard has no such sample, or as `read` does.
        """
        file, path, samples, numbers = self._find_shard(shard)
        if key not in numbers:
            raise DataError(f"{path} has no sample {key}; {AGAIN}")
        sample = samples[numbers[key]]
        return {"__key__": key, **read_sample(file, path, sample)}, f"{path}: sample {key}"

    def _find(self, shard: Shard, number: int) -> tuple[BinaryIO, Path, TarSample]:
        file, path, samples, _ = self._find_shard(shard)
        return file, path, samples[number]

    def _find_shard(self, shard: Shard) -> Opened:
        if shard.file not in self._opened:
            try:
                self._opened[shard.file] = self._open(shard)
            except DataError as error:
                self._opened[shard.file] = error
            if len(self._opened) > self.most_open:
                self._close(self._opened.popitem(last=False)[1])
        self._opened.move_to_end(shard.file)
        opened = self._opened[shard.file]
        if isinstance(opened, DataError):
            raise opened
        return opened

    def _open(self, shard: Shard) -> Opened:
        path = self.storage.fetch(shard)
        try:
            file = open(path, "rb")
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            samples = find_samples(file, path)
            if len(samples) != shard.pairs:
                raise DataError(f"{path} holds {len(samples)} pairs, index.json says {shard.pairs}; {AGAIN}")
        except DataError:
            file.close()
            raise
        return file, path, samples, {sample.key: number for number, sample in enumerate(samples)}

    @staticmethod
    def _close(opened: Opened | DataError) -> None:
        if not isinstance(opened, DataError):
            opened[0].close()

"""Single pairs out of shards: the first reading stage of the training stream."""

from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from megatron_llave.batch import Pair
from megatron_llave.data.index import Shard
from megatron_llave.data.shards import unpack_pair
from megatron_llave.data.storage import Storage
from megatron_llave.data.tar_members import TarSample, find_samples, read_sample, unreadable
from megatron_llave.errors import DataError
from megatron_llave.files import AGAIN


class ShardReader:
    """Pairs by shard and number; of a shard it reads the headers once, then only the pairs asked for."""

    def __init__(self, storage: Storage, most_open: int) -> None:
        """Keeps file and table of samples of the `most_open` shards last used.

        Nothing is read before the first `read`, so that worker processes can be handed a copy.
        """
        self.storage = storage
        self.most_open = most_open
        self._held: OrderedDict[str, tuple[BinaryIO, Path, list[TarSample]] | DataError] = OrderedDict()

    def read(self, shard: Shard, number: int) -> Pair:
        """Pair `number` of a shard.

        Raises:
            DataError: the pair is damaged; or the shard is, or holds another number of pairs than its index says.
        """
        if shard.file not in self._held:
            try:
                self._held[shard.file] = self._open(shard)
            except DataError as error:
                self._held[shard.file] = error
            if len(self._held) > self.most_open:
                self._close(self._held.popitem(last=False)[1])
        self._held.move_to_end(shard.file)
        held = self._held[shard.file]
        if isinstance(held, DataError):
            raise held
        file, path, samples = held
        sample = samples[number]
        members = read_sample(file, path, sample)
        return unpack_pair({"__key__": sample.key, **members}, f"{path}: sample {sample.key}")

    def _open(self, shard: Shard) -> tuple[BinaryIO, Path, list[TarSample]]:
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
        return file, path, samples

    @staticmethod
    def _close(held: tuple[BinaryIO, Path, list[TarSample]] | DataError) -> None:
        if not isinstance(held, DataError):
            held[0].close()

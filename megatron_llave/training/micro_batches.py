"""Micro batches of a step that come one after the other, anew for each pass (train.tokens_per_micro_batch).

Only what the loss and the log need of a micro batch is kept: its ids and lengths, but no pixels or tokens.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from megatron_llave.batch import PairBatch
from megatron_llave.errors import DataError


@dataclass
class MicroBatches:
    """Has a length and can be iterated over like a list of micro batches, as often as `data.readers.in_passes` says."""

    count: int
    longest: int
    """Tokens of the longest packed row."""
    subset: str
    receive: Callable[[], PairBatch]
    """Returns the next micro batch, on the device of this rank."""
    kept: list[PairBatch] = field(default_factory=list)
    """The micro batches of the first pass with empty `sequences`, which still have their lengths."""
    waited: float = 0.0
    """How long this rank has waited for micro batches, seconds."""

    def __len__(self) -> int:
        """Return the number of micro batches."""
        return self.count

    def __iter__(self) -> Iterator[PairBatch]:
        """Yield the micro batches of the next pass.

        Raises:
            DataError: a micro batch has not the pairs that it had in the first pass.
        """
        first = self.kept[:]
        for number in range(self.count):
            yield self._next(first[number] if first else None)  # no variable keeps the last one while the next comes

    def _next(self, first: PairBatch | None) -> PairBatch:
        """Receive a micro batch, which was `first` in the first pass; None: this is the first pass."""
        started = time.perf_counter()
        batch = self.receive()
        self.waited += time.perf_counter() - started
        if first is None:
            emptied = replace(batch, sequences=batch.sequences.map(lambda tensor: tensor.new_empty(0)))
            self.kept.append(emptied.map(Tensor.clone))  # a view would keep the whole buffer that it is in
        elif batch.keys != first.keys:
            changed = ", ".join(sorted({*batch.keys} ^ {*first.keys}))
            raise DataError(
                f"pair {changed:.200} of subset {batch.subset} could be read in one pass over the step and not in the "
                "other; the shards must not change while a run reads them"
            )
        return batch


def kept_of(batches: list[PairBatch] | MicroBatches) -> list[PairBatch]:
    """Return what is known of the micro batches of a step: ids, counts and lengths; `sequences` may be empty."""
    return batches.kept if isinstance(batches, MicroBatches) else batches


def subset_of(batches: list[PairBatch] | MicroBatches) -> str:
    """Return the subset of a step, before its first pass too."""
    return batches.subset if isinstance(batches, MicroBatches) else batches[0].subset


def waited_for(batches: list[PairBatch] | MicroBatches) -> float:
    """Return the seconds for which this rank waited for micro batches inside of a step, after the first one."""
    return batches.waited if isinstance(batches, MicroBatches) else 0.0


def longest_row(batches: list[PairBatch] | MicroBatches) -> int:
    """Return the tokens of the longest packed row of a step, the same on all pipeline stages and context ranks."""
    if isinstance(batches, MicroBatches):
        return batches.longest
    return max(sum(batch.sequences.padded_lengths) for batch in batches)

"""Measure whether the training stream stays as fast, small and quick to start with more shards.

    python benchmarks/many_shards.py [--shards 10 30 100] [--pairs-per-shard 2000] [--workers 2] [--folder DIR]

The data are one subset of text pairs, so that nothing hides the cost of reading and ordering. For each number of
shards, a new process measures the seconds until the first step is available, the pairs per second over a complete
epoch, and the peak memory of the process and its workers together, with shared pages counted once. The result is a
Markdown table.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random

import psutil
import torch
from tokenizers import ByteLevelBPETokenizer

from megatron_llave.batch import Pair, Side
from megatron_llave.config.load import config_from_dict
from megatron_llave.data.index import Index, Subset, write_index
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.shards import write_subset
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import build_processor

SUBSET = "texts"
QUERY_WORDS, TARGET_WORDS = 20, 10
VOCABULARY = 1000
SECONDS_BETWEEN_SAMPLES = 0.5


def make_words(number: int) -> list[str]:
    """Random words of four to eight letters."""
    rng = Random(0)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 8))) for _ in range(number)]


def make_shards(folder: Path, num_shards: int, pairs_per_shard: int) -> Subset:
    """Write shards of text pairs and a tokenizer. The index is written before each measurement."""
    words, rng = make_words(VOCABULARY), Random(1)

    def pairs() -> Iterator[Pair]:
        for i in range(num_shards * pairs_per_shard):
            query, target = (Side(" ".join(rng.choices(words, k=n)), []) for n in (QUERY_WORDS, TARGET_WORDS))
            yield Pair(f"pair-{i:08d}", SUBSET, query, target, f"q{i}", f"t{i}")

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(words, vocab_size=VOCABULARY, show_progress=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return write_subset(pairs(), folder, SUBSET, "retrieval", pairs_per_shard)


@contextmanager
def largest_memory() -> Iterator[list[float]]:
    """While the block runs, record the peak memory of this process and its children, in megabytes."""
    largest, done = [0.0], threading.Event()

    def watch() -> None:
        parent = psutil.Process()
        while not done.wait(SECONDS_BETWEEN_SAMPLES):
            total = 0
            for process in (parent, *parent.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # the process has ended
                    continue
            largest[0] = max(largest[0], total / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()


def measure(folder: str, num_pairs: int, batch: int, workers: int) -> tuple[float, float, float]:
    """Seconds to the first step, pairs per second over one epoch, and megabytes."""
    multiprocessing.set_start_method("fork", force=True)  # a training run forks its workers
    torch.set_num_threads(1)
    values = {
        "model": {"preset": "tiny"},
        "data": {"path": folder, "workers": workers},
        "train": {"steps": 1, "global_batch_size": batch},
    }
    with largest_memory() as largest:
        started = time.perf_counter()
        cfg = config_from_dict(values)
        stream = build_train_stream(cfg, build_processor(cfg.data, cfg.model), rank=0, world=1, pad_to_multiple=1)
        next(stream)
        first = time.perf_counter()
        pairs = 0
        for step in islice(stream, num_pairs // batch):
            pairs += sum(made.num_pairs for made in unpack_step(step).batches)
        seconds = time.perf_counter() - first
    return first - started, pairs / seconds, largest[0]


def main() -> None:
    """Parse the command line. Without --folder, the shards are in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--pairs-per-shard", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256, help="pairs per step (256)")
    parser.add_argument("--workers", type=int, default=2, help="data.workers (2)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="empty folder for the shards")
    args = parser.parse_args()
    with exit_with_one_line(), tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        largest = make_shards(folder, max(args.shards), args.pairs_per_shard)
        print("| shards | pairs | first step after s | pairs/s | memory MB |\n|---:|---:|---:|---:|---:|")
        for num_shards in args.shards * args.repeats:
            subset = Subset(largest.meta_task, largest.shards[:num_shards])
            write_index(folder, Index({SUBSET: subset}))
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as executor:
                job = executor.submit(measure, str(folder), subset.pairs, args.batch, args.workers)
                first, speed, memory = job.result()
            print(f"| {num_shards} | {subset.pairs} | {first:.2f} | {speed:.0f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Measure the exact search over a corpus that is spread over ranks: seconds, and the memory of each rank.

    torchrun --nproc-per-node 2 -m benchmarks.corpus_search --folder DIR [--rows 1000000] [--width 256] [--queries 1000]

The corpus consists of random unit vectors, in the files that tools/evaluate.py retrieval makes; each rank searches its
share of them block by block. The best 10 candidates of a sample of the queries are compared with those of numpy, which
searches the complete corpus in float64. `grown` is the largest resident set of a rank minus that before the search. It
does not include the pages of the files that the system caches.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.embedding.cache import EmbeddingCache
from megatron_llave.embedding.inputs import Input, Inputs
from megatron_llave.evaluation.benchmarks.corpus import StoredRows
from megatron_llave.evaluation.ranking import search

K, SAMPLE = 10, 20


def unit_rows(count: int, width: int, seed: int) -> np.ndarray:
    """Random unit vectors: [count, width] float32."""
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_store(folder: Path, rows: int, width: int) -> EmbeddingCache:
    """The corpus on disk, which the first rank writes."""
    store = EmbeddingCache(folder, Inputs("corpus", [Input("x")] * rows, "."))
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        for part in range(store.num_parts):
            store.write(part, unit_rows(len(store.inputs_of(part)), width, part + 1))
    dist.barrier()
    return store


def check(store: EmbeddingCache, queries: np.ndarray, searched: np.ndarray) -> None:
    """Check that the best candidates of some queries are those that numpy finds."""
    similarity = np.concatenate(
        [queries.astype(np.float64) @ store.rows(np.arange(*bounds)).astype(np.float64).T for bounds in blocks(store)],
        axis=1,
    )
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :K]
    assert (best == searched).all(), "the best candidates are not numpy's"


def blocks(store: EmbeddingCache) -> list[tuple[int, int]]:
    """Ranges of rows that together cover the corpus."""
    total = store.bounds[-1]
    return [(start, min(start + 50_000, total)) for start in range(0, total, 50_000)]


def resident_mb() -> float:
    """The largest resident set so far, in 1e6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Search, print the measurements of each rank, and check the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("width", 256), ("queries", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", required=True, help="folder for the corpus, which is kept")
    args = parser.parse_args()
    cpu_emulation.enable()
    world = process_groups.initialize_distributed(600)
    store = make_store(Path(args.folder), args.rows, args.width)
    bounds = [args.rows * rank // world for rank in range(world + 1)]
    first, last = bounds[dist.get_rank()], bounds[dist.get_rank() + 1]
    queries = torch.from_numpy(unit_rows(args.queries, args.width, 0))
    before, started = resident_mb(), time.perf_counter()
    best, _ = search(queries, StoredRows(store, first, last), K, first, dist.group.WORLD)
    seconds = time.perf_counter() - started
    most = resident_mb()
    memory = f"most {most:.0f} MB, grown {most - before:.0f} MB"
    print(f"rank {dist.get_rank()}: rows {first} to {last}, {seconds:.1f} s, {memory}")
    if dist.get_rank() == 0:
        check(store, queries[:SAMPLE].numpy(), best[:SAMPLE].numpy())
        print(f"the best {K} of {SAMPLE} queries are numpy's")
    dist.barrier()
    process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

"""Measure the search of mining: seconds, CPU seconds, memory of each rank, and the recall of the approximate one.

    torchrun --nproc-per-node 2 -m benchmarks.mining_search --folder DIR [--pairs 50000 100000 200000] [--width 256]
        [--depth 100] [--data random|clustered|FILE.npy] [--search exact|faiss] [--probes 64] [--ranks 1 64]

N pairs are N queries and N targets, in a file of embeddings like those that `llave mine` keeps, of which every query is
searched in all targets. They are random unit vectors; or clustered ones, of which about 100 lie around each centre with
a cosine of 0.7 to it, and a query has a cosine of 0.9 with its target; or the rows of the file of a mining, half of
them queries. Then an exact search of 1,000,000 pairs is planned from the CPU seconds of a comparison, for each number
of ranks. DIR gets the results as JSON too.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_llave.config.mining import SEARCHES, Search
from megatron_llave.data.index import Shard
from megatron_llave.data.stored_vectors import open_vectors, query_name, target_name
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.mining.inputs import Content, PairContents, SubsetInputs, collect
from megatron_llave.mining.neighbours import QUERIES_PER_BLOCK, NearestTargets

PLANNED = 1_000_000
PER_CLUSTER = 100


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def beside(rows: np.ndarray, cosine: float, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors with about this cosine to the rows [n, d] of unit length."""
    noise = generator.standard_normal(rows.shape, np.float32) / np.sqrt(rows.shape[1])
    return unit(cosine * rows + np.sqrt(1 - cosine**2) * noise)


def make_vectors(data: str, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` queries and as many targets [count, d], or half of the rows of a file each."""
    generator = np.random.default_rng(0)
    if data.endswith(".npy"):
        rows = generator.permutation(unit(np.load(data)))
        return rows[: len(rows) // 2], rows[len(rows) // 2 : len(rows) // 2 * 2]
    if data == "random":
        return tuple(unit(generator.standard_normal((count, width), np.float32)) for _ in range(2))
    centres = unit(generator.standard_normal((max(1, count // PER_CLUSTER), width), np.float32))
    targets = beside(centres[generator.integers(len(centres), size=count)], 0.7, generator)
    return beside(targets, 0.9, generator), targets


def write_vectors(file: Path, data: str, count: int, width: int) -> None:
    """The embeddings of the queries and targets of a subset."""
    queries, targets = make_vectors(data, count, width)
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = np.lib.format.open_memmap(file, "w+", np.float32, (2 * len(queries), queries.shape[1]))
    rows[: len(queries)], rows[len(queries) :] = queries, targets
    rows.flush()
    names = [query_name("x", str(i)) for i in range(len(queries))]
    names += [target_name("x", str(i)) for i in range(len(queries))]
    file.with_suffix(".ids").write_text("".join(f"{name}\n" for name in names))


def make_inputs(count: int) -> SubsetInputs:
    """A subset of `count` pairs."""
    contents = (Content(str(i), b"%d" % i, b"%d" % i) for i in range(count))
    pairs = [PairContents(str(i), i, one, [one], []) for i, one in enumerate(contents)]
    return collect("x", [Shard("x.tar", count, 0, "")], [pairs])


def peak() -> int:
    """The largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(file: Path, depth: int, how: Search) -> dict[str, Any]:
    """Search for all queries, and say what it took; of each rank where it says so."""
    started, vectors = time.perf_counter(), open_vectors(file)
    inputs = make_inputs(len(vectors.hashes) // 2)
    before, prepared = peak(), time.perf_counter()
    nearest = NearestTargets(inputs, vectors, depth, how)
    indexed, on_cpu, checksum = time.perf_counter(), time.process_time(), 0
    for block in nearest:
        checksum += int(block.targets.sum())
    seconds = time.perf_counter() - indexed
    of_rank = {"cpu_seconds": time.process_time() - on_cpu, "peak_before": before, "peak": peak()}
    of_ranks: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, of_rank)
    comparisons = len(inputs.query_ids) * len(inputs.target_ids)
    return {
        "pairs": len(inputs.query_ids),
        "width": vectors.width,
        "search": how.kind,
        "probes": how.probes if how.kind == "faiss" else None,
        "recall": nearest.recall,
        "preparing_seconds": prepared - started,
        "indexing_seconds": indexed - prepared,
        "seconds": seconds,
        "cpu_seconds_per_1e9": sum(rank["cpu_seconds"] for rank in of_ranks) / comparisons * 1e9,
        "checksum": checksum,
        "ranks": of_ranks,
    }


def plan(width: int, depth: int, ranks: int, seconds_per_1e9: float) -> dict[str, float]:
    """What the exact search of PLANNED pairs needs of each of the ranks, at this cost of 1e9 comparisons."""
    comparisons, keys = PLANNED**2 / ranks, QUERIES_PER_BLOCK * depth * 8
    return {
        "ranks": ranks,
        "comparisons_1e12": comparisons / 1e12,
        "products_TFLOP": 2 * comparisons * width / 1e12,
        "targets_GB": PLANNED / ranks * width * 4 / 1e9,
        "merging_GB": keys * (2 * ranks + 2) / 1e9,  # of one block: those of all ranks, and joined, and the best ones
        "gathered_GB": PLANNED * depth * 8 * (ranks - 1) / 1e9,
        "hours": comparisons / 1e9 * seconds_per_1e9 / 3600,
    }


def main() -> None:
    """Measure each number of pairs, and print what is measured and planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="folder for the vectors, which are kept, and the results")
    parser.add_argument("--pairs", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--data", default="random", metavar="random|clustered|FILE.npy")
    parser.add_argument("--search", choices=SEARCHES, default="exact")
    parser.add_argument("--probes", type=int, nargs="+", default=[Search.probes])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8, 64], help="numbers of ranks to plan for")
    args = parser.parse_args()
    cpu_emulation.enable()
    world = process_groups.initialize_distributed(3600)
    is_first = dist.get_rank() == 0
    measured = []
    for count in sorted(args.pairs):
        file = Path(args.folder) / f"{Path(args.data).stem}-{count}.npy"
        if is_first and not file.is_file():
            write_vectors(file, args.data, count, args.width)
        dist.barrier()
        for probes in args.probes:
            measured.append(measure(file, args.depth, Search(args.search, probes)))
            if is_first:
                print(json.dumps(measured[-1]), flush=True)
    last = measured[-1]
    plans = [plan(last["width"], args.depth, ranks, last["cpu_seconds_per_1e9"]) for ranks in args.ranks]
    if is_first:
        for one in plans if args.search == "exact" else ():
            print(json.dumps(one))
        result = {"data": args.data, "depth": args.depth, "measured": measured, "plans": plans}
        name = f"results-{Path(args.data).stem}-{args.search}-{world}.json"
        (Path(args.folder) / name).write_text(json.dumps(result, indent=1))
    process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

"""Run by test_mined.py on several ranks: mines random vectors and writes what the rules leave, for each of RULES.

Where FAISS is installed, it also mines with approximate searches, for each of PROBES.
"""

import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_llave.config.mining import Rules, Search
from megatron_llave.data.index import Shard
from megatron_llave.data.stored_vectors import open_vectors, query_name, target_name
from megatron_llave.distributed import process_groups
from megatron_llave.evaluation import ranking
from megatron_llave.mining import neighbours
from megatron_llave.mining.inputs import Content, PairContents, SubsetInputs, collect
from megatron_llave.mining.mined import mine_subset
from megatron_llave.mining.neighbours import NearestTargets
from megatron_llave.mining.run import recall_of

RULES = {
    "nothing": Rules(ratio=None, depth=40, negatives=40),
    "default": Rules(depth=40),
    "depth": Rules(ratio=None, depth=7, negatives=7),
    "skip": Rules(ratio=None, depth=40, skip=13),
    "ratio": Rules(ratio=0.8, depth=40, negatives=40),
    "margin": Rules(ratio=None, margin=0.1, depth=40, negatives=40),
    "mean_margin": Rules(ratio=None, mean_margin=0.05, depth=40, negatives=40),
    "floor": Rules(ratio=None, floor=0.85, depth=40, negatives=40),
    "ceiling": Rules(ratio=None, ceiling=0.85, depth=40, negatives=40),
    "min_positive": Rules(ratio=None, min_positive=0.6, depth=40),
    "max_uses": Rules(ratio=None, max_uses=2, depth=40),
    "random": Rules(ratio=None, skip=5, depth=40, pick="random", seed=3, max_uses=4),
    "all": Rules(3, 40, 2, 0.97, 0.01, 0.02, 0.1, 0.95, 0.3, 4),
}
OF_TWO = {
    "two of two": Rules(ratio=None, votes=2, depth=40),
    "one of two": Rules(ratio=0.9, votes=1, depth=40, min_positive=0.5, max_uses=3),
}
PROBES = {"few lists": 2, "all lists": 10**6}


def write_vectors(folder: Path, seed: int, n: int, width: int) -> Path:
    """Embeddings of n queries and n targets, of which each query is near its own; a few targets are equal."""
    generator = np.random.default_rng(seed)
    targets = generator.standard_normal((n, width))
    targets[5::50] = targets[4::50]
    queries = targets + 0.7 * generator.standard_normal((n, width))
    queries[::9] = generator.standard_normal((len(queries[::9]), width))  # positives of low or negative similarity
    rows = np.concatenate([queries, targets]).astype(np.float32)
    np.save(folder / f"{seed}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    names = [query_name("random", f"q{i}") for i in range(n)] + [target_name("random", f"t{i}") for i in range(n)]
    (folder / f"{seed}.ids").write_text("".join(f"{name}\n" for name in names))
    return folder / f"{seed}.npy"


def pair(n: int, number: int, target: int) -> PairContents:
    """A pair whose targets with numbers 100, 101 and 102 of each 1000 have the same image under other texts."""

    def of_target(i: int) -> Content:
        image = i // 1000 if i % 1000 in (100, 101, 102) else n + i
        return Content(f"t{i}", b"%d" % i, b"image %d" % image)

    query = Content(f"q{number}", b"query %d" % number, b"query %d" % number)
    negatives = [of_target((number + 3) % n)] if number % 11 == 0 else []
    return PairContents(f"{number}-{target}", 0, query, [of_target(target)], negatives)


def make_inputs(n: int) -> SubsetInputs:
    """n queries and n targets; every fifth query has two further positives, in pairs of their own."""
    pairs = [pair(n, i, i) for i in range(n)]
    pairs += [pair(n, i, (i + step) % n) for i in range(0, n, 5) for step in (1, 7)]
    return collect("random", [Shard("random.tar", len(pairs), 0, "")], [pairs])


def main() -> None:
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    if process_groups.initialize_distributed(60) > 1:  # other blocks, and targets that are read again for each
        neighbours.QUERIES_PER_BLOCK, neighbours.MOST_RESIDENT, ranking.CANDIDATES_PER_BLOCK = 700, 0, 1000
    inputs = make_inputs(n)
    found = [
        list(NearestTargets(inputs, open_vectors(folder / f"{seed}.npy"), 40)) for seed in (0, 1)[: int(sys.argv[3])]
    ]
    rules = {name: (rule, found[:1]) for name, rule in RULES.items()}
    rules |= {name: (rule, found) for name, rule in OF_TWO.items() if len(found) > 1}
    mined = {name: mine_subset(inputs, models, rule) for name, (rule, models) in rules.items()}
    for name, probes in PROBES.items() if importlib.util.find_spec("faiss") else ():
        nearest = NearestTargets(inputs, open_vectors(folder / "0.npy"), 40, Search("faiss", probes))
        mined[name] = mine_subset(inputs, [nearest], RULES["nothing"])
        mined[name].report |= recall_of([nearest])
    (folder / f"{dist.get_world_size()}-{dist.get_rank()}.pickle").write_bytes(
        pickle.dumps({name: (x.negatives, x.similarity, x.dropped, x.report) for name, x in mined.items()})
    )
    process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

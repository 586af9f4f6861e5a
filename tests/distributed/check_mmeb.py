"""Under torchrun: MMEB evaluation at a layout.

check_mmeb.py golden OUT tensor,pipeline       golden embeddings: the official evaluation's files
check_mmeb.py model FOLDER OUT tensor,pipeline[,context] TOKENIZER   a model: its results, in OUT
"""

import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from golden_mmeb import GOLDEN, IDENTITY, NAMES, GoldenEmbedder, assert_released_files, golden_tasks

from megatron_llave.config.schema import EvaluateConfig, ParallelConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.embedding import cache
from megatron_llave.embedding.cache import CachedEmbedder
from megatron_llave.embedding.embedder import embed_parts, load_model
from megatron_llave.evaluation.evaluate import evaluate_tasks


def check_golden(out: Path, layout: str) -> None:
    """Write the official evaluation's files, then evaluate again without any embedding."""
    tensor, pipeline = map(int, layout.split(","))
    groups = process_groups.initialize_model_parallel(ParallelConfig(tensor=tensor, pipeline=pipeline))
    is_writer = groups.tp.rank() == 0 and groups.pp.rank() == pipeline - 1
    embedder, tasks = GoldenEmbedder(is_writer), golden_tasks()
    identity = IDENTITY if dist.get_rank() == 0 else {}
    done = evaluate_tasks(CachedEmbedder(embedder, out, identity, groups.dp), tasks, "first")
    total = sum(len(task.inputs) for task in tasks)
    assert (done.num_finished, done.num_inputs, done.num_embedded) == (0, total, total)
    assert_released_files(out)
    again = evaluate_tasks(CachedEmbedder(GoldenEmbedder(is_writer), out, identity, groups.dp), tasks, "first")
    assert (again.num_finished, again.num_embedded) == (len(NAMES), 0)
    assert again.results == done.results
    print(f"golden at {layout}: {len(embedder.asked)} inputs of {total} here", flush=True)


def check_model(folder: str, out: Path, layout: str, tokenizer: str) -> None:
    """A real model writes its results; in memory they are the same."""
    sizes = zip(("tensor", "pipeline", "context"), layout.split(","))
    overrides = [f"data.tokenizer={tokenizer}", *(f"parallel.{key}={size}" for key, size in sizes)]
    model = load_model(folder, overrides=overrides)
    tasks = golden_tasks()
    embedder = partial(embed_parts, model)
    done = evaluate_tasks(CachedEmbedder(embedder, out, IDENTITY, model.groups.dp), tasks, "first")
    in_memory = evaluate_tasks(CachedEmbedder(embedder, None, {}, model.groups.dp), tasks, "first")
    for stored, kept in zip(done.results, in_memory.results, strict=True):
        assert stored.top == kept.top and stored.precision_at_1 == kept.precision_at_1
    print(f"model at {layout}: {[result.precision_at_1 for result in done.results]}", flush=True)


if __name__ == "__main__":
    cpu_emulation.enable()
    process_groups.initialize_distributed(120)
    assert EvaluateConfig().threads >= 1 and GOLDEN.is_dir()
    cache.PART_COST = 20  # a few inputs a part, so that every rank gets some
    if sys.argv[1] == "golden":
        check_golden(Path(sys.argv[2]), sys.argv[3])
    else:
        check_model(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    dist.barrier()
    process_groups.destroy_distributed()

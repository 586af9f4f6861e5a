"""Memory of steps by a token budget and of counted micro batches: 256 against 4,096 pairs, and 20 mixed steps.

    OMP_NUM_THREADS=1 python -m benchmarks.token_budget --data runs/openmoji --out raw.jsonl [--only NAME ...]

Each variant is a process of its own that trains a tiny model with one data worker. "host" is the largest sum of the
proportional set sizes (PSS) of the process and its data workers while it trains, less the process's own before its data
are opened. "tensors" is the largest number of bytes of the tensors that torch has made in a step and that exist at the
same time, without weights, gradients and moments. docs/results/2026-11-27-token-budget.md has the results.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.memory_plan import Peak
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.models import build_model
from megatron_llave.train import open_steps, train_step
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.micro_batches import subset_of
from megatron_llave.training.optimizer import build_trainable

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "tiny.yaml"
ALL = "data.subsets={image_to_name: {weight: 1}, composed: {weight: 1}, vqa: {weight: 1}, grounding: {weight: 1}}"
SAME = [
    "data.subsets=null",
    ALL,
    "data.workers=1",
    "optimizer.learning_rate=1e-5",
    "optimizer.warmup_steps=0",
    "train.steps=100",
]
MODELS = {"tiny": ["model.image_grids=[[1,2],[2,1],[2,2]]"], "tiny_qwen3vl": ["model.preset=tiny_qwen3vl"]}
MIXED, SIZES = 128, (256, 4096)
"""Pairs of the mixed steps, and of those that are compared by their size."""
COUNTED = {MIXED: 16, **dict.fromkeys(SIZES, 32)}
"""Pairs of a counted micro batch."""
TOKENS = {16: 2500, 32: 5000}
"""Budget with which micro batches need about as much memory as the largest one of so many pairs."""
EVERY = 0.02
"""Seconds between two looks at the memory of the processes."""


def variants() -> Iterator[tuple[str, int, list[str]]]:
    """Yield name, number of steps and overrides of each variant."""
    for model, overrides in MODELS.items():
        for pairs in (MIXED, *(SIZES if model == "tiny" else ())):
            size = COUNTED[pairs]
            for kind, key in (
                ("counted", f"micro_batch_size={size}"),
                ("budget", f"tokens_per_micro_batch={TOKENS[size]}"),
            ):
                name, steps = ("mixed", 20) if pairs == MIXED else (f"size/{pairs}", 2)
                yield f"{name}/{model}/{kind}", steps, [*overrides, f"train.global_batch_size={pairs}", f"train.{key}"]


@contextmanager
def host_memory() -> Iterator[list[int]]:
    """Look at the PSS of this process and its children while the block runs; the list gets the largest sum."""
    process, most, done = psutil.Process(), [0], threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            total = 0
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):
                    total += one.memory_full_info().pss
            most[0] = max(most[0], total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def measure(cfg: RunConfig, steps: int) -> dict:
    """Train for some steps and return what they took."""
    groups = process_groups.initialize_model_parallel(cfg.parallel)
    device = process_groups.device()
    chunks = build_model(cfg.model, cfg.parallel, groups, device, seed=0)
    trainable = build_trainable(cfg, chunks, groups)
    before = psutil.Process().memory_full_info().pss
    record: dict = {"tensors": [], "micro_batches": [], "losses": [], "subsets": [], "tokens": [], "tiles": []}
    started = time.perf_counter()
    with host_memory() as most:
        stream = open_steps(cfg, groups, None)
        for step in range(steps):
            batches = next(stream).batches
            loss = loss_of_subset(cfg, subset_of(batches))
            with Peak() as peak:
                result = train_step(trainable, batches, loss, step, groups)
            metrics = step_metrics(result.shares, result.batches, groups.dp)
            values = {"tensors": peak.most, "micro_batches": len(batches), "losses": metrics["loss"]}
            values |= {"subsets": result.batches[0].subset, "tokens": metrics["tokens"], "tiles": metrics["tiles"]}
            for name, value in values.items():
                record[name].append(value)
    return record | {"host": most[0] - before, "seconds": round(time.perf_counter() - started, 1)}


def run_variant(args: argparse.Namespace) -> None:
    """The process of a variant: prints its record."""
    [(_, steps, overrides)] = [variant for variant in variants() if variant[0] == args.variant]
    cpu_emulation.enable()
    process_groups.initialize_distributed(3600)
    cfg = load_config(CONFIG, [f"data.path={args.data}", *SAME, *overrides])
    print(json.dumps({"variant": args.variant, **measure(cfg, steps)}))
    process_groups.destroy_distributed()


def main() -> None:
    """Run each variant in a process of its own, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the demo's data, from prepare_data.py openmoji")
    parser.add_argument("--out", type=Path, default=Path("token_budget.jsonl"), help="file for the raw figures")
    parser.add_argument("--only", nargs="*", help="names of variants, or beginnings of them")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        run_variant(args)
        return
    for name, _, _ in variants():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        command = [sys.executable, "-m", "benchmarks.token_budget", "--data", args.data, "--variant", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        record = json.loads(done.stdout.splitlines()[-1])
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        peaks, mean = record["tensors"], sum(record["tensors"]) / len(record["tensors"])
        spread = f"{min(peaks) / mean:.3f} to {max(peaks) / mean:.3f} of their mean"
        host = f"host {record['host'] / 2**20:.0f} MiB"
        print(f"{name}: {host}, tensors {mean / 2**20:.1f} MiB, {spread}, {record['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

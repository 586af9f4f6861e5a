"""Measure the time of a step with negatives of the global batch, beside a one-pass step with those of the micro batch.

    torchrun --nproc-per-node 1 benchmarks/gradient_cache.py --data runs/openmoji [--pairs 64] [--micro-batch 8 16]

The alternative is `micro_batch`: one forward and backward pass per micro batch, as in the official LLaVE repository.
Both variants process the same micro batches of real pairs with the tiny model, in turn, in one process. By number of
operations, a frozen vision encoder T and a decoder F give a ratio of (T + 4 F) / (T + 3 F), which is at most 4/3; with
a trained vision encoder the ratio is 4/3.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

from megatron_llave.batch import PairBatch
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.step_buffer import unpack_step
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import build_model, build_processor
from megatron_llave.train import train_step
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.optimizer import build_trainable

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny.yaml"
VARIANTS = ("micro_batch", "global_batch")


def fresh(batches: list[PairBatch]) -> list[PairBatch]:
    """The same micro batches without the features that an earlier step kept."""
    return [replace(batch, sequences=replace(batch.sequences, features=None)) for batch in batches]


def measure(cfg: RunConfig, repeats: int) -> tuple[dict[str, float], int, int]:
    """Median seconds of a step of each variant, the number of tokens of a step, and of micro batches on a rank."""
    validate_batch(cfg, validate_layout(cfg.model, cfg.parallel, process_groups.initialize_distributed(600)))
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    stream = build_train_stream(cfg, build_processor(cfg.data, cfg.model), groups.dp.rank(), groups.dp.size(), 1)
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), cfg.train.seed)
    trainable = build_trainable(cfg, chunks, groups)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    tokens = []
    for step in range(repeats + 1):
        batches = unpack_step(next(stream).to(process_groups.device())).batches
        for variant in VARIANTS:
            started = time.perf_counter()
            result = train_step(trainable, fresh(batches), replace(cfg.loss, negatives=variant), step, groups)
            record = step_metrics(result.shares, result.batches, groups.dp)
            seconds[variant].append(time.perf_counter() - started)
        tokens.append(record["tokens"])
    process_groups.destroy_model_parallel()
    # The first step also warms up.
    medians = {variant: statistics.median(values[1:]) for variant, values in seconds.items()}
    return medians, round(statistics.fmean(tokens[1:])), len(batches)


def main() -> None:
    """Print a Markdown table with one row per micro-batch size, with a trained and with a frozen vision encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that tools/prepare_data.py openmoji made")
    parser.add_argument("--pairs", type=int, default=64, help="pairs per step")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        print("| vision encoder | micro batches | tokens / step | one pass s | two passes s | ratio |")
        print("|---" + "|---:" * 5 + "|")
        for frozen in (True, False):
            for size in args.micro_batch:
                settings = [f"data.path={args.data}", f"train.global_batch_size={args.pairs}"]
                settings += [f"train.micro_batch_size={size}", f"model.freeze={'[vision]' if frozen else '[]'}"]
                cfg = load_config(TINY, settings)
                seconds, tokens, micro_batches = measure(cfg, args.repeats)
                ratio = seconds["global_batch"] / seconds["micro_batch"]
                cells = [f"{seconds[variant]:.3f}" for variant in VARIANTS] + [f"{ratio:.2f}"]
                encoder = "frozen" if frozen else "trained"
                print("|", " | ".join([encoder, f"{micro_batches} x {size}", str(tokens), *cells]), "|", flush=True)
        process_groups.destroy_distributed()


if __name__ == "__main__":
    main()

"""Measure step time, tokens/s, MFU and peak memory on one GPU, beside the official way on transformers' modules.

    python -m benchmarks.gpu_step [--presets 0.5b 2b 7b] [--variants local sdpa te ...] [--pairs 8 4]
        [--negatives micro_batch global_batch] [--micro-batches 2] [--raw FILE] [section.key=value ...]
    python -m benchmarks.gpu_step --table FILE

All variants get the same pairs, of MMEB's kinds and lengths, and the same random weights. The vision encoder is frozen
and the precision is bf16; the 7b recomputes every layer in the backward pass. Each variant runs in a process of its own
with its own time limit, and the next process loads its packages meanwhile and waits for its turn. Ours runs on torch's
kernels, on Transformer Engine's, and with its FP8 recipes. The official way has two padded forward passes, blank tiles
for inputs without an image, SDPA or flash attention, negatives of the micro batch, and AdamW with weights and moments
in bf16. Ours keeps both in float32 and sums gradients in float32, which takes 10 bytes more per parameter. A variant
whose packages are not installed, or that runs out of memory, is a row that says so.

FLOPs are those that the pairs need (`flops.step_flops`), the same for all variants. `MFU` divides by the dense peak at
the variant's precision; for FP8 this is twice that of bf16, although vision encoder and projector stay in bf16. `of
product` divides by the rate of a large bf16 matrix product. `new shapes` is the time of a step with lengths that the
process has not met before. `planned` is the memory by the formulas of tools/plan.py. `cosine` is the least cosine
between the embeddings of a variant, before its first step, and those of the variant that ran first. Batches are on the
device before the clock starts. Each measured setting is appended to FILE at once, as a line of JSON; --table prints the
table of such a file.

Without a GPU everything runs on the CPU, which shows only that it runs.
"""

import argparse
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import released_step
from benchmarks.released_step import packed_work, sequences_of, total
from benchmarks.training_step import Ours, PairsOfStep, Released, make_step, start
from megatron_llave.config.load import config_from_dict, override_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import build_model
from megatron_llave.planning.flops import peak_tflops, step_flops
from megatron_llave.planning.memory import MicroBatch, StepShape, stage_memory
from megatron_llave.planning.pair_lengths import SideShape
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.metrics import peak_memory_gb

ENGINE = ["model.kernels=transformer_engine"]
OURS = {"ours, torch": [], "ours, Transformer Engine": ENGINE} | {
    f"ours, FP8 {recipe}": [*ENGINE, "model.precision=fp8", f"model.fp8_recipe={recipe}"]
    for recipe in ("delayed", "tensorwise", "blockwise")
}
"""Our variants and their overrides."""
RELEASED = {"released, SDPA": "sdpa", "released, flash attention": "flash_attention_2"}
"""Variants of the official way and their attention in transformers."""
SHORT = dict(zip(("local", "te", "delayed", "tensorwise", "blockwise", "sdpa", "flash"), (*OURS, *RELEASED)))
"""Names on the command line, and the variants that they mean."""
CEILING = "ceiling"
"""Takes the place of a variant: matrix products and a copy, which show what the device can reach."""
SETTINGS = {"7b": ["model.recompute=full"]}
"""Overrides of a preset."""
FP8_SINCE = (8, 9)
"""The lowest compute capability with FP8 matrix products."""
EDGE = 8192
"""Rows and columns of the matrices whose product is the ceiling."""
BOTH = ("micro_batch", "global_batch")
HEADS = ["negatives", "pairs", "step ms", "range", "new shapes ms", "pairs/s", "tokens/s", "TFLOP/s", "MFU"]
HEADS += ["of product", "peak GB", "planned", "cosine"]
Record = dict[str, Any]


def build_config(preset: str, variant: str, pairs: int, args: argparse.Namespace) -> RunConfig:
    """The configuration of a variant."""
    batch = [f"train.micro_batch_size={pairs}", f"train.global_batch_size={pairs * args.micro_batches}"]
    fixed = ["model.freeze=[vision]", "model.precision=bf16", "loss.negatives=micro_batch", "train.steps=1000"]
    overrides = [*fixed, *batch, *SETTINGS.get(preset, []), *args.overrides, *OURS.get(variant, [])]
    return override_config(config_from_dict({"model": {"preset": preset}}), overrides)


def what_is_missing(variant: str, engine: Path | None) -> str:
    """Name the package that a variant lacks, or "" if it lacks none. Does not start CUDA."""
    has_engine = find_spec("transformer_engine") or (engine is not None and (engine / "transformer_engine").is_dir())
    if ENGINE[0] in OURS.get(variant, ()) and not (torch.cuda.is_available() and has_engine):
        return "no Transformer Engine"
    if RELEASED.get(variant) == "flash_attention_2" and not (torch.cuda.is_available() and find_spec("flash_attn")):
        return "no flash attention"
    return ""


def synchronize() -> None:
    """Wait until the device has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Seconds of each repeat, after the warm-up."""
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def product_tflops(edge: int) -> float:
    """TFLOP/s of a bf16 product of two square matrices of random numbers."""
    a, b = (torch.randn(edge, edge, device=process_groups.device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * edge**3 / statistics.median(seconds_of(partial(torch.matmul, a, b), 20)) / 1e12


def fp8_product_tflops(edge: int) -> float | None:
    """TFLOP/s of the same product in FP8 with one scale per matrix; None if the GPU has no FP8."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_SINCE:
        return None
    a, b = (torch.randn(edge, edge, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device="cuda")
    product = partial(torch._scaled_mm, a, b.T, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    return 2 * edge**3 / statistics.median(seconds_of(product, 20)) / 1e12


def copy_gb_per_second(num_bytes: int) -> float:
    """GB/s of a copy on the device, counting the bytes read and those written."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=process_groups.device())
    target = torch.empty_like(source)
    return 2 * num_bytes / statistics.median(seconds_of(lambda: target.copy_(source), 10)) / 1e9


def measure_ceiling() -> Record:
    """The name and the memory of the device, and the rates that it reaches."""
    on_gpu = torch.cuda.is_available()
    edge, versions = EDGE if on_gpu else 512, {"torch": torch.__version__, "cuda": torch.version.cuda}
    rates = {"device": torch.cuda.get_device_name() if on_gpu else "CPU (figures mean nothing)", **versions}
    if on_gpu:
        rates |= {"memory_gb": torch.cuda.mem_get_info()[1] / 1e9, "cudnn": torch.backends.cudnn.version()}
    rates |= {"product_tflops": product_tflops(edge), "copy_gb_s": copy_gb_per_second(2**31 if on_gpu else 2**20)}
    return rates | {"fp8_product_tflops": fp8_product_tflops(edge)}


def build_variant(variant: str, cfg: RunConfig) -> Ours | Released:
    """Build a variant with the random weights of seed 0."""
    groups = start(cfg)
    if variant in OURS:
        return Ours(cfg, groups)
    released = Released(cfg, torch.bfloat16, RELEASED[variant])
    if cfg.model.recompute != "none":
        released.model.gradient_checkpointing_enable()
    (chunk,) = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=0)
    released_step.copy_weights(chunk, released.model, cfg.model)
    return released


def planned_gb(cfg: RunConfig, micro_batches: PairsOfStep) -> float:
    """The memory that the planner expects of our variant."""
    sides = [[side for part in sequences_of(pairs) for side in part] for pairs in micro_batches]
    longest = max(sides, key=lambda of_batch: sum(side.sequence.length for side in of_batch))
    shapes = [SideShape(s.sequence.length, sum(map(len, s.sequence.layouts)), s.num_tiles) for s in longest]
    is_global = cfg.loss.negatives == "global_batch" and len(micro_batches) > 1
    rows = cfg.train.global_batch_size if is_global else cfg.train.micro_batch_size
    step = StepShape(1, len(micro_batches), rows, rows, is_global, MicroBatch.of(shapes))
    return sum(stage_memory(cfg, 0, step, torch.cuda.is_available()).values()) / 1e9


def least_cosine(embeddings: torch.Tensor, path: Path) -> float:
    """The least cosine of these embeddings and those in the file, which the first variant writes."""
    if not path.exists():
        save_file({"embeddings": embeddings}, path)
    return float((embeddings * load_file(path)["embeddings"]).sum(1).min())


def measure_setting(variant: str, measured: Ours | Released, cfg: RunConfig, repeats: int) -> Record:
    """Measure the seconds of each step, their peak memory, and steps with new shapes."""
    micro_batches = make_step(cfg, is_mixed=True)
    batches = measured.prepare(micro_batches)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    options = {"negatives": cfg.loss.negatives} if variant in OURS else {}
    started = time.perf_counter()
    seconds = seconds_of(lambda: measured.step(batches, **options), repeats)
    warm, peak = time.perf_counter() - started - sum(seconds), peak_memory_gb()
    batches.clear()
    others = [measured.prepare(make_step(cfg, is_mixed=True, seed=seed)) for seed in (1, 2)]
    new_shapes = [seconds_of(lambda: measured.step(other, **options), 1, warm_up=0)[0] for other in others]
    work = total([packed_work(pairs) for pairs in micro_batches])
    figures = {"seconds": seconds, "warm_up_seconds": warm, "new_shapes_seconds": new_shapes, "peak_gb": peak}
    figures |= {"global_batch": cfg.train.global_batch_size, "tokens": work.tokens, "tiles": work.tiles}
    figures |= {"tflop": step_flops(cfg.model, work) / 1e12, "peak_tflops": peak_tflops(cfg.model.precision)}
    return figures | {"planned_gb": planned_gb(cfg, micro_batches) if variant in OURS else None}


def take_turn(folder: Path, seconds: int) -> None:
    """Wait until no other variant has the device. From then on the process ends after so many seconds in any case."""
    lock = os.open(folder / "turn", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until the process ends
    signal.alarm(seconds)
    if not torch.cuda.is_available():
        return
    for _ in range(50):  # the memory of the previous process is free a little later than its lock
        try:
            free, total_memory = torch.cuda.mem_get_info()
        except RuntimeError:  # there is not even room for CUDA's context yet
            free, total_memory = 0, 1
        if free > 0.95 * total_memory:
            return
        time.sleep(0.2)


def append(path: Path, record: Record) -> None:
    """Append a record as a line of JSON."""
    with path.open("a") as file:
        print(json.dumps(record), file=file)


def run_variant(preset: str, variant: str, args: argparse.Namespace) -> None:
    """Measure one setting after another, in a process of its own; each is written to the file at once."""
    who = {"preset": preset, "variant": variant}
    if variant == CEILING:
        return append(args.raw, {"variant": CEILING, **measure_ceiling()})
    if "FP8" in variant and torch.cuda.get_device_capability() < FP8_SINCE:
        return append(args.raw, {**who, "missing": "no FP8 on this GPU"})
    started = time.perf_counter()
    measured = build_variant(variant, build_config(preset, variant, args.pairs[0], args))
    built, cosines = time.perf_counter() - started, {}
    for pairs in args.pairs:  # before the first step changes the weights
        batches = measured.prepare(make_step(build_config(preset, variant, pairs, args), is_mixed=True))
        cosines[pairs] = least_cosine(measured.embed(batches).cpu(), args.folder / f"{preset}.{pairs}.safetensors")
        del batches
    for pairs in args.pairs:
        for negatives in args.negatives if variant in OURS else ["micro_batch"]:
            given = argparse.Namespace(**{**vars(args), "overrides": [*args.overrides, f"loss.negatives={negatives}"]})
            cfg = build_config(preset, variant, pairs, given)
            setting = {**who, "negatives": negatives, "pairs": pairs, "build_seconds": built, "cosine": cosines[pairs]}
            try:
                append(args.raw, {**setting, **measure_setting(variant, measured, cfg, args.repeats)})
            except torch.OutOfMemoryError:
                append(args.raw, {**setting, "missing": "out of memory"})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    process_groups.destroy_distributed()


def start_variant(job: tuple[str, str], args: argparse.Namespace) -> None:
    """Run a variant in another process; a failure is written to the file too."""
    preset, variant = job
    who = {"preset": preset, "variant": variant}
    missing = what_is_missing(variant, args.engine)
    if missing:
        return append(args.raw, {**who, "missing": missing})
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--run", variant, "--presets", preset]
    command += ["--raw", str(args.raw), "--folder", str(args.folder), "--limit", str(args.limit)]
    for name in ("pairs", "negatives", "micro_batches", "repeats"):
        given = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", *map(str, given if isinstance(given, list) else [given])]
    env = dict(os.environ)
    if args.engine and ENGINE[0] in OURS.get(variant, ()):
        env["PYTHONPATH"] = f"{args.engine}:{env.get('PYTHONPATH', '')}"
    options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "env": env}
    try:
        ran = subprocess.run([*command, *args.overrides], timeout=2 * args.limit + 60, **options)
    except subprocess.TimeoutExpired:
        return append(args.raw, {**who, "failed": "never had its turn, or cannot be ended"})
    if ran.returncode == 0:
        return None
    lines = ran.stderr.strip().splitlines() or ["no message"]
    reason = next((line for line in reversed(lines) if "Error" in line.split(":")[0]), lines[-1])
    if ran.returncode == -signal.SIGALRM:
        reason = f"ended after {args.limit} s"
    print(ran.stderr[-6000:], file=sys.stderr, flush=True)
    key = "missing" if "OutOfMemoryError" in ran.stderr else "failed"
    return append(args.raw, {**who, key: "out of memory" if key == "missing" else reason})


def cells_of(record: Record, ceiling: float | None) -> list[str]:
    """Cells of a row of the table, after preset and variant."""
    said = record.get("missing") or (f"failed: {record['failed']}" if "failed" in record else "")
    if said:
        cells = [record.get("negatives", ""), str(record.get("pairs", "")), said]
        return cells + [""] * (len(HEADS) - len(cells))
    seconds, new, peak = record["seconds"], record["new_shapes_seconds"], record["peak_tflops"]
    median = statistics.median(seconds)
    tflops = record["tflop"] / median
    cells = [record["negatives"], str(record["pairs"]), f"{1000 * median:.1f}"]
    cells += [f"{1000 * min(seconds):.1f} to {1000 * max(seconds):.1f}", f"{1000 * statistics.mean(new):.1f}"]
    cells += [f"{record['global_batch'] / median:.2f}", f"{record['tokens'] / median:.0f}", f"{tflops:.2f}"]
    cells += [f"{100 * tflops / peak:.1f} %" if peak else "-", f"{100 * tflops / ceiling:.1f} %" if ceiling else "-"]
    planned = record["planned_gb"]
    return [*cells, f"{record['peak_gb']:.2f}", f"{planned:.2f}" if planned else "-", f"{record['cosine']:.4f}"]


def print_table(records: Sequence[Record]) -> None:
    """Print the table of raw records; the variants of a preset come in the order of SHORT."""
    ceiling = next((record for record in records if record["variant"] == CEILING and "device" in record), {})
    product = ceiling.get("product_tflops")
    if ceiling:
        fp8, copied = ceiling["fp8_product_tflops"], f"a copy of {ceiling['copy_gb_s']:.0f} GB/s"
        made = f"matrix products of {product:.1f} TFLOP/s in bf16" + (f" and {fp8:.1f} in FP8" if fp8 else "")
        print(f"{ceiling['device']}, torch {ceiling['torch']}; {made}, {copied}\n")
    print("| preset | variant |", " | ".join(HEADS), "|\n|---|---|---" + "|---:" * (len(HEADS) - 1) + "|")
    presets, variants = list(dict.fromkeys(record.get("preset") for record in records)), list(SHORT.values())
    rows = [record for record in records if record["variant"] != CEILING]
    for record in sorted(rows, key=lambda row: (presets.index(row["preset"]), variants.index(row["variant"]))):
        print(f"| {record['preset']} | {record['variant']} |", " | ".join(cells_of(record, product)), "|")


def read_lines(path: Path) -> list[Record]:
    """Records of a file of raw figures; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> bool:
    """Run all variants of all presets. False if one failed; what the device lacks is no failure."""
    given, before = args, read_lines(args.raw)
    jobs = [] if any(record["variant"] == CEILING for record in before) else [(args.presets[0], CEILING)]
    jobs += [(preset, SHORT[variant]) for preset in args.presets for variant in args.variants]
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:  # the second one loads its packages and waits
        for (preset, variant), _ in zip(jobs, pool.map(partial(start_variant, args=given), jobs)):
            print(f"[{time.perf_counter() - started:.0f} s] {preset} {variant}", file=sys.stderr, flush=True)
    records = read_lines(args.raw)
    print_table(records)
    return not any("failed" in record for record in records[len(before) :])


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["0.5b", "2b", "7b"])
    parser.add_argument("--variants", nargs="+", choices=list(SHORT), default=list(SHORT), help="run in this order")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8], help="pairs of a micro batch")
    parser.add_argument(
        "--negatives",
        nargs="+",
        choices=BOTH,
        default=["micro_batch"],
        help="for our variants",
    )
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=240, help="seconds that a variant may take once it has the device")
    parser.add_argument("--raw", type=Path, help="file to append raw figures to, one JSON object per line")
    parser.add_argument("--folder", type=Path, help="folder of the embeddings, which later calls compare with")
    parser.add_argument("--engine", type=Path, help="folder of Transformer Engine, which only its variants import")
    parser.add_argument("--table", type=Path, help="only print the table of a file of raw figures")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [word for word in given if "=" in word and not word.startswith("-")]  # not one more of --pairs 8 4
    args = build_parser().parse_args([*overrides, *(word for word in given if word not in overrides)])
    if args.table:
        return print_table(read_lines(args.table))
    with exit_with_one_line(), tempfile.TemporaryDirectory() as scratch:
        args.folder, args.raw = args.folder or Path(scratch), args.raw or Path(scratch, "raw.jsonl")
        args.folder.mkdir(parents=True, exist_ok=True)
        quiet_dependencies()
        if args.run:
            take_turn(args.folder, args.limit)
            cpu_emulation.enable()
            run_variant(args.presets[0], args.run, args)
        elif not run(args):
            raise SystemExit(1)
    return None


if __name__ == "__main__":
    main()

"""Step time, tokens/s, MFU and peak memory on one GPU, beside the released way on transformers' modules, in one run.

    python -m benchmarks.gpu_step [--presets 0.5b 2b 7b] [--pairs 8] [--micro-batches 2] [section.key=value ...]

Pairs of MMEB's kinds and lengths and random weights, the same in every arm; the tower frozen, bf16; of 7b each layer is
computed again in the backward. Arms run one after another, in a process each. Ours: on torch's kernels, on Transformer
Engine's, with its FP8 recipes; negatives of the micro batch. Released: two padded forwards, blank pictures, SDPA or
flash attention, AdamW with weights and moments in bf16 (ours has float32 ones, and sums gradients in float32: 10 bytes
per parameter more, so that our 7b, 128 GB without activations, wants a GPU of 141 GB). What is not installed, or has no
room, is a row that says so. FLOPs are what the pairs need (flops.step_flops), the same for all arms; `of product`:
their rate over that of a large bf16 matrix product. `cosine`: the least between an arm's embeddings and the first
arm's. `planned`: by tools/plan.py's formulas. Prints a Markdown table.

Where there is no GPU it runs on the CPU, which shows no more than that it runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import released_step
from benchmarks.released_step import packed_work, sequences_of, total
from benchmarks.training_step import MicroBatches, Ours, Released, make_step, start
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
"""Overrides of each arm of ours."""
RELEASED = {"released, SDPA": "sdpa", "released, flash attention": "flash_attention_2"}
"""transformers' attention of each arm of the peer."""
SETTINGS = {"7b": ["model.recompute=full"]}
"""Of a preset."""
FP8_SINCE = (8, 9)
"""Compute capability."""
EDGE = 8192
"""Of the matrices whose product gives the ceiling."""


def build_config(preset: str, arm: str, args: argparse.Namespace) -> RunConfig:
    """Of an arm."""
    batch = [f"train.micro_batch_size={args.pairs}", f"train.global_batch_size={args.pairs * args.micro_batches}"]
    fixed = ["model.freeze=[vision]", "model.precision=bf16", "loss.negatives=micro_batch", "train.steps=1000"]
    overrides = [*fixed, *batch, *SETTINGS.get(preset, []), *args.overrides, *OURS.get(arm, [])]
    return override_config(config_from_dict({"model": {"preset": preset}}), overrides)


def what_is_missing(arm: str) -> str:
    """Of an arm, "" if it can run."""
    if ENGINE[0] in OURS.get(arm, ()) and (not torch.cuda.is_available() or not find_spec("transformer_engine")):
        return "no Transformer Engine"
    if "FP8" in arm and torch.cuda.get_device_capability() < FP8_SINCE:
        return "no FP8 on this GPU"
    if RELEASED.get(arm) == "flash_attention_2" and (not torch.cuda.is_available() or not find_spec("flash_attn")):
        return "no flash attention"
    return ""


def synchronize() -> None:
    """Until the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Of each repeat."""
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]


def product_tflops(edge: int) -> float:
    """TFLOP/s of a bf16 matrix product of random numbers."""
    a, b = (torch.randn(edge, edge, device=process_groups.device(), dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(seconds_of(partial(torch.matmul, a, b), 20))
    del a, b
    torch.cuda.empty_cache()  # the arms are in other processes and want the room
    return 2 * edge**3 / seconds / 1e12


def build_arm(arm: str, cfg: RunConfig) -> Ours | Released:
    """With the weights of seed 0."""
    groups = start(cfg)
    if arm in OURS:
        return Ours(cfg, groups)
    released = Released(cfg, torch.bfloat16, RELEASED[arm])
    if cfg.model.recompute != "none":
        released.model.gradient_checkpointing_enable()
    (chunk,) = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=0)
    released_step.copy_weights(chunk, released.model, cfg.model)
    return released


def measure(arm: str, cfg: RunConfig, repeats: int, embeddings: Path) -> dict[str, Any]:
    """In a process of its own: seconds of each step, and the peak of memory in them; leaves the embeddings."""
    measured = build_arm(arm, cfg)
    batches = measured.prepare(micro_batches_of(cfg))
    save_file({"embeddings": measured.embed(batches).cpu()}, embeddings)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: measured.step(batches), repeats)
    process_groups.destroy_distributed()
    return {"seconds": seconds, "peak GB": peak_memory_gb()}


def micro_batches_of(cfg: RunConfig) -> MicroBatches:
    """The same in every process."""
    return make_step(cfg, is_mixed=True)


def planned_gb(cfg: RunConfig, micro_batches: MicroBatches) -> float:
    """What the planner says of our arm."""
    sides = [[side for part in sequences_of(pairs) for side in part] for pairs in micro_batches]
    longest = max(sides, key=lambda one: sum(side.sequence.length for side in one))
    shapes = [SideShape(s.sequence.length, sum(map(len, s.sequence.layouts)), s.num_tiles) for s in longest]
    rows = cfg.train.micro_batch_size
    step = StepShape(1, len(micro_batches), rows, rows, False, MicroBatch.of(shapes))
    return sum(stage_memory(cfg, 0, step, torch.cuda.is_available()).values()) / 1e9


def row_of(preset: str, arm: str, args: argparse.Namespace, ceiling: float, folder: Path) -> list[str]:
    """Cells of the table; runs the arm."""
    cfg = build_config(preset, arm, args)
    path = folder / f"{preset} {arm}.safetensors"
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--arm", arm, str(path), "--presets", preset]
    command += [*("--pairs", str(args.pairs), "--micro-batches", str(args.micro_batches))]
    command += [*("--repeats", str(args.repeats), *args.overrides)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        if "OutOfMemoryError" in ran.stderr:
            return ["out of memory"]
        print(ran.stderr, file=sys.stderr)
        return [f"failed: {reason}"]
    found = json.loads(ran.stdout.splitlines()[-1])
    micro_batches = micro_batches_of(cfg)
    work = total([packed_work(pairs) for pairs in micro_batches])
    seconds = statistics.median(found["seconds"])
    tflops = step_flops(cfg.model, work) / seconds / 1e12
    peak = peak_tflops(cfg.model.precision)
    first = folder / f"{preset} {next(iter(OURS))}.safetensors"
    cosines = (load_file(path)["embeddings"] * load_file(first)["embeddings"]).sum(1) if first.exists() else None
    cells = [f"{1000 * seconds:.1f}", f"{1000 * min(found['seconds']):.1f} to {1000 * max(found['seconds']):.1f}"]
    cells += [f"{cfg.train.global_batch_size / seconds:.2f}", f"{work.tokens / seconds:.0f}", f"{tflops:.2f}"]
    cells += [f"{100 * tflops / peak:.1f} %" if peak else "-", f"{100 * tflops / ceiling:.1f} %"]
    cells += [f"{found['peak GB']:.2f}", f"{planned_gb(cfg, micro_batches):.2f}" if arm in OURS else "-"]
    return [*cells, f"{cosines.min().item():.4f}" if cosines is not None else "-"]


def run(args: argparse.Namespace) -> bool:
    """A row per preset and arm; whether none failed but for what the device has not."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (figures mean nothing)"
    ceiling, has_failed = product_tflops(EDGE if torch.cuda.is_available() else 512), False
    print(f"{device}, torch {torch.__version__}; a bf16 matrix product of {ceiling:.1f} TFLOP/s\n")
    heads = ["step ms", "range", "pairs/s", "tokens/s", "TFLOP/s", "MFU", "of product", "peak GB", "planned", "cosine"]
    print("| preset | arm |", " | ".join(heads), "|\n|---|---" + "|---:" * len(heads) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.presets:
            for arm in [*OURS, *RELEASED]:
                missing = what_is_missing(arm)
                cells = [missing] if missing else row_of(preset, arm, args, ceiling, Path(folder))
                has_failed |= cells[0].startswith("failed")
                cells += [""] * (len(heads) - len(cells))
                print(f"| {preset} | {arm} |", " | ".join(cells), "|", flush=True)
    return not has_failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["0.5b", "2b", "7b"])
    parser.add_argument("--pairs", type=int, default=8, help="of a micro batch")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arm", nargs=2, metavar=("ARM", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        if args.arm:
            cfg = build_config(args.presets[0], args.arm[0], args)
            print(json.dumps(measure(args.arm[0], cfg, args.repeats, Path(args.arm[1]))))
        elif not run(args):
            raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Show where a training step spends its time on a GPU: kernels, waits of the host, and a trace.

    python -m benchmarks.gpu_profile --out DIR [--preset 0.5b] [--variant te] [--pairs 8] [section.key=value ...]

After some steps of warm-up, one step runs in torch's synchronisation debug mode, which reports each operation that
makes the host wait for the device; they are counted by line of code. Then --steps run under the profiler, and the time
of kernels is summed by name. One more step makes the trace. The results are profile.txt and trace.json.gz (for
chrome://tracing or Perfetto); a trace larger than --megabytes is not written.
"""

import argparse
import collections
import gzip
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_step import SHORT, build_config, build_variant, synchronize
from benchmarks.training_step import make_step
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.training.logger import quiet_dependencies

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
ROWS = 40


def host_waits(step: Callable[[], object]) -> collections.Counter:
    """Count the operations of a step that make the host wait, by file and line; none without a GPU."""
    waits: collections.Counter = collections.Counter()
    if not torch.cuda.is_available():
        step()
        return waits
    root = f"{Path(__file__).parents[1]}/"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            waits[f"{warning.filename.replace(root, '')}:{warning.lineno}"] += 1
    return waits


def profiled(step: Callable[[], object], steps: int) -> tuple[profile, float]:
    """Run so many steps under the profiler; returns it, and the seconds that the steps took."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds) as seen:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        seconds = time.perf_counter() - started
    return seen, seconds


def kernels(events: list[FunctionEvent]) -> list[FunctionEvent]:
    """The events that ran on the device."""
    return [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def busy_seconds(events: list[FunctionEvent]) -> float:
    """Seconds in which the device was busy; kernels that run at the same time count once."""
    busy, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        first = max(end, event.time_range.start)
        busy += max(0.0, event.time_range.end - first)
        end = max(end, event.time_range.end)
    return busy / 1e6


def summary(seen: profile, seconds: float, steps: int, waits: collections.Counter) -> str:
    """The text of profile.txt."""
    events = kernels(seen.events())
    lines = [f"{steps} steps in {seconds:.3f} s under the profiler; the device busy for {busy_seconds(events):.3f} s"]
    lines.append(f"{len(events) / steps:.0f} kernels and copies per step")
    calls = collections.Counter(event.name for event in seen.events())
    lines += [f"{calls[name] / steps:.1f} {name} per step" for name in WAITS]
    lines += ["", f"{sum(waits.values())} operations of a step make the host wait:"]
    lines += [f"{number:5} {place}" for place, number in waits.most_common(ROWS)]
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        by_name[event.name].append(event.time_range.elapsed_us())
    total = sum(map(sum, by_name.values())) or 1.0
    lines += ["", "share   ms/step   calls/step   kernel"]
    for name, taken in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:ROWS]:
        row = f"{100 * sum(taken) / total:5.1f} % {sum(taken) / steps / 1000:8.2f} {len(taken) / steps:10.1f}   "
        lines.append(row + name[:150])
    sort = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    lines += ["", seen.key_averages().table(sort_by=sort, row_limit=ROWS, max_name_column_width=80)]
    return "\n".join(lines)


def write_trace(step: Callable[[], object], path: Path, megabytes: float) -> str:
    """Write the trace of one step; returns a line that says so, or why it was not written."""
    seen, _ = profiled(step, 1)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "trace.json")
        seen.export_chrome_trace(str(raw))
        packed = gzip.compress(raw.read_bytes(), 6)
    if len(packed) > megabytes * 1e6:
        return f"no trace: {len(packed) / 1e6:.1f} MB"
    path.write_bytes(packed)
    return f"{path.name}: {len(packed) / 1e6:.1f} MB"


def run(args: argparse.Namespace) -> None:
    """Warm up, count the waits, profile, and write the results."""
    variant = SHORT[args.variant]
    cfg = build_config(args.preset, variant, args.pairs, args)
    measured = build_variant(variant, cfg)
    batches = measured.prepare(make_step(cfg, is_mixed=True))
    for _ in range(3):
        measured.step(batches)
    waits = host_waits(lambda: measured.step(batches))
    seen, seconds = profiled(lambda: measured.step(batches), args.steps)
    report = f"{args.preset}, {variant}, {args.pairs} pairs x {args.micro_batches} micro batches {args.overrides}\n"
    report += summary(seen, seconds, args.steps, waits)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.txt").write_text(report + "\n")
    print("\n".join(report.splitlines()[:40]), flush=True)
    print(write_trace(lambda: measured.step(batches), args.out / "trace.json.gz", args.megabytes))
    process_groups.destroy_distributed()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--preset", default="0.5b")
    parser.add_argument("--variant", choices=list(SHORT), default="te")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a micro batch")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps under the profiler")
    parser.add_argument("--megabytes", type=float, default=15, help="largest size of the compressed trace")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    args = parser.parse_intermixed_args(sys.argv[1:])
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        run(args)


if __name__ == "__main__":
    main()

"""Measure time and peak memory of the loss, forward and backward, beside dense implementations, in one run.

    python benchmarks/contrastive_loss.py [--batch 1024 4096] [--dim 256 1024] [--repeats 3] [--device cuda]

The alternatives are `dense`, written as in the official LLaVE repository (two logit matrices, weights as
log(exp(alpha * cos)), two cross entropies; llava/model/language_model/loss.py), and `infonce`, plain symmetric cross
entropy without weights. Every case runs in a process of its own, because peak memory on the CPU is the high-water mark
of the process above what its inputs take.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llave.config.loss import LossConfig
from megatron_llave.loss.contrastive import hardness_weighted_contrastive_loss
from megatron_llave.loss.inputs import PairEmbeddings

TEMPERATURE, ALPHA = 0.02, 9.0
LOSS = LossConfig(temperature=TEMPERATURE, alpha=ALPHA)


def ours(query: Tensor, target: Tensor) -> Tensor:
    """The loss of this package."""
    embeddings = PairEmbeddings(query, target, query.new_zeros(0, query.shape[1]))
    return hardness_weighted_contrastive_loss(embeddings, config=LOSS)[0]


def dense(query: Tensor, target: Tensor) -> Tensor:
    """The loss with every matrix written out, as the official code computes it on one device."""
    labels = torch.arange(len(query), device=query.device)
    losses = []
    for anchor, candidate in ((query, target), (target, query)):
        logits = anchor @ candidate.T / TEMPERATURE
        with torch.no_grad():
            weights = torch.log(torch.exp(ALPHA * logits * TEMPERATURE))
            weights.fill_diagonal_(0.0)
        losses.append(F.cross_entropy(logits + weights, labels))
    return (losses[0] + losses[1]) / 2


def infonce(query: Tensor, target: Tensor) -> Tensor:
    """Plain symmetric InfoNCE from one logit matrix."""
    logits = query @ target.T / TEMPERATURE
    labels = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


WAYS = {"ours": ours, "dense": dense, "infonce": infonce}


def measure(way: str, batch: int, dim: int, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of a forward and backward pass, MB of memory above the inputs, and the loss, in this process."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for _ in range(2)]
    rows = [x.to(device).requires_grad_() for x in rows]
    WAYS[way](*(x[:2] for x in rows)).backward()  # this loads the libraries
    seconds = []
    for x in rows:
        x.grad = None
    before = start_peak(device)
    for _ in range(repeats):
        for x in rows:
            x.grad = None
        started = time.perf_counter()
        loss = WAYS[way](*rows)
        loss.backward()
        value = loss.item()  # this waits for the GPU
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "megabytes": read_peak(device) - before, "loss": value}


def start_peak(device: str) -> float:
    """Reset the peak memory; returns the MB that are in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept would be reused without raising the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return read_peak(device)


def read_peak(device: str) -> float:
    """The peak memory in MB since `start_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    """Run one child process per case, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dim", type=int, nargs="+", default=[256, 1024, 3584])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu (Linux) or cuda")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        way, batch, dim = args.case
        print(json.dumps(measure(way, int(batch), int(dim), args.repeats, args.device)))
        return
    print(f"{args.device}, {torch.get_num_threads()} threads; seconds and extra MB of a forward and backward\n")
    print("| B | d | ours s | dense s | InfoNCE s | ours MB | dense MB | InfoNCE MB | time / dense | memory / dense |")
    print("|" + "---:|" * 10)
    for batch in args.batch:
        for dim in args.dim:
            case = {}
            for way in WAYS:
                settings = ["--repeats", str(args.repeats), "--device", args.device]
                command = [sys.executable, __file__, *settings, "--case", way, str(batch), str(dim)]
                case[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            assert abs(case["ours"]["loss"] - case["dense"]["loss"]) < 1e-4, case
            seconds, megabytes = ([case[way][key] for way in WAYS] for key in ("seconds", "megabytes"))
            cells = [f"{x:.3f}" for x in seconds] + [f"{x:.0f}" for x in megabytes]
            ratios = [f"{seconds[0] / seconds[1]:.2f}", f"{megabytes[0] / megabytes[1]:.3f}"]
            print("|", " | ".join([str(batch), str(dim), *cells, *ratios]), "|", flush=True)


if __name__ == "__main__":
    main()

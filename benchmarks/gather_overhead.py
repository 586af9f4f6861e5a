"""What the negatives of the other ranks cost, in time and bytes, and what they bring, in effective negatives.

    python benchmarks/gather_overhead.py --data runs/openmoji [--checkpoint runs/tiny] [--processes 1 2 4 8]

Starts itself under torchrun once per number of processes: data-parallel gloo ranks with the model of examples/tiny.yaml
and `--pairs` real pairs each. Every batch is taken three times: with the gather under a Meter, whose barriers take time
of their own; without the gather (the loss compares this rank's pairs alone); and with it. The learning rate is 0, so
that all see the same weights. Prints Markdown tables.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_llave import checkpoint, config_file, cpu_emulation, loss, parallel, training_state
from megatron_llave.batch import PairBatch
from megatron_llave.config import loss_of_subset
from megatron_llave.data.packing import build_encoder
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.diagnostics import step_metrics
from megatron_llave.errors import exit_with_one_line
from megatron_llave.flat_step import unflatten
from megatron_llave.gradient_cache import Compare, forward_backward
from megatron_llave.loss import LossShare
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import Trainable, build_trainable
from megatron_llave.presets import PRESETS
from megatron_llave.run_log import quiet_dependencies
from megatron_llave.train import contrast

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "tiny.yaml"
OVERRIDES = ["optimizer.learning_rate=0", "loss.mask_same_target=false", "data.hard_negatives=0"]
OVERRIDES += [f"data.subsets.{name}.start_step=0" for name in ("vqa", "grounding")]  # the whole mixture at once
TIMEOUT_SECONDS = 3600
TAIL_CHARACTERS = 4000
PARAMETERS_7B = 7.6e9
NAMES = ("alone", "gathered", "waiting", "moving", "effective_alone", "effective", "hardest_share")
HEADS = [
    *("processes", "global batch", "s/step without gather", "s/step with", "share waiting", "share moving"),
    *("bytes received per rank and step", "negatives", "effective negatives without", "effective negatives with"),
    "hardest share with",
]
NOTES = """
Shares are of the step with barriers: waiting for the slowest rank, and the collectives themselves. Not all waiting is
lost: without the gather the ranks wait at the reduction of the gradients. The hardest share is the part of the
negatives' softmax on the hardest 1 % of them, at least one.

Bytes a rank receives per step, exactly as measured: (N - 1) * (8 b d + 20 b + 16), for N ranks of b pairs,
width d, float32. For each other rank: its b targets, and its part of the gradients of this rank's b targets (4 b d
each); two all-reduces, as rings, for the log-sum-exps of all N b columns (16 b); the cosines of its b positives (4 b);
two row counts (16). loss.mask_same_target adds 16 b for ids, m hard negatives per rank add 8 m d, loss.reward=ema adds
4 b d, and loss.matryoshka_dims takes the whole for every prefix, with its length for d.

LLaVE-7B by this formula, MB (1e6 bytes) per GPU and step, beside the reduction of its gradients: 7.6e9 parameters, all
trained and data parallel, reduce-scatter of float32 gradients and all-gather of bfloat16 weights.
"""


def received_bytes(pairs: int, dim: int, ranks: int) -> int:
    """Bytes a rank receives in the loss's collectives per step; no hard negatives, no masks by ids."""
    return (ranks - 1) * (8 * pairs * dim + 20 * pairs + 16)


class Meter:
    """Times the collectives of the loss and adds up the bytes this rank receives in them."""

    def __init__(self) -> None:
        self.waiting = self.moving = 0.0
        self.received = 0
        self._kinds: set[tuple] = set()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Stand between torch.distributed and loss.py and parallel.py, through which nothing of megatron-core goes."""
        names = "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"
        stand_ins = {name: partial(self._measure, getattr(dist, name)) for name in names}
        stand_in = SimpleNamespace(**stand_ins, ReduceOp=dist.ReduceOp)
        with mock.patch.object(parallel, "dist", stand_in), mock.patch.object(loss, "dist", stand_in):
            yield

    def _measure(self, collective: Callable, *args: object, group: dist.ProcessGroup) -> None:
        # The gathered rows, those that are summed and scattered, or those that are reduced.
        whole = max((x for x in args if isinstance(x, Tensor)), key=Tensor.numel)
        kind = collective, whole.dtype, whole.shape
        started = time.perf_counter()
        if kind not in self._kinds:  # those of one kind follow each other at once: the ranks are together already
            self._kinds.add(kind)
            dist.barrier(group)
        together = time.perf_counter()
        collective(*args, group=group)
        self.waiting += together - started
        self.moving += time.perf_counter() - together
        rounds = 2 if collective is dist.all_reduce else 1  # a ring scatters the sums, then gathers them
        self.received += rounds * whole.nbytes * (group.size() - 1) // group.size()


def run_step(
    trainable: Trainable, batch: PairBatch, compare: Compare, watch: AbstractContextManager = nullcontext()
) -> tuple[float, LossShare]:
    """Seconds of a training step on one micro batch, and what its loss saw; `watch` is on until the update."""
    dist.barrier()
    started = time.perf_counter()
    trainable.zero_gradients()
    with watch:
        [share] = forward_backward(trainable.chunks, [batch], compare, "global_batch")
    trainable.update()
    step_metrics([share], [batch], dist.group.WORLD)
    return time.perf_counter() - started, share


def measure(args: argparse.Namespace) -> None:
    """What torchrun starts: all steps on this rank. The first rank writes the means (of seconds: medians) as JSON."""
    ranks = int(os.environ["WORLD_SIZE"])
    total = ranks * args.pairs
    cfg = config_file.load(CONFIG, [*OVERRIDES, f"data.path={args.data}", f"train.global_batch_size={total}"])
    parallel.start_processes(cfg.parallel.timeout_seconds)
    groups = parallel.init(cfg.parallel, cfg.train.seed)
    encoder = build_encoder(cfg.data, cfg.model)
    stream = build_train_stream(cfg, encoder, groups.dp.rank(), ranks, pad_to_multiple=1)
    chunks = build_model(cfg.model, cfg.parallel, groups, parallel.device(), cfg.train.seed)
    if args.checkpoint:
        training_state.load_weights(checkpoint.find(args.checkpoint), chunks, groups)
    trainable = build_trainable(cfg, chunks, groups)
    expected = received_bytes(args.pairs, cfg.model.language.hidden_size, ranks)
    rows, subsets = [], []
    for step in islice(stream, args.steps + 1):
        [batch] = unflatten(step).batches
        own = loss_of_subset(cfg, batch.subset)
        compare = partial(contrast, config=own, temperature=own.temperature, alpha=own.alpha)
        meter = Meter()
        metered, _ = run_step(trainable, batch, partial(compare, group=groups.dp), meter.watch())
        alone, (_, seen_alone) = run_step(trainable, batch, partial(compare, group=None))
        gathered, (_, seen) = run_step(trainable, batch, partial(compare, group=groups.dp))
        assert meter.received == expected, f"{meter.received} bytes received, but the formula says {expected}"
        similarities = seen_alone.effective_negatives, seen.effective_negatives, seen.hardest_share
        shares = meter.waiting / metered, meter.moving / metered
        rows.append([alone, gathered, *shares, *(float(x.mean()) for x in similarities)])
        subsets.append(batch.subset)
    alone, gathered, *others = zip(*rows[1:])  # the first step is the warm-up
    numbers = [statistics.median(alone), statistics.median(gathered), *map(statistics.fmean, others)]
    means = torch.tensor(numbers, dtype=torch.float64) / ranks
    dist.all_reduce(means)
    result = dict(zip(NAMES, means.tolist())) | {"received": meter.received, "subsets": subsets[1:]}
    if dist.get_rank() == 0:
        args.result.write_text(json.dumps(result))
    parallel.shut_down()


def launch(processes: int, settings: list[str]) -> dict:
    """The result of this number of ranks; ends the benchmark with the end of their output when one of them fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [*torchrun, __file__, *settings, "--result", str(result)]
        # A file, not a pipe: it never fills up, and a rank left behind does not hold it open.
        with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=env) as process:
            try:
                status = f"exit code {process.wait(TIMEOUT_SECONDS)}"
            except subprocess.TimeoutExpired:
                status = f"no end after {TIMEOUT_SECONDS} s"
            finally:
                process.terminate()  # if it still runs; torchrun then ends its ranks
        if status != "exit code 0":
            tail = log.read_text(errors="replace")[-TAIL_CHARACTERS:]
            raise SystemExit(f"{tail}\nerror: {processes} processes: {status}")
        return json.loads(result.read_text())


def print_clusters() -> None:
    """The formula for LLaVE-7B."""
    pairs, dim = (4, 8, 16, 32), PRESETS["7b"]["language"]["hidden_size"]
    print("| GPUs |", " | ".join(f"{b} pairs per GPU" for b in pairs), "| gradient reduction |")
    print("|" + "---:|" * (len(pairs) + 2))
    for ranks in (8, 64, 256, 1024):
        cells = [received_bytes(b, dim, ranks) / 1e6 for b in pairs]
        reduction = PARAMETERS_7B * (4 + 2) * (ranks - 1) / ranks / 1e6
        print(f"| {ranks} |", " | ".join(f"{x:.1f}" for x in cells), f"| {reduction:.0f} |")


def main() -> None:
    """One launch per number of processes; prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that tools/prepare_data.py openmoji made")
    parser.add_argument("--checkpoint", help="a run of examples/tiny.yaml; without it the weights are random")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--pairs", type=int, default=32, help="pairs per rank")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured, after one that is not")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        with exit_with_one_line():
            quiet_dependencies()
            cpu_emulation.enable()
            measure(args)
        return
    settings = ["--data", args.data, "--pairs", str(args.pairs), "--steps", str(args.steps)]
    settings += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    weights = f"weights of {args.checkpoint}" if args.checkpoint else "random weights: effective negatives mean little"
    print(f"{os.cpu_count()} cores for all processes, one thread each, gloo; waiting grows where they share a core")
    print(f"{weights}; {args.pairs} pairs per rank, {args.steps} steps\n")
    print("|", " | ".join(HEADS), "|\n|" + "---:|" * len(HEADS))
    for processes in args.processes:
        result, total = launch(processes, settings), processes * args.pairs
        times, seen = ([f"{result[x]:.3f}" for x in part] for part in (NAMES[:4], NAMES[4:]))
        cells = [processes, total, *times, result["received"], total - 1, *seen]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    print(f"\nSubsets of the steps: {', '.join(result['subsets'])}.")
    print(NOTES)
    print_clusters()


if __name__ == "__main__":
    main()

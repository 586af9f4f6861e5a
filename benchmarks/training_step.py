"""Measure pairs per second and peak memory of a training step, beside the official way on transformers' modules.

    OMP_NUM_THREADS=1 python -m benchmarks.training_step [--layers 1] [--pairs 4 8] [--repeats 3]

The model is a reduced 0.5b in one CPU process: it has the real widths, heads, tiles and lengths, but few layers and a
small vocabulary. Both variants have the same weights and take the same pairs: 13 image with text -> text, 4 text ->
image, 3 image -> image, as in MMEB. A step has five micro batches, either mixed (with exactly these shares) or of one
kind each (3, 1, 1). The vision encoder is frozen. The variants take turns; each time is the median. Their embeddings
and losses are compared first. `FLOPs` is the ratio by formula, official over ours; `reached` is the measured ratio
divided by it. Memory is the growth of the resident set of a new process per variant, from before its model is built to
the peak in its first step. The result is a Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks import released_step
from benchmarks.released_step import MakeSide, Pair, make_side, packed, packed_work, padded, padded_work, total
from megatron_llave.batch import PairBatch
from megatron_llave.config.load import config_from_dict, override_config
from megatron_llave.config.schema import RunConfig
from megatron_llave.data.packing import TileShape
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.models import build_model
from megatron_llave.models.blocks.kernels import row_multiple
from megatron_llave.planning.flops import extra_flops, step_flops
from megatron_llave.train import train_step
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.optimizer import build_trainable

MICRO_BATCHES = 5
MIXED = {"image_text": 13, "text_image": 4, "image_image": 3}
ONE_KIND = ("image_text", "image_text", "image_text", "text_image", "image_image")
VOCABULARY = 4096
VARIANTS = ("ours, micro_batch", "ours, global_batch", "released")
TOLERANCE = 1e-4
"""Largest difference of the embeddings and of the losses."""

Step = Callable[[], None]
PairsOfStep = Sequence[Sequence[Pair]]


def make_step(cfg: RunConfig, is_mixed: bool, seed: int = 0, make: MakeSide = make_side) -> PairsOfStep:
    """The micro batches of a step, the same in every process.

    A mixed step shuffles pairs in the shares of MIXED; otherwise each micro batch has one kind, in the order of
    ONE_KIND. `make` makes a query or a target.
    """
    rng, size, wanted = np.random.default_rng(seed), cfg.train.micro_batch_size, cfg.train.global_batch_size
    if is_mixed:
        kinds = [kind for kind, share in MIXED.items() for _ in range(round(share * wanted / sum(MIXED.values())))]
        kinds = rng.permutation((kinds + ["image_text"] * wanted)[:wanted]).tolist()
    else:
        kinds = [ONE_KIND[index // size % len(ONE_KIND)] for index in range(wanted)]
    pairs = [released_step.make_pair(cfg.model, kind, rng, make) for kind in kinds]
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def build_config(layers: int, pairs: int, overrides: Sequence[str] = (), preset: str = "0.5b") -> RunConfig:
    """The configuration of the reduced model."""
    reduced = [f"model.vision.num_layers={layers}", f"model.language.num_layers={layers}", "train.steps=1000"]
    reduced += [f"model.language.vocab_size={VOCABULARY}", f"train.micro_batch_size={pairs}"]
    reduced += [f"train.global_batch_size={MICRO_BATCHES * pairs}", "model.freeze=[vision]", "model.precision=fp32"]
    reduced += ["optimizer.warmup_steps=1"]  # the learning rate of the first step is 0
    return override_config(config_from_dict({"model": {"preset": preset}}), [*reduced, *overrides])


class Ours:
    """Our model and its training step; `shape` is that of the tiles, by default of LLaVA-OneVision's."""

    def __init__(self, cfg: RunConfig, groups: ProcessGroupCollection, shape: TileShape | None = None) -> None:
        self.cfg, self.groups, self.shape = cfg, groups, shape or released_step.tile_shape(cfg.model)
        self.chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=0)
        self.trainable = build_trainable(cfg, self.chunks, groups)

    def prepare(self, micro_batches: PairsOfStep) -> list[PairBatch]:
        """Pack the micro batches."""
        multiple = row_multiple(self.cfg.model, self.cfg.parallel)
        made = (packed(pairs, self.shape, multiple) for pairs in micro_batches)
        return [batch.to(process_groups.device()) for batch in made]

    def step(self, batches: list[PairBatch], negatives: str = "micro_batch") -> float:
        """Take a training step; returns the loss."""
        result = train_step(self.trainable, batches, replace(self.cfg.loss, negatives=negatives), 0, self.groups)
        return step_metrics(result.shares, batches, self.groups.dp)["loss"]

    def embed(self, batches: list[PairBatch]) -> torch.Tensor:
        """Embeddings of queries and targets: [2 * pairs, h]."""
        with torch.no_grad():
            embeddings = torch.cat([self.chunks[0](batch.sequences) for batch in batches])
        for batch in batches:
            batch.sequences.features = None
        return embeddings


class Released:
    """transformers' model and the official training step."""

    def __init__(self, cfg: RunConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> None:
        self.cfg, self.dtype, optimizer = cfg, dtype, cfg.optimizer
        self.model = self.build(attention)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        betas = (optimizer.beta1, optimizer.beta2)
        settings = {"betas": betas, "eps": optimizer.epsilon, "weight_decay": optimizer.weight_decay}
        self.optimizer = torch.optim.AdamW(trained, lr=optimizer.learning_rate, **settings)

    def build(self, attention: str) -> torch.nn.Module:
        """Make the model with random weights and a frozen vision encoder."""
        return released_step.build_released(self.cfg.model, self.dtype, attention, process_groups.device())

    def prepare(self, micro_batches: PairsOfStep) -> list[tuple[Any, Any]]:
        """Pad the micro batches."""
        return [padded(pairs, self.cfg.model, process_groups.device(), self.dtype) for pairs in micro_batches]

    def embed_sides(self, sides: Any) -> torch.Tensor:
        """Unit vectors [n, h] of padded queries or targets."""
        return released_step.embed(self.model, sides)

    def step(self, batches: list[tuple[Any, Any]]) -> float:
        """Take a training step; returns the loss."""
        loss, clip = self.cfg.loss, self.cfg.optimizer.clip_gradient
        return released_step.take_step(self.embed_sides, self.optimizer, batches, loss.temperature, loss.alpha, clip)

    def embed(self, batches: list[tuple[Any, Any]]) -> torch.Tensor:
        """Embeddings of queries and targets: [2 * pairs, h]."""
        with torch.no_grad():
            return torch.cat([self.embed_sides(sides) for batch in batches for sides in batch])


def check(cfg: RunConfig, ours: Ours, released: Released, micro_batches: PairsOfStep) -> tuple[float, float]:
    """The largest difference of the embeddings, and that of the losses.

    The variants have the same weights afterwards too: our learning rate is 0 at the first step, and the other one is
    set to 0 here.
    """
    released_step.copy_weights(ours.chunks[0], released.model, cfg.model)
    batches, theirs = ours.prepare(micro_batches), released.prepare(micro_batches)
    apart = (ours.embed(batches) - released.embed(theirs)).abs().max().item()
    for group in released.optimizer.param_groups:
        group["lr"] = 0.0
    loss_apart = abs(ours.step(batches) - released.step(theirs))
    for group in released.optimizer.param_groups:
        group["lr"] = cfg.optimizer.learning_rate
    for name, value in (("embeddings", apart), ("losses", loss_apart)):
        assert value < TOLERANCE, f"{name} are {value} apart, more than {TOLERANCE}"
    return apart, loss_apart


def flop_ratios(cfg: RunConfig, micro_batches: PairsOfStep) -> dict[str, float]:
    """FLOPs of each variant divided by those of ours with one pass."""
    work = total([packed_work(pairs) for pairs in micro_batches])
    shown = total([padded_work(pairs) for pairs in micro_batches])
    one_pass = step_flops(cfg.model, work)
    counts = (one_pass, one_pass + extra_flops(cfg.model, work, embed_pass=True), step_flops(cfg.model, shown))
    return {variant: count / one_pass for variant, count in zip(VARIANTS, counts)}


def steps_of(ours: Ours, released: Released, micro_batches: PairsOfStep) -> dict[str, Step]:
    """A step of each variant."""
    return {
        VARIANTS[0]: lambda: ours.step(ours.prepare(micro_batches), "micro_batch"),
        VARIANTS[1]: lambda: ours.step(ours.prepare(micro_batches), "global_batch"),
        VARIANTS[2]: lambda: released.step(released.prepare(micro_batches)),
    }


def time_variants(
    variants: dict[str, Step], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step by a clock. The variants take turns after a warm-up round."""
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(repeats + 1):
        for variant, step in variants.items():
            started = clock()
            step()
            seconds[variant].append(clock() - started)
    return {variant: values[1:] for variant, values in seconds.items()}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(args: argparse.Namespace) -> None:
    """Print the growth of the resident set of one variant, in a new process."""
    cfg = build_config(args.layers, args.pairs[0], args.overrides)
    groups = start(cfg)
    micro_batches = make_step(cfg, args.memory[1] == "mixed")
    print_growth(args.memory[0], micro_batches, lambda: Ours(cfg, groups), lambda: Released(cfg))
    process_groups.destroy_distributed()


def print_growth(
    name: str, micro_batches: PairsOfStep, make_ours: Callable[[], Ours], make_released: Callable[[], Released]
) -> None:
    """Make the variant, take a step, and print by how many bytes the resident set has grown."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    if name == "released":
        variant = make_released()
        variant.step(variant.prepare(micro_batches))
    else:
        variant = make_ours()
        variant.step(variant.prepare(micro_batches), name.removeprefix("ours, "))
    print(json.dumps(resident("VmHWM") - before))


def memory_of(variant: str, batches: str, pairs: int, args: argparse.Namespace, *options: str) -> int:
    """The growth of the resident set of a variant in bytes, measured in another process of the same script."""
    script = f"benchmarks.{Path(sys.argv[0]).stem}"
    command = [sys.executable, "-m", script, "--memory", variant, batches, "--pairs", str(pairs), *options]
    command += ["--layers", str(args.layers), "--overrides", *args.overrides]
    made = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(made.stderr)
    return json.loads(made.stdout.splitlines()[-1])


def start(cfg: RunConfig) -> ProcessGroupCollection:
    """Process groups of this process alone."""
    process_groups.initialize_distributed(600)
    return process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)


def profile(ours: Ours, micro_batches: PairsOfStep) -> None:
    """Print where the time of our step goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ours.step(ours.prepare(micro_batches))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


def run(args: argparse.Namespace) -> None:
    """Print a block of rows per kind of batch and micro-batch size."""
    groups = start(build_config(args.layers, args.pairs[0], args.overrides))
    print(f"{torch.get_num_threads()} thread(s), {args.layers} encoder and decoder layer(s), {args.repeats} repeats\n")
    print_heads()
    for batches in args.batches:
        for pairs in args.pairs:
            cfg = build_config(args.layers, pairs, args.overrides)
            micro_batches = make_step(cfg, batches == "mixed")
            ours, released = Ours(cfg, groups), Released(cfg)
            apart = check(cfg, ours, released, micro_batches)
            note = f"{batches}, {pairs} pairs: embeddings {apart[0]:.1e} apart, losses {apart[1]:.1e}"
            print(note, file=sys.stderr, flush=True)
            if args.profile:
                profile(ours, micro_batches)
                continue
            seconds = time_variants(steps_of(ours, released, micro_batches), args.repeats)
            memory = None if args.no_memory else partial(memory_of, batches=batches, pairs=pairs, args=args)
            print_rows(batches, cfg, flop_ratios(cfg, micro_batches), seconds, memory)
    process_groups.destroy_distributed()


def print_heads() -> None:
    """Print the head of the table."""
    heads = [
        "batches",
        "pairs",
        "variant",
        "s / step",
        "pairs/s",
        "range",
        "released / variant",
        "FLOPs",
        "reached",
        "MB",
    ]
    print("|", " | ".join(heads), "|\n|---|---:|---" + "|---:" * (len(heads) - 3) + "|", flush=True)


def print_rows(
    batches: str,
    cfg: RunConfig,
    flops: dict[str, float],
    seconds: dict[str, list[float]],
    memory: Callable[[str], int] | None,
) -> None:
    """Print one row per variant. `memory`: variant -> bytes; None: it is not measured."""
    medians, pairs = {variant: statistics.median(v) for variant, v in seconds.items()}, cfg.train.global_batch_size
    for variant, taken in medians.items():
        ratio, wanted = medians["released"] / taken, flops["released"] / flops[variant]
        spread = f"{pairs / max(seconds[variant]):.3f} to {pairs / min(seconds[variant]):.3f}"
        cells = [batches, str(cfg.train.micro_batch_size), variant, f"{taken:.2f}", f"{pairs / taken:.3f}", spread]
        cells += [f"{ratio:.2f}", f"{wanted:.2f}", f"{100 * ratio / wanted:.0f} %"]
        size = f"{memory(variant) / 1e6:.0f}" if memory else "-"
        print("|", " | ".join([*cells, size]), "|", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="layers of the vision encoder and of the decoder (1)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8], help="pairs per micro batch (4 and 8)")
    parser.add_argument("--batches", nargs="+", choices=("mixed", "one kind"), default=["mixed", "one kind"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--profile", action="store_true", help="print our operators by their time instead of a table")
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "BATCHES"), help=argparse.SUPPRESS)
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value")
    args = parser.parse_args()
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        if args.memory:
            measure_memory(args)
        else:
            run(args)


if __name__ == "__main__":
    main()

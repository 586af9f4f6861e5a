"""Seconds of a step and bytes of LoRA beside the training of all weights, on the same batches of a run's data.

    OMP_NUM_THREADS=1 python -m benchmarks.lora_step --config examples/tiny_lora.yaml [--steps 40] [KEY=VALUE ...]

Each kind of training has its own model with random weights, all in one process. They take every step in turn, in an
order that is reversed after each step. A ratio compares two steps on one batch, so that other work on the machine slows
both; CPU seconds do not count the time in which the process waits for a core. Bytes are those of the storages of the
gradients and of the optimizer (moments, and weights of its own) after the steps. The result is a Markdown table.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from operator import truediv

from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.memory_plan import optimizer_tensors, storages
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line, require
from megatron_llave.models import build_model
from megatron_llave.train import open_steps, train_step
from megatron_llave.training.logger import quiet_dependencies
from megatron_llave.training.optimizer import Trainable, build_trainable

KINDS = {
    "all weights": ("lora.rank=0",),
    "LoRA of the decoder": ("lora.targets=[language]",),
    "LoRA of all parts": ("lora.targets=[language,projector,vision]",),
}
UNCOUNTED = 3
"""First steps, which make the moments and fill caches."""


@dataclass
class Kind:
    """One kind of training, and the seconds of its steps, of the clock and of the CPU."""

    name: str
    trainable: Trainable
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def sizes(self) -> tuple[int, int, int]:
        """Number of trained values, bytes of gradients, bytes of the optimizer."""
        parameters = [parameter for chunk in self.trainable.chunks for parameter in chunk.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        weights = storages(parameter.data for parameter in parameters)
        kept = {
            place: size for place, size in storages(optimizer_tensors(self.trainable)).items() if place not in weights
        }
        gradients = storages(parameter.main_grad for parameter in trained)
        return sum(parameter.numel() for parameter in trained), sum(gradients.values()), sum(kept.values())


def build(config: str, name: str, overrides: list[str], groups: ProcessGroupCollection) -> Kind:
    """A model with random weights and its optimizer."""
    cfg = load_config(config, [*overrides, *KINDS[name]])
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed=0, lora=cfg.lora)
    return Kind(name, build_trainable(cfg, chunks, groups))


def measure(cfg: RunConfig, kinds: list[Kind], steps: int, groups: ProcessGroupCollection) -> None:
    """Let the kinds take the same steps in turn."""
    stream = open_steps(cfg, groups, None)
    for step in range(UNCOUNTED + steps):
        batches = next(stream).batches
        loss = loss_of_subset(cfg, batches[0].subset)
        for kind in kinds if step % 2 else kinds[::-1]:
            started, cpu_started = time.perf_counter(), time.thread_time()
            train_step(kind.trainable, batches, loss, step, groups)
            if step >= UNCOUNTED:
                kind.seconds.append(time.perf_counter() - started)
                kind.cpu_seconds.append(time.thread_time() - cpu_started)
            for batch in batches:
                batch.sequences.features = None  # those of this kind's vision encoder


def print_table(kinds: list[Kind]) -> None:
    """Print a row per kind; ratios are to the first one, and are medians over the steps with quartiles."""
    print("| | trained values | gradients, bytes | optimizer, bytes | seconds | ratio | CPU seconds | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind in kinds:
        cells = [kind.name, *(f"{size:,}" for size in kind.sizes())]
        for own, first in ((kind.seconds, kinds[0].seconds), (kind.cpu_seconds, kinds[0].cpu_seconds)):
            low, middle, high = statistics.quantiles(map(truediv, own, first), n=4)
            cells += [f"{statistics.median(own):.3f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        print(f"| {' | '.join(cells)} |")


def run(args: argparse.Namespace) -> list[Kind]:
    """Build the kinds, measure them and print the table; returns them."""
    cfg = load_config(args.config, args.overrides)
    require(cfg.lora.rank > 0 and args.steps > 1, "lora.rank must be above 0, and --steps at least 2")
    is_counted = cfg.train.tokens_per_micro_batch is None
    require(is_counted, "train.tokens_per_micro_batch must be null: several kinds take the same micro batches")
    process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    kinds = [build(args.config, name, args.overrides, groups) for name in KINDS]
    measure(cfg, kinds, args.steps, groups)
    print_table(kinds)
    process_groups.destroy_distributed()
    return kinds


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration with lora.rank above 0")
    parser.add_argument("--steps", type=int, default=40, help="steps that count")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        run(parser.parse_intermixed_args())


if __name__ == "__main__":
    main()

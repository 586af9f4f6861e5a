"""Under torchrun: a step by a token budget has the loss and the gradients of the same step in counted micro batches.

check_micro_batches.py DATA tensor,pipeline,virtual pipeline,context,budget[,vision][,ema][,overlap]...
"""

import sys
from collections.abc import Iterator

import torch.distributed as dist
from full_parameters import full_gradients, let_go

from megatron_llave.batch import StepBatches
from megatron_llave.config.load import config_from_dict
from megatron_llave.config.schema import RunConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.loss import build_loss
from megatron_llave.models import build_model
from megatron_llave.models.blocks.initialization import initialize_parameters
from megatron_llave.train import open_steps
from megatron_llave.training.broadcast import exchange_row_counts
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.metrics import step_metrics
from megatron_llave.training.micro_batches import kept_of
from megatron_llave.training.optimizer import Trainable, build_trainable

BATCH, STEPS = 24, 2


def main() -> None:
    data, *layouts = sys.argv[1:]
    cpu_emulation.enable()
    process_groups.initialize_distributed(60)
    for layout in layouts:
        sizes, parts = layout.split(",")[:5], layout.split(",")[5:]
        names = ("tensor", "pipeline", "virtual_pipeline", "context")
        parallel = dict(zip(names, map(int, sizes))) | {"overlap": "overlap" in parts}
        values = {
            "model": {"preset": "tiny", "language": {"num_layers": 4}, "freeze": ["vision"] * ("vision" in parts)},
            "data": {"path": data, "prompt": "plain", "workers": 0, "subsets": {"image_to_name": {}, "vqa": {}}},
            "loss": {"reward": "ema" if "ema" in parts else "self", "mask_same_target": True},
            "parallel": parallel | {"sequence": int(sizes[0]) > 1},
        }
        check(layout, values, int(sizes[4]))
        process_groups.destroy_model_parallel()
    process_groups.destroy_distributed()


def check(layout: str, values: dict, budget: int) -> None:
    sizes = ({"micro_batch_size": 3}, {"tokens_per_micro_batch": budget})
    configs = [config_from_dict(values | {"train": {"global_batch_size": BATCH} | size}) for size in sizes]
    groups = process_groups.initialize_model_parallel(configs[0].parallel)
    device = process_groups.device()
    chunks = build_model(configs[0].model, configs[0].parallel, groups, device, seed=0)
    trainable = build_trainable(configs[0], chunks, groups)
    counted, streamed = (open_steps(cfg, groups, None) for cfg in configs)
    numbers, worst = [], 0.0
    for _ in range(STEPS):
        expected, ours = (run(configs[0], trainable, stream, groups) for stream in (counted, streamed))
        assert abs(ours[0] - expected[0]) <= 1e-6 * abs(expected[0]), f"{layout}: {ours[0]} is not {expected[0]}"
        for name, gradient in expected[1].items():
            error = float((ours[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
            assert error <= 1e-5, f"{layout}: gradient of {name} is off by {error:.1e}"
            worst = max(worst, error)
        assert ours[2] == expected[2], f"{layout}: {ours[2]} are not the counts {expected[2]}"
        numbers.append(ours[3])
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, numbers)
    if dist.get_rank() == 0:
        print(f"{layout}: gradients off by {worst:.1e}, micro batches {sorted(set(map(tuple, of_ranks)))}")
    let_go(trainable)


def run(cfg: RunConfig, trainable: Trainable, stream: Iterator[StepBatches], groups) -> tuple[float, dict, dict, int]:
    """Loss, gradients, counts and number of micro batches of the next step, without an update."""
    batches = next(stream).batches
    average = None
    if cfg.loss.reward == "ema":
        modules = [chunk.module for chunk in trainable.chunks]
        initialize_parameters(modules, groups.tp, 1)
        average = ExponentialMovingAverage(modules, decay=0.9).applied
        initialize_parameters(modules, groups.tp, 0)
    exchange_row_counts(kept_of(batches), groups.dp)
    trainable.zero_gradients()
    shares = forward_backward(trainable.chunks, batches, build_loss(cfg.loss, groups.dp), cfg.loss, average)
    metrics = step_metrics(shares, kept_of(batches), groups.dp)
    names = ("tokens", "tiles", "squared_lengths", "pairs", "hard_negatives", "skipped", "cut")
    return metrics["loss"], full_gradients(trainable, groups), {name: metrics[name] for name in names}, len(batches)


if __name__ == "__main__":
    main()

"""Training, the file to read first: `train` builds the parts in order and loops over `train_step`.

    torchrun --nproc-per-node 2 -m megatron_llave.train --config examples/tiny.yaml loss.alpha=9
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module

from megatron_llave import checkpoint, config, cpu_emulation, parallel
from megatron_llave.batch import PairBatch
from megatron_llave.config import LossConfig, RunConfig
from megatron_llave.data.packing import build_encoder
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.errors import exit_with_one_line
from megatron_llave.loss import alpha_at, hardness_weighted_contrastive_loss, temperature_at
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import Trainable, build_trainable, learning_rate
from megatron_llave.run_log import RunLog, quiet_dependencies


def main(argv: list[str] | None = None) -> None:
    """Entry point: `--config FILE.yaml section.key=value ...`."""
    parser = argparse.ArgumentParser(prog="megatron_llave.train", description="Train a LLaVE embedder.")
    parser.add_argument("--config", required=True, help="YAML file with the run's configuration")
    parser.add_argument("overrides", nargs="*", help="section.key=value, winning over the file")
    args = parser.parse_args(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        train(config.load(args.config, args.overrides))


def train(cfg: RunConfig) -> Path:
    """Train as configured, on the processes torchrun started; returns the last checkpoint's folder.

    Raises:
        UserError: configuration, layout or data cannot work; the message names the culprit.
    """
    world_size = parallel.start_processes(cfg.parallel.timeout_seconds)
    parallel.validate_batch(cfg, parallel.validate_layout(cfg.model, cfg.parallel, world_size))
    groups = parallel.init(cfg.parallel, cfg.train.seed)
    stream = build_train_stream(
        cfg,
        build_encoder(cfg.data, cfg.model),
        rank=groups.dp.rank(),
        world=groups.dp.size(),
        pad_to_multiple=cfg.parallel.tensor if cfg.parallel.sequence else 1,
    )
    chunks = build_model(cfg.model, cfg.parallel, groups, parallel.device(), cfg.train.seed)
    trainable = build_trainable(cfg, chunks, groups)
    log = start_run_log(cfg, groups)
    for step in range(cfg.train.steps):
        started = time.perf_counter()
        rate = learning_rate(trainable)
        batches = next(stream)
        record = train_step(trainable, batches, cfg.loss, step, groups)
        record |= {"step": step + 1, "learning_rate": rate, "seconds": time.perf_counter() - started}
        log.step(record)
        is_last = step + 1 == cfg.train.steps
        if is_last or (cfg.checkpoint.interval and (step + 1) % cfg.checkpoint.interval == 0):
            saved = checkpoint.save(cfg, step + 1, chunks, trainable.optimizer, trainable.schedule, groups)
    log.close()
    parallel.shut_down()
    return saved


def start_run_log(cfg: RunConfig, groups: ProcessGroupCollection) -> RunLog:
    """Write the merged configuration into the run's folder and open its log."""
    output = Path(cfg.train.output)
    if dist.get_rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        config.save(cfg, output / "config.yaml")
    dist.barrier()
    return RunLog(output, cfg.log.interval, cfg.train.steps, enabled=parallel.is_reporting_rank(groups))


def train_step(
    trainable: Trainable, batches: list[PairBatch], loss_cfg: LossConfig, step: int, groups: ProcessGroupCollection
) -> dict[str, float | str]:
    """Embed, compare, weight by hardness, update: one step over this rank's micro batches.

    Returns:
        The step's record; the loss and the similarities are there on the last pipeline stage only.
    """
    temperature, alpha = temperature_at(loss_cfg, step), alpha_at(loss_cfg, step)
    trainable.zero_gradients()
    outputs = forward_backward(trainable, batches, temperature, alpha, groups.dp)
    gradient_norm = trainable.update()
    record = {"subset": batches[0].subset, "temperature": temperature, "alpha": alpha, "gradient_norm": gradient_norm}
    return record | reduce_metrics(outputs, batches, groups.dp)


def forward_backward(
    trainable: Trainable, batches: list[PairBatch], temperature: float, alpha: float, group: dist.ProcessGroup
) -> list[dict[str, Tensor]]:
    """Leave the gradient of the mean loss over the micro batches in the chunks' gradient buffers.

    The negatives of a micro batch are those of the same micro batch on all ranks of `group`.

    Returns:
        Per micro batch the sums that `contrastive_step_loss` reports, on the last pipeline stage; elsewhere nothing.
    """
    compare = partial(contrastive_step_loss, temperature=temperature, alpha=alpha, group=group)
    num_chunks = len(trainable.chunks)
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, compare=compare),
        data_iterator=[iter(batches) for _ in range(num_chunks)] if num_chunks > 1 else iter(batches),
        model=trainable.chunks,
        num_microbatches=len(batches),
        seq_length=1,  # unused: every micro batch sends its own shape along
        micro_batch_size=1,
        forward_only=False,
    )


def forward_step(batches: Iterator[PairBatch], model: Module, compare: partial) -> tuple[Tensor, partial]:
    """One micro batch through this stage, as megatron-core's schedules call it."""
    batch = next(batches).to(parallel.device())
    return model(batch.sequences), partial(compare, num_pairs=batch.num_pairs)


def contrastive_step_loss(
    embeddings: Tensor, num_pairs: int, temperature: float, alpha: float, group: dist.ProcessGroup
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro batch on the last stage: embeddings [2 * b, d], queries first.

    The schedule divides by the number of micro batches and the data-parallel wrapper averages over ranks, so the share
    that the loss function returns needs no factor.
    """
    query, target = embeddings.split(num_pairs)
    loss, seen = hardness_weighted_contrastive_loss(query, target, temperature, alpha, group)
    # A copy, because the schedule divides the loss in place.
    sums = {"loss": loss.detach().clone(), "positive": seen.positive.sum(), "hardest": seen.hardest_negative.sum()}
    return loss, sums


def reduce_metrics(
    outputs: list[dict[str, Tensor]], batches: list[PairBatch], group: dist.ProcessGroup
) -> dict[str, float]:
    """Means over the step's pairs and counts over all data-parallel ranks."""
    names = ("loss", "positive", "hardest")
    sums = [sum(float(output[name]) for output in outputs) for name in names]  # zeros before the last stage
    tokens = sum(int(batch.sequences.cu_seqlens[batch.sequences.num_sequences]) for batch in batches)
    counts = [sum(batch.num_pairs for batch in batches), tokens, sum(batch.num_skipped for batch in batches)]
    totals = torch.tensor(sums + counts, dtype=torch.float64, device=parallel.device())
    dist.all_reduce(totals, group=group)
    loss, positive, hardest, pairs, tokens, skipped = totals.tolist()
    return {
        "loss": loss / (len(batches) * group.size()),
        "positive_similarity": positive / max(1, pairs),
        "hardest_negative_similarity": hardest / max(1, pairs),
        "pairs": int(pairs),
        "tokens": int(tokens),
        "skipped": int(skipped),
    }


if __name__ == "__main__":
    main()

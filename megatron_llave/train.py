"""Training, the file to read first: `train` builds the parts in order and loops over `train_step`.

    torchrun --nproc-per-node 2 -m megatron_llave.train --config examples/tiny.yaml loss.alpha=9
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave import checkpoint, config_file, cpu_emulation, parallel
from megatron_llave.batch import PairBatch
from megatron_llave.config import LossConfig, RunConfig
from megatron_llave.data.packing import build_encoder
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.errors import ConfigError, exit_with_one_line
from megatron_llave.gradient_cache import Seen, forward_backward
from megatron_llave.loss import (
    NegativeRules,
    SimilarityStatistics,
    alpha_at,
    hardness_weighted_contrastive_loss,
    temperature_at,
)
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import Trainable, build_trainable, learning_rate
from megatron_llave.run_log import RunLog, quiet_dependencies

PER_QUERY = {
    "positive": "positive_similarity",
    "hardest_negative": "hardest_negative_similarity",
    "effective_negatives": "effective_negatives",
    "hardest_share": "hardest_share",
}
"""What the loss saw of each query -> under which name its mean stands in the step's record."""


def main(argv: list[str] | None = None) -> None:
    """Entry point: `--config FILE.yaml section.key=value ...`."""
    parser = argparse.ArgumentParser(prog="megatron_llave.train", description="Train a LLaVE embedder.")
    parser.add_argument("--config", required=True, help="YAML file with the run's configuration")
    parser.add_argument("overrides", nargs="*", help="section.key=value, winning over the file")
    args = parser.parse_args(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        train(config_file.load(args.config, args.overrides))


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
        try:
            output.mkdir(parents=True, exist_ok=True)
            config_file.save(cfg, output / "config.yaml")
        except OSError as error:
            raise ConfigError(f"train.output={output} cannot be written: {error.strerror}") from error
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
    compare = partial(contrast, config=loss_cfg, temperature=temperature, alpha=alpha, group=groups.dp)
    batches = [batch.to(parallel.device()) for batch in batches]
    trainable.zero_gradients()
    seen = forward_backward(trainable.chunks, batches, compare, loss_cfg.negatives)
    gradient_norm = trainable.update()
    record = {"subset": batches[0].subset, "temperature": temperature, "alpha": alpha, "gradient_norm": gradient_norm}
    return record | reduce_metrics(seen, batches, groups.dp)


def contrast(
    query: Tensor,
    target: Tensor,
    query_ids: Tensor,
    target_ids: Tensor,
    config: LossConfig,
    temperature: float,
    alpha: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, SimilarityStatistics]:
    """The configured loss over [b, d] local queries and targets and those of the other ranks of `group`."""
    rules = NegativeRules(config.mask_same_target, config.mask_margin, directions=config.directions)
    return hardness_weighted_contrastive_loss(
        query, target, temperature, alpha, group, query_ids=query_ids, target_ids=target_ids, rules=rules
    )


def reduce_metrics(seen: list[Seen], batches: list[PairBatch], group: dist.ProcessGroup) -> dict[str, float]:
    """Means over the step's pairs and counts over all data-parallel ranks; nothing is seen before the last stage."""
    losses = torch.stack([loss for loss, _ in seen]).mean() if seen else torch.zeros(())
    sums = [sum(float(getattr(x, name).sum()) for _, x in seen) for name in PER_QUERY]
    counts = [sum(len(getattr(x, name)) for _, x in seen) for name in PER_QUERY]
    tokens = sum(int(batch.sequences.cu_seqlens[batch.sequences.num_sequences]) for batch in batches)
    pairs = [sum(batch.num_pairs for batch in batches), tokens, sum(batch.num_skipped for batch in batches)]
    totals = torch.tensor([float(losses), *pairs, *sums, *counts], dtype=torch.float64, device=parallel.device())
    dist.all_reduce(totals, group=group)
    loss, *totals = totals.tolist()
    pairs, sums, counts = totals[:3], totals[3 : 3 + len(PER_QUERY)], totals[3 + len(PER_QUERY) :]
    means = {record: total / max(1, count) for record, total, count in zip(PER_QUERY.values(), sums, counts)}
    return {"loss": loss / group.size(), **means, **dict(zip(("pairs", "tokens", "skipped"), map(int, pairs)))}


if __name__ == "__main__":
    main()

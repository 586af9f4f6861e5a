"""Training, the file to read first: `train` builds the parts in order and loops over `train_step`.

    torchrun --nproc-per-node 2 -m megatron_llave.train --config examples/tiny.yaml loss.alpha=9
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave import checkpoint, config_file, cpu_emulation, parallel
from megatron_llave.batch import PairBatch, PairEmbeddings
from megatron_llave.config import LossConfig, RunConfig, loss_of_subset, require
from megatron_llave.config_checks import validate
from megatron_llave.conversion import start_assets
from megatron_llave.data.packing import build_encoder, find_tokenizer
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.diagnostics import histograms, step_metrics
from megatron_llave.errors import ConfigError, exit_with_one_line
from megatron_llave.flat_step import FlatStep
from megatron_llave.gradient_cache import forward_backward
from megatron_llave.loss import (
    LossShare,
    NegativeRules,
    alpha_at,
    hardness_weighted_contrastive_loss,
    matryoshka_loss,
    temperature_at,
)
from megatron_llave.model.embedder import build_model
from megatron_llave.optimizer import Trainable, build_trainable, learning_rate
from megatron_llave.pretrained import Pretrained, find_pretrained
from megatron_llave.replica import is_reader, share_steps
from megatron_llave.run_log import RunLog, quiet_dependencies
from megatron_llave.weight_average import WeightAverage


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
    require(cfg.train.steps >= 1, f"train.steps={cfg.train.steps} must be at least 1")
    pretrained = find_pretrained(cfg.checkpoint.init) if cfg.checkpoint.init else None
    if pretrained is not None:
        cfg = starting_from(pretrained, cfg)
    world_size = parallel.start_processes(cfg.parallel.timeout_seconds)
    parallel.validate_batch(cfg, parallel.validate_layout(cfg.model, cfg.parallel, world_size))
    groups = parallel.init(cfg.parallel, cfg.train.seed)
    steps = share_steps(open_data(cfg, groups), groups.mp, parallel.device())
    seed = cfg.train.seed if pretrained is None else None
    chunks = build_model(cfg.model, cfg.parallel, groups, parallel.device(), seed)
    if pretrained is not None:
        pretrained.load(chunks, groups)
    trainable = build_trainable(cfg, chunks, groups)
    average = WeightAverage(chunks, cfg.loss.ema_decay) if cfg.loss.reward == "ema" else None
    averages = None if average is None else average.tensors()
    log = start_run(cfg, groups, pretrained)
    for step in range(cfg.train.steps):
        started = time.perf_counter()
        rate = learning_rate(trainable)
        data = next(steps)
        waited = time.perf_counter() - started
        batches = data.batches
        loss_cfg = loss_of_subset(cfg, batches[0].subset)
        record, shares = train_step(trainable, batches, loss_cfg, step, groups, average)
        if cfg.log.histogram_interval and (step + 1) % cfg.log.histogram_interval == 0:
            record |= histograms(shares, groups.dp, parallel.device())
        seconds = time.perf_counter() - started
        record |= {"step": step + 1, "learning_rate": rate, "seconds": seconds, "data_seconds": waited}
        log.step(record)
        is_last = step + 1 == cfg.train.steps
        if is_last or (cfg.checkpoint.interval and (step + 1) % cfg.checkpoint.interval == 0):
            saved = checkpoint.save(
                cfg, step + 1, chunks, trainable.optimizer, trainable.schedule, groups, data.position, averages
            )
    log.close()
    parallel.shut_down()
    return saved


def starting_from(pretrained: Pretrained, cfg: RunConfig) -> RunConfig:
    """`cfg` with the vocabulary and, unless it names one, the tokenizer of the weights it starts from.

    Raises:
        ConfigError: cfg.model is another model.
    """
    tokenizer = cfg.data.tokenizer or pretrained.find_tokenizer()
    cfg = replace(cfg, model=pretrained.adopt(cfg.model), data=replace(cfg.data, tokenizer=tokenizer))
    validate(cfg)
    return cfg


def open_data(cfg: RunConfig, groups: ProcessGroupCollection) -> Iterator[FlatStep] | None:
    """The training stream, on the one rank of each replica that reads it.

    Raises:
        UserError: data, tokenizer or mixture cannot work.
    """
    if not is_reader(groups.mp):
        return None
    pad_to_multiple = cfg.parallel.tensor if cfg.parallel.sequence else 1
    encoder = build_encoder(cfg.data, cfg.model)
    return build_train_stream(cfg, encoder, groups.dp.rank(), groups.dp.size(), pad_to_multiple)


def start_run(cfg: RunConfig, groups: ProcessGroupCollection, pretrained: Pretrained | None) -> RunLog:
    """Write the merged configuration and what checkpoints carry along into the run's folder, and open its log."""
    output = Path(cfg.train.output)
    if dist.get_rank() == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
            config_file.save(cfg, output / "config.yaml")
            start_assets(output, pretrained, find_tokenizer(cfg.data))
        except OSError as error:
            raise ConfigError(f"train.output={output} cannot be written: {error.strerror}") from error
    dist.barrier()
    return RunLog(output, cfg.log.interval, cfg.train.steps, enabled=parallel.is_reporting_rank(groups))


def train_step(
    trainable: Trainable,
    batches: list[PairBatch],
    loss_cfg: LossConfig,
    step: int,
    groups: ProcessGroupCollection,
    average: WeightAverage | None = None,
) -> tuple[dict[str, float | str], list[LossShare]]:
    """Embed, compare, weight by hardness, update: one step over this rank's micro batches, which are on its device.

    Returns:
        The step's record, and what the loss saw; both have the loss and the similarities on the last pipeline stage.
    """
    temperature, alpha = temperature_at(loss_cfg, step), alpha_at(loss_cfg, step)
    compare = partial(contrast, config=loss_cfg, temperature=temperature, alpha=alpha, group=groups.dp)
    trainable.zero_gradients()
    reward_model = None if average is None else average.applied
    shares = forward_backward(trainable.chunks, batches, compare, loss_cfg.negatives, reward_model)
    gradient_norm = trainable.update()
    if average is not None:
        average.update()
    record = {"subset": batches[0].subset, "temperature": temperature, "alpha": alpha, "gradient_norm": gradient_norm}
    return record | step_metrics(shares, batches, groups.dp), shares


def contrast(
    embeddings: PairEmbeddings,
    reward: PairEmbeddings | None,
    query_ids: Tensor,
    target_ids: Tensor,
    hard_negative_ids: Tensor,
    config: LossConfig,
    temperature: float,
    alpha: float,
    group: dist.ProcessGroup,
) -> LossShare:
    """The configured loss over the local embeddings and those of the other ranks of `group`."""
    compare = hardness_weighted_contrastive_loss
    if config.matryoshka_dims:
        compare = partial(matryoshka_loss, dims=config.matryoshka_dims)
    return compare(
        embeddings.query,
        embeddings.target,
        temperature=temperature,
        alpha=alpha,
        group=group,
        hard_negatives=embeddings.hard_negatives,
        query_ids=query_ids,
        target_ids=target_ids,
        hard_negative_ids=hard_negative_ids,
        reward=reward,
        rules=NegativeRules(config.mask_same_target, config.mask_margin, config.hardness, config.directions),
    )


if __name__ == "__main__":
    main()

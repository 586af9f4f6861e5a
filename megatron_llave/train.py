"""Training, the file to read first: `train` builds the parts in order and loops over `train_step`.

torchrun --nproc-per-node 2 -m megatron_llave.train --config examples/tiny.yaml loss.alpha=9
"""

import argparse
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.batch import PairBatch, PairEmbeddings, StepBatches
from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.checkpoint.resume import find_checkpoint, make_folder, resume, starting_from, with_steps
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.load import load_config
from megatron_llave.config.schema import LossConfig, RunConfig, loss_of_subset, row_multiple
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.step_buffer import StepBuffer
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import CheckpointError, exit_with_one_line
from megatron_llave.evaluation.evaluate import build_evaluation
from megatron_llave.loss.contrastive import LossShare, NegativeRules, hardness_weighted_contrastive_loss
from megatron_llave.loss.matryoshka import matryoshka_loss
from megatron_llave.loss.schedules import alpha_at, temperature_at
from megatron_llave.models import build_model, build_processor
from megatron_llave.models.blocks.kernels import describe_kernels
from megatron_llave.planning.flops import Work, achieved
from megatron_llave.training.broadcast import broadcast_steps, is_reader
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.fault_tolerance import (
    EXIT_STOPPED,
    FiniteSteps,
    StopRequests,
    Watchdog,
    explain_lost_ranks,
    write_state,
)
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.logger import RunLog, quiet_dependencies
from megatron_llave.training.metrics import histograms, peak_memory_gb, step_metrics
from megatron_llave.training.optimizer import Trainable, build_trainable, learning_rate
from megatron_llave.training.trackers import open_sinks

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Entry point: `--config FILE.yaml [--resume auto] section.key=value ...`."""
    parser = argparse.ArgumentParser(prog="megatron_llave.train", description="Train a LLaVE embedder.")
    parser.add_argument("--config", required=True, help="YAML file with the run's configuration")
    parser.add_argument("--resume", metavar="auto|DIR", help="go on with a run: checkpoint.resume")
    parser.add_argument("overrides", nargs="*", help="section.key=value, winning over the file")
    args = parser.parse_intermixed_args(argv)
    resumed = [f"checkpoint.resume={args.resume}"] if args.resume else []
    with exit_with_one_line(), explain_lost_ranks():
        quiet_dependencies()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("megatron_llave").setLevel(logging.INFO)
        cpu_emulation.enable()
        reason = train(load_config(args.config, [*args.overrides, *resumed]))
    if reason and "TORCHELASTIC_RUN_ID" not in os.environ:
        # Under torchrun 0, for it takes every other status for a failure and may start the run again.
        raise SystemExit(EXIT_STOPPED)


def train(cfg: RunConfig) -> str:
    """Train as configured, on the processes torchrun started.

    Returns:
        Why the run was stopped, and saved, before its last step; "" if it was not.

    Raises:
        UserError: configuration, layout or data cannot work; the message names the culprit.
    """
    pretrained = find_pretrained(cfg.checkpoint.init) if cfg.checkpoint.init else None
    if pretrained is not None:
        cfg = starting_from(pretrained, cfg)
    world_size = process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
    validate_batch(cfg, validate_layout(cfg.model, cfg.parallel, world_size))
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    cfg, resumed = with_steps(cfg), find_checkpoint(cfg)
    watchdog = Watchdog(cfg.parallel.timeout_seconds)
    watchdog.progress("opening the data")
    position = folders.read_position(resumed) if resumed else None
    steps = broadcast_steps(open_data(cfg, groups, position), groups.mp, process_groups.device())
    is_new = pretrained is None and resumed is None
    watchdog.progress("building the model")
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), cfg.train.seed if is_new else None)
    if pretrained is not None and resumed is None:
        watchdog.progress(f"loading {cfg.checkpoint.init}")
        pretrained.load(chunks, groups)
    watchdog.progress("building the optimizer")
    average = ExponentialMovingAverage(chunks, cfg.loss.ema_decay) if cfg.loss.reward == "ema" else None
    state = TrainingState(chunks, build_trainable(cfg, chunks, groups), average, groups)
    watchdog.progress(f"loading {resumed}" if resumed else "making the run's folder")
    done = resume(state, resumed, cfg) if resumed else 0
    output = make_folder(cfg, pretrained)
    is_reporting = process_groups.is_reporting_rank(groups)
    if is_reporting:
        logger.info("%s", describe_kernels(cfg.model, state.trainable.describe()))
    sinks = open_sinks(cfg.log, output, done + 1, asdict(cfg)) if is_reporting else []
    log = RunLog(output, cfg.log.interval, cfg.train.steps, is_reporting, sinks)
    reason = run_steps(cfg, state, steps, done, log, watchdog)
    log.close()
    watchdog.close()
    process_groups.destroy_distributed()
    return reason


def run_steps(
    cfg: RunConfig, state: TrainingState, steps: Iterator[StepBatches], done: int, log: RunLog, watchdog: Watchdog
) -> str:
    """The training loop: steps `done` + 1 to train.steps, saving now and then, until the end or a request to stop."""
    groups, last = state.groups, cfg.train.steps
    writer = CheckpointWriter(cfg, groups, watchdog.progress)
    requests = StopRequests(cfg.train.output, cfg.train.time_limit_minutes)
    finite = FiniteSteps(cfg.train.max_bad_steps, groups)
    evaluation = build_evaluation(cfg, state.chunks, groups, watchdog.progress) if cfg.evaluate.interval else None
    report_state(cfg, "running" if done < last else "finished", done)
    reason = ""
    for step in range(done, last):
        watchdog.progress(f"waiting for the data of step {step + 1}")
        started = time.perf_counter()
        rate = learning_rate(state.trainable)
        data = next(steps)
        waited = time.perf_counter() - started
        watchdog.progress(f"computing step {step + 1}")
        loss_cfg = loss_of_subset(cfg, data.batches[0].subset)
        record, shares = train_step(state.trainable, data.batches, loss_cfg, step, groups, state.average, finite)
        if cfg.log.histogram_interval and (step + 1) % cfg.log.histogram_interval == 0:
            record |= histograms(shares, groups.dp, process_groups.device())
        seconds = time.perf_counter() - started
        watchdog.progress(f"ending step {step + 1}")
        reason = requests.reason()
        is_last = bool(reason) or step + 1 == last
        if is_last or (cfg.checkpoint.interval and (step + 1) % cfg.checkpoint.interval == 0):
            writer.save(step + 1, state.to_save(step + 1), data.position)
        writer.poll(wait=is_last)
        if is_last and writer.last != folders.step_folder(cfg.train.output, step + 1):
            report_state(cfg, "failed", step + 1, reason)
            raise CheckpointError(f"the run ends after step {step + 1}, which is not saved; the log says why")
        record |= {"step": step + 1, "learning_rate": rate, "seconds": seconds, "data_seconds": waited}
        work = Work(record["tokens"], record["squared_lengths"], record["tiles"])
        record |= achieved(cfg.model, work, seconds, dist.get_world_size(), cfg.log.peak_tflops)
        record["memory_gb"] = peak_memory_gb()
        log.step(record | {"save_seconds": time.perf_counter() - started - seconds, "bad_steps": finite.num_bad})
        if evaluation is not None and ((step + 1) % cfg.evaluate.interval == 0 or step + 1 == last):
            started = time.perf_counter()
            log.evaluation(step + 1, evaluation(), time.perf_counter() - started)
        if is_last:
            report_state(cfg, "stopped" if step + 1 < last else "finished", step + 1, reason)
            break
    requests.close()
    return reason if done < last and step + 1 < last else ""


def report_state(cfg: RunConfig, state: str, step: int, reason: str = "") -> None:
    """Tell the scripts that have started the run, and whoever reads its output."""
    if dist.get_rank() == 0:
        write_state(cfg.train.output, state, step, reason)
        if state == "stopped":
            logger.warning("stopped after step %d and saved: %s", step, reason)


def open_data(cfg: RunConfig, groups: ProcessGroupCollection, position: dict | None) -> Iterator[StepBuffer] | None:
    """The training stream from `position` on, on the one rank of each replica that reads it.

    Raises:
        UserError: data, tokenizer or mixture cannot work, or are others than at `position`.
    """
    if not is_reader(groups.mp):
        return None
    encoder = build_processor(cfg.data, cfg.model)
    return build_train_stream(cfg, encoder, groups.dp.rank(), groups.dp.size(), row_multiple(cfg), position)


def train_step(
    trainable: Trainable,
    batches: list[PairBatch],
    loss_cfg: LossConfig,
    step: int,
    groups: ProcessGroupCollection,
    average: ExponentialMovingAverage | None = None,
    finite: FiniteSteps | None = None,
) -> tuple[dict[str, float | str], list[LossShare]]:
    """Embed, compare, weight by hardness, update: one step over this rank's micro batches, which are on its device.

    A step whose loss or gradient is not finite updates nothing, where `finite` looks after it.

    Returns:
        The step's record, and what the loss saw; both have the loss and the similarities on the last pipeline stage.
    """
    temperature, alpha = temperature_at(loss_cfg, step), alpha_at(loss_cfg, step)
    others = None if loss_cfg.negatives == "own_micro_batch" else groups.dp
    compare = partial(contrast, config=loss_cfg, temperature=temperature, alpha=alpha, group=others)
    trainable.zero_gradients()
    reward_model = None if average is None else average.applied
    shares = forward_backward(trainable.chunks, batches, compare, loss_cfg.negatives, reward_model)
    gradient_norm = trainable.gradient_norm()
    is_bad = finite is not None and not finite.check(gradient_norm, shares, batches, step)
    trainable.update(is_skipped=is_bad)
    if average is not None and not is_bad:
        trainable.wait_for_weights()
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
    group: dist.ProcessGroup | None,
) -> LossShare:
    """The configured loss over the local embeddings and those of the other ranks of `group`, if any."""
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

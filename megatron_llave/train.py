"""Training, the file to read first: `train` builds the parts in order and loops over `train_step`.

torchrun --nproc-per-node 2 -m megatron_llave.train --config examples/tiny.yaml loss.alpha=9
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llave.batch import PairBatch, Side, StepBatches
from megatron_llave.checkpoint import folders
from megatron_llave.checkpoint.async_writer import CheckpointWriter
from megatron_llave.checkpoint.pretrained import Pretrained, find_pretrained, of_first_rank
from megatron_llave.checkpoint.resume import (
    base_of,
    find_checkpoint,
    make_folder,
    needs_weights,
    resume,
    starting_from,
    with_former_init,
    with_steps,
)
from megatron_llave.checkpoint.state import TrainingState
from megatron_llave.config.load import load_config
from megatron_llave.config.loss import LossConfig
from megatron_llave.config.schema import RunConfig, loss_of_subset
from megatron_llave.data.pipeline import build_train_stream
from megatron_llave.data.step_buffer import StepBuffer
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.distributed.layout import validate_batch, validate_layout
from megatron_llave.errors import CheckpointError, exit_with_one_line
from megatron_llave.evaluation.evaluate import build_evaluation
from megatron_llave.evaluation.task import SetResult
from megatron_llave.launch import procs
from megatron_llave.loss import build_loss
from megatron_llave.loss.schedules import at_step
from megatron_llave.mining.refresh import Refresh
from megatron_llave.models import build_model, build_processor
from megatron_llave.models.blocks.kernels import describe_kernels, row_multiple
from megatron_llave.models.lora import initialize_adapters
from megatron_llave.options import train as options
from megatron_llave.planning.token_budget import token_budget
from megatron_llave.processes import SECONDS_TO_SAVE, end_forks_with_parent, end_with_launcher, return_freed_tensors
from megatron_llave.report.montage import draw_montage
from megatron_llave.report.panels import example_panels
from megatron_llave.training.broadcast import broadcast_steps, exchange_row_counts, is_reader
from megatron_llave.training.ema import ExponentialMovingAverage
from megatron_llave.training.fault_tolerance import EXIT_STOPPED, FiniteSteps, StopRequests, Watchdog, read_norms
from megatron_llave.training.gradient_cache import forward_backward
from megatron_llave.training.logger import RunLog, quiet_dependencies
from megatron_llave.training.metrics import StepResult, collect, is_due
from megatron_llave.training.micro_batches import MicroBatches, kept_of, subset_of, waited_for
from megatron_llave.training.optimizer import Trainable, build_trainable, learning_rate, require_runnable
from megatron_llave.training.run_state import RunState, held_output
from megatron_llave.training.temperature import LearnedTemperature, read_gradient
from megatron_llave.training.trackers import open_trackers

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Entry point: `--config FILE.yaml [--resume auto] section.key=value ...`."""
    args = options.parse(argv)
    resumed = [f"checkpoint.resume={args.resume}"] if args.resume else []
    with exit_with_one_line():
        procs.require_as_started(args.procs)
        end_forks_with_parent()
        end_with_launcher(SECONDS_TO_SAVE)
        quiet_dependencies()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("megatron_llave").setLevel(logging.INFO)
        cpu_emulation.enable()
        reason = train(load_config(args.config, [*args.overrides, *resumed]))
    if reason and "TORCHELASTIC_RUN_ID" not in os.environ:
        # Under torchrun the status stays 0: it takes any other one for a failure and may start the run again.
        raise SystemExit(EXIT_STOPPED)


def train(cfg: RunConfig) -> str:
    """Train as configured, on the processes that torchrun has started.

    Returns:
        The reason why the run was stopped and saved before its last step; "" if it ran to the end.

    Raises:
        UserError: the configuration, the parallel layout or the data cannot work; the message names the culprit.
    """
    cfg = given = with_former_init(cfg)
    pretrained = find_pretrained(cfg.checkpoint.init) if cfg.checkpoint.init else None
    if pretrained is not None:
        pretrained.require_plausible()
        cfg = starting_from(pretrained, cfg)
    require_runnable(cfg.optimizer)
    world_size = process_groups.initialize_distributed(cfg.parallel.timeout_seconds)
    if pretrained is not None:
        pretrained = of_first_rank(pretrained)
        cfg = starting_from(pretrained, given)
    validate_batch(cfg, validate_layout(cfg.model, cfg.parallel, world_size))
    groups = process_groups.initialize_model_parallel(cfg.parallel, cfg.train.seed)
    with held_output(cfg.train.output) as run:
        reason = train_in_output(with_steps(cfg), pretrained, groups, run)
    process_groups.destroy_distributed()
    return reason


def train_in_output(
    cfg: RunConfig, pretrained: Pretrained | None, groups: ProcessGroupCollection, run: RunState
) -> str:
    """Build the parts of the run and train, in the output directory that this run holds; returns what `train` does."""
    resumed = find_checkpoint(cfg)
    watchdog = Watchdog(cfg.parallel.timeout_seconds, run.fail)
    watchdog.announce(f"opening the data in {cfg.data.path}")
    position = folders.read_position(resumed) if resumed else None
    steps = open_steps(cfg, groups, position)
    is_new = pretrained is None and resumed is None
    watchdog.announce(f"building the model{f' with random weights of seed {cfg.train.seed}' if is_new else ''}")
    seed = cfg.train.seed if is_new else None
    chunks = build_model(cfg.model, cfg.parallel, groups, process_groups.device(), seed, cfg.lora)
    base = base_of(cfg, pretrained, resumed)
    if pretrained is not None and needs_weights(resumed):
        watchdog.announce(f"loading {cfg.checkpoint.init}")
        initialize_adapters(chunks, groups.tp, cfg.train.seed)
        pretrained.load(chunks, groups, base=cfg.lora.base)
    watchdog.progress("building the optimizer")
    average = ExponentialMovingAverage(chunks, cfg.loss.ema_decay) if cfg.loss.reward == "ema" else None
    temperature = LearnedTemperature(cfg.loss, cfg.optimizer) if cfg.loss.temperature_learning != "none" else None
    state = TrainingState(chunks, build_trainable(cfg, chunks, groups), average, groups, temperature, cfg.lora)
    watchdog.announce(f"loading {resumed}" if resumed else f"making the output directory {cfg.train.output}")
    done = resume(state, resumed, cfg) if resumed else 0
    output = make_folder(cfg, pretrained, base)
    is_reporting = process_groups.is_reporting_rank(groups)
    if is_reporting:
        logger.info("%s", describe_kernels(cfg.model, state.trainable.describe()))
    trackers = open_trackers(cfg.log, output, done + 1, asdict(cfg)) if is_reporting else []
    log = RunLog(output, cfg.log.interval, cfg.train.steps, is_reporting, trackers)
    writer = CheckpointWriter(cfg, groups, watchdog.progress)
    with closing(Refresh(cfg, done, writer, watchdog.progress)) as refresh:
        reason = run_steps(cfg, state, steps, done, log, watchdog, run, writer, refresh)
    log.close()
    watchdog.close()
    return reason


def run_steps(
    cfg: RunConfig,
    state: TrainingState,
    steps: Iterator[StepBatches],
    done: int,
    log: RunLog,
    watchdog: Watchdog,
    run: RunState,
    writer: CheckpointWriter,
    refresh: Refresh,
) -> str:
    """The training loop, from step `done` + 1 to train.steps or until somebody asks the run to stop.

    Returns:
        The reason why it stopped before the last step, or "".
    """
    groups, last = state.groups, cfg.train.steps
    requests = StopRequests(cfg.train.output, cfg.train.time_limit_minutes)
    finite = FiniteSteps(cfg.train.max_bad_steps, groups)
    evaluate = evaluation_after_steps(cfg, state, log, watchdog)
    run.running(done)
    if done < last:
        watchdog.announce(f"waiting for the first batch of {cfg.train.global_batch_size} pairs")
    reason, step, waited_for_save = "", done, 0.0
    for step in range(done + 1, last + 1):
        if reason := refresh.wait(step, requests.reason):
            step -= 1  # which is saved, since its checkpoint is the next one to be mined
            break
        watchdog.progress(f"waiting for the data of step {step}")
        started = time.perf_counter()
        data = next(steps)
        waited = time.perf_counter() - started
        watchdog.progress(f"computing step {step}")
        config = loss_of_subset(cfg, subset_of(data.batches))
        further = state.average, finite, state.temperature
        result = train_step(state.trainable, data.batches, config, step - 1, groups, *further)
        record = collect(cfg, step, result, groups.dp, started, waited + waited_for(data.batches))
        run.running(step)
        watchdog.progress(f"ending step {step}")
        reason = requests.reason()
        is_last = bool(reason) or step == last
        if is_last or is_due(step, cfg.checkpoint.interval):
            writer.save(step, state.to_save(step), data.position)
        save_seconds = waited_for_save + time.perf_counter() - started - record["seconds"]
        log.step(record | refresh.record(step) | {"save_seconds": save_seconds, "bad_steps": finite.num_bad})
        started = time.perf_counter()
        writer.poll(wait=is_last)  # after the log: a run that is killed here and resumes must have the record
        waited_for_save = time.perf_counter() - started
        evaluate(step)
        if is_last:
            break
        refresh.after(step)
    if step > done:
        require_saved(cfg, writer, step)
    requests.close()
    is_stopped = step < last
    run.end("stopped" if is_stopped else "finished", step, reason)
    if is_stopped and dist.get_rank() == 0:
        logger.warning("stopped after step %d and saved: %s", step, reason)
    return reason if is_stopped else ""


def evaluation_after_steps(
    cfg: RunConfig, state: TrainingState, log: RunLog, watchdog: Watchdog
) -> Callable[[int], None]:
    """What evaluates the model after each step that asks for it, and logs the scores; all ranks call it."""
    if not cfg.evaluate.interval:
        return lambda step: None
    drawn = montages(cfg, log)
    evaluate, candidates = build_evaluation(cfg, state.chunks, state.groups, watchdog.progress, drawn)

    def after(step: int) -> None:
        if step == cfg.train.steps or is_due(step, cfg.evaluate.interval):
            started = time.perf_counter()
            log.evaluation(step, evaluate(), time.perf_counter() - started, candidates)

    return after


def montages(cfg: RunConfig, log: RunLog) -> Callable[[list[SetResult], Mapping[str, Side]], None] | None:
    """What draws some queries of each evaluation with their best candidates and the right one; None: nothing does."""
    count = cfg.log.montage_queries if log.is_enabled else 0
    if not count:
        return None
    return lambda results, inputs: log.montage(
        lambda path: draw_montage(example_panels(results, inputs, count, with_right=True), path)
    )


def require_saved(cfg: RunConfig, writer: CheckpointWriter, step: int) -> None:
    """Wait for the checkpoint after the run's last step, and let the run fail unless it is complete.

    Raises:
        CheckpointError: it is not.
    """
    writer.poll(wait=True)
    if writer.last != folders.step_folder(cfg.train.output, step):
        raise CheckpointError(f"the run ends after step {step}, which is not saved; the log says why")


def open_steps(cfg: RunConfig, groups: ProcessGroupCollection, position: dict | None) -> Iterator[StepBatches]:
    """The steps of this rank from `position` on, on its device; None: from the first one.

    Raises:
        UserError: as `open_data`.
    """
    are_single = cfg.train.tokens_per_micro_batch is not None
    return broadcast_steps(open_data(cfg, groups, position), groups, process_groups.device(), are_single)


def open_data(cfg: RunConfig, groups: ProcessGroupCollection, position: dict | None) -> Iterator[StepBuffer] | None:
    """The training stream from `position` on; None on the ranks of a replica that do not read.

    Raises:
        UserError: the data, the tokenizer or the mixture cannot work, or differ from those at `position`.
    """
    if cfg.train.tokens_per_micro_batch is not None:
        return_freed_tensors()  # before the processes that decode are forked, which do the same
    if not is_reader(groups):
        return None
    encoder = build_processor(cfg.data, cfg.model)
    multiple = row_multiple(cfg.model, cfg.parallel)
    budget = token_budget(cfg, process_groups.device().type == "cuda")
    return build_train_stream(cfg, encoder, groups.dp.rank(), groups.dp.size(), multiple, position, budget)


def train_step(
    trainable: Trainable,
    batches: list[PairBatch] | MicroBatches,
    config: LossConfig,
    step: int,
    groups: ProcessGroupCollection,
    average: ExponentialMovingAverage | None = None,
    finite: FiniteSteps | None = None,
    temperature: LearnedTemperature | None = None,
) -> StepResult:
    """One step over this rank's micro batches, which are on its device: embed, compare, weight by hardness, update.

    Args:
        trainable: model, optimizer and schedule.
        batches: this rank's micro batches.
        config: the loss for the subset of this step.
        step: steps done before this one.
        groups: the parallel layout.
        average: the reward model, which is updated too; None: the model judges hardness itself.
        finite: keeps a step whose loss or gradient is not finite from changing the weights; None: nothing does.
        temperature: the learned temperature, which is updated too; None: that of `config`.
    """
    kept, subset, rate = kept_of(batches), subset_of(batches), learning_rate(trainable)
    config, log_temperature = at_step(config, step), None
    if temperature is not None:
        config, log_temperature = temperature.of_step(config, subset, step)
    compare = build_loss(config, groups.dp, log_temperature)
    exchange_row_counts(kept, groups.dp)
    trainable.zero_gradients()
    reward_model = average.applied if config.has_reward_pass else None
    shares = forward_backward(trainable.chunks, batches, compare, config, reward_model)
    gradient_norms, is_finite = read_norms(trainable.squared_norms(), shares)
    slope = read_gradient(log_temperature, groups, config.takes_one_pass(len(batches)))
    is_skipped = finite is not None and not finite.check(is_finite, shares, kept, step)
    trainable.update(None if is_skipped else gradient_norms[0])
    if average is not None and not is_skipped:
        trainable.wait_for_weights()
        average.update()
    if slope is not None and not is_skipped:
        temperature.update(subset, slope)
    return StepResult(config, kept, shares, gradient_norms, rate, slope)


if __name__ == "__main__":
    main()

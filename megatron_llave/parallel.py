"""Process groups from a ParallelConfig, and collectives over rows. The only file that names parallel_state.

Ranks are numbered tensor-parallel first, then context, data, pipeline (megatron-core's order "tp-cp-ep-dp-pp"). Every
other module takes a group, or the ProcessGroupCollection, as an argument.
"""

import gc
import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_llave.config import ParallelConfig, RunConfig
from megatron_llave.config_model import ModelConfig
from megatron_llave.errors import ConfigError

logger = logging.getLogger(__name__)

SECONDS_FOR_THE_WATCHDOG = 60
"""Collectives wait this much longer than the watchdog (fault_tolerance.py), which knows better whom to blame."""


def device() -> torch.device:
    """The device this process computes on: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start_processes(timeout_seconds: int) -> int:
    """Join the processes torchrun started (or be the only one) and return their number.

    Uses NCCL with GPUs, gloo without. A collective that waits longer than `timeout_seconds`, and some more for the
    watchdog, ends the process.
    """
    if not dist.is_initialized():
        if torch.cuda.is_available():
            # Before the first use of the GPU: megatron-core's tensor-parallel layers count on the order of its queue.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=timeout_seconds + SECONDS_FOR_THE_WATCHDOG)
        dist.init_process_group(backend, timeout=limit, **_meeting_place())
    return dist.get_world_size()


def _meeting_place() -> dict[str, Any]:
    """Where the processes find each other, if it is not simply what torchrun's variables say."""
    env = os.environ
    if "RANK" not in env:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return {}
    if int(env.get("GROUP_WORLD_SIZE", 1)) > 1:
        if env["RANK"] == "0" and restarts == 0:
            logger.warning(
                "after a failure the nodes may not find each other again: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                "before torchrun on each (pytorch issue 135712)"
            )
        return {}
    # torchrun's store still has the addresses of the processes before the restart.
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    place = dist.PrefixStore(f"restart {restarts}", store)
    return {"store": place, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}


def init(config: ParallelConfig, seed: int = 0) -> ProcessGroupCollection:
    """Build the process groups of a layout that `validate_layout` has accepted; those in use stay if they are of it.

    Returns:
        Groups: tp, cp, dp (context-parallel ranks apart), dp_cp, pp, mp, ... of this rank.
    """
    virtual_pipeline = config.virtual_pipeline if config.virtual_pipeline > 1 else None
    if not _is_in_use(config.tensor, config.pipeline, virtual_pipeline, config.context):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline,
            context_parallel_size=config.context,
            distributed_timeout_minutes=(config.timeout_seconds + SECONDS_FOR_THE_WATCHDOG) / 60,
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # As Megatron-LM does, so that no two stages drop the same channels.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp.rank())
    return groups


def _is_in_use(*sizes: int | None) -> bool:
    """Whether the groups of this layout are there already: a second model in one process."""
    return parallel_state.model_parallel_is_initialized() and sizes == (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def leave_layout() -> None:
    """Give up the groups of `init`; the processes stay joined and may take up another layout.

    Whoever calls this has let go of models and groups. On gloo a group that lives on, here or on another rank alone,
    keeps a thread awake that slows everything down.
    """
    # megatron-core only forgets them.
    groups = [group for group in dict.fromkeys(parallel_state._global_process_group_list or []) if group is not None]
    dist.barrier()  # nobody may still be waiting for what another rank has sent
    while groups:
        dist.destroy_process_group(groups.pop())
    parallel_state.destroy_model_parallel()
    gc.collect()  # wrapped models refer to themselves


def shut_down() -> None:
    """Leave the process groups, so that a normal end is not reported as an abort."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_reporting_rank(groups: ProcessGroupCollection) -> bool:
    """True on the one rank that has the losses to log: last pipeline stage, first of its other groups."""
    last_stage = groups.pp.rank() == groups.pp.size() - 1
    return last_stage and groups.tp.rank() == 0 and groups.dp_cp.rank() == 0


def validate_layout(model: ModelConfig, layout: ParallelConfig, world_size: int) -> int:
    """Check that the model can be split over `world_size` processes as asked.

    Returns:
        The number of data-parallel ranks that is left.

    Raises:
        ConfigError: one line with the keys and numbers that do not fit.
    """
    model_parallel = layout.tensor * layout.pipeline * layout.context
    sizes = f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} x parallel.context={layout.context}"
    if world_size % model_parallel:
        raise ConfigError(f"{world_size} processes cannot be split into {sizes}: not a multiple of {model_parallel}")
    _validate_tensor(model, layout)
    _validate_pipeline(model.language.num_layers, layout)
    if layout.context > 1:
        raise ConfigError(f"parallel.context={layout.context}: packed sequences are not split over context ranks")
    return world_size // model_parallel


def _validate_tensor(model: ModelConfig, layout: ParallelConfig) -> None:
    if layout.sequence and layout.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of at least 2")
    for part, values in (("vision", model.vision), ("language", model.language)):
        for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
            value = getattr(values, name, layout.tensor)
            if value % layout.tensor:
                raise ConfigError(f"model.{part}.{name}={value} is not divisible by parallel.tensor={layout.tensor}")
    hidden = model.language.hidden_size  # width of the projector's inner layer, which is split
    if hidden % layout.tensor:
        raise ConfigError(f"model.language.hidden_size={hidden} is not divisible by parallel.tensor={layout.tensor}")


def _validate_pipeline(layers: int, layout: ParallelConfig) -> None:
    stages, chunks, first = layout.pipeline, layout.virtual_pipeline, layout.first_stage_layers
    if chunks > 1 and stages == 1:
        raise ConfigError(f"parallel.virtual_pipeline={chunks} needs parallel.pipeline of at least 2")
    if first is not None and (stages == 1 or not 1 <= first < layers):
        raise ConfigError(
            f"parallel.first_stage_layers={first} must be 1 to {layers - 1} and needs parallel.pipeline of at least 2"
        )
    rest, rest_stages = (layers, stages) if first is None else (layers - first, stages - 1)
    less = "" if first is None else f" less parallel.first_stage_layers={first}"
    if rest % (rest_stages * chunks) or (first or 0) % chunks:
        raise ConfigError(
            f"model.language.num_layers={layers}{less} cannot be split evenly over {rest_stages} pipeline stages x "
            f"{chunks} chunks"
        )


def validate_batch(cfg: RunConfig, data_parallel: int) -> None:
    """Check that the global batch can be split into equal micro batches over the data-parallel ranks.

    Raises:
        ConfigError: one line with the numbers that do not fit.
    """
    total, layout = cfg.train.global_batch_size, cfg.parallel
    micro = cfg.train.micro_batch_size or max(1, total // data_parallel)
    if total % (data_parallel * micro):
        times = f"train.micro_batch_size={micro} x " if cfg.train.micro_batch_size else ""
        raise ConfigError(
            f"train.global_batch_size={total} is not a multiple of {times}{data_parallel} data-parallel ranks"
        )
    micro_batches = total // (data_parallel * micro)
    if layout.virtual_pipeline > 1 and micro_batches % layout.pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline={layout.virtual_pipeline} needs a number of micro batches that "
            f"parallel.pipeline={layout.pipeline} divides, but train.global_batch_size={total} with "
            f"train.micro_batch_size={micro} gives {micro_batches}"
        )


def row_counts(group: dist.ProcessGroup | None, *rows: Tensor) -> list[list[int]]:
    """For each tensor, the number of rows that each rank of the group holds, in rank order; one collective for all."""
    if group is None or group.size() == 1:
        return [[len(x)] for x in rows]
    own = torch.tensor([[len(x) for x in rows]], device=rows[0].device)
    counts = own.new_empty(group.size(), len(rows))
    dist.all_gather_into_tensor(counts, own, group=group)
    return counts.T.tolist()


def all_gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, without a gradient.

    Args:
        rows: [counts[rank], ...] this rank's rows; the numbers may differ between ranks.
        counts: rows per rank, from `row_counts`.
        group: ranks to gather over; None, a single rank, or no row on any of them returns `rows`.

    Returns:
        [sum(counts), ...] in rank order.
    """
    if group is None or group.size() == 1 or not any(counts):
        return rows
    longest = max(counts)
    padding = rows.new_zeros((longest - rows.shape[0], *rows.shape[1:]))
    gathered = rows.new_empty((group.size() * longest, *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, torch.cat([rows.detach(), padding]), group=group)
    if min(counts) == longest:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts)])


def reduce_scatter_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sum [sum(counts), ...] over the ranks and keep this rank's rows; the adjoint of all_gather_rows."""
    if group is None or group.size() == 1 or not any(counts):
        return rows
    longest, own = max(counts), counts[group.rank()]
    if min(counts) != longest:
        parts = [torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])]) for part in rows.split(counts)]
        rows = torch.cat(parts)
    kept = rows.new_empty((longest, *rows.shape[1:]))
    dist.reduce_scatter_tensor(kept, rows.contiguous(), group=group)
    return kept[:own]

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

from megatron_llave.config.schema import ParallelConfig

logger = logging.getLogger(__name__)

SECONDS_FOR_THE_WATCHDOG = 60
"""Collectives wait this much longer than the watchdog (fault_tolerance.py), which knows better whom to blame."""


def device() -> torch.device:
    """The device this process computes on: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize_distributed(timeout_seconds: int) -> int:
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
        dist.init_process_group(backend, timeout=limit, **_rendezvous())
    return dist.get_world_size()


def _rendezvous() -> dict[str, Any]:
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


def initialize_model_parallel(config: ParallelConfig, seed: int = 0) -> ProcessGroupCollection:
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


def destroy_model_parallel() -> None:
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


def destroy_distributed() -> None:
    """Leave the process groups, so that a normal end is not reported as an abort."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_reporting_rank(groups: ProcessGroupCollection) -> bool:
    """True on the one rank that has the losses to log: last pipeline stage, first of its other groups."""
    last_stage = groups.pp.rank() == groups.pp.size() - 1
    return last_stage and groups.tp.rank() == 0 and groups.dp_cp.rank() == 0

"""Builds the process groups of a ParallelConfig. No other file names parallel_state.

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
from megatron_llave.distributed.launcher import require_one_run

logger = logging.getLogger(__name__)

SECONDS_FOR_THE_WATCHDOG = 60
"""How much longer collectives wait than the watchdog (fault_tolerance.py), which can tell the rank that hangs."""


def device() -> torch.device:
    """The device this process computes on: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize_distributed(timeout_seconds: int) -> int:
    """Join the processes that torchrun has started, or be the only one, and return their number.

    The backend is NCCL with GPUs and gloo without. A collective that waits SECONDS_FOR_THE_WATCHDOG longer than
    `timeout_seconds` ends the process.

    Raises:
        ConfigError: a scheduler has started several processes, but torchrun has not joined them.
    """
    if not dist.is_initialized():
        require_one_run(os.environ)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        limit = timedelta(seconds=timeout_seconds + SECONDS_FOR_THE_WATCHDOG)
        # Without device_id: with it, torch splits every later group off one communicator at once, which hangs in some
        # layouts (pytorch issues 145376 and 153960) and takes memory for each group.
        dist.init_process_group(backend, timeout=limit, **_rendezvous())
    return dist.get_world_size()


def _rendezvous() -> dict[str, Any]:
    """Arguments of init_process_group for the rendezvous of the processes; none where torchrun's variables suffice."""
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
    """Build the process groups of a parallel layout that `validate_layout` has accepted, or reuse those that exist.

    Returns:
        The groups of this rank: tp, cp, dp (without the context-parallel ranks), dp_cp, pp, mp, ...
    """
    virtual_pipeline = config.virtual_pipeline if config.virtual_pipeline > 1 else None
    if not _is_in_use(config.tensor, config.pipeline, virtual_pipeline, config.context):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline,
            context_parallel_size=config.context,
            create_gloo_process_groups=False,  # for saves that gather the optimizer's state, which ours do not
            distributed_timeout_minutes=(config.timeout_seconds + SECONDS_FOR_THE_WATCHDOG) / 60,
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # As in Megatron-LM, pipeline stages have different seeds, so that they do not drop the same channels.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * groups.pp.rank())
    return groups


def _is_in_use(*sizes: int | None) -> bool:
    """Whether the groups of this layout exist already, as for a second model in one process."""
    return parallel_state.model_parallel_is_initialized() and sizes == (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def destroy_model_parallel() -> None:
    """Destroy the groups of `initialize_model_parallel`; the processes stay joined and may build another layout.

    The caller must hold no model and no group any more. With gloo, a group that still exists on any rank keeps a thread
    busy that slows everything down.
    """
    # megatron-core only drops its references.
    groups = [group for group in dict.fromkeys(parallel_state._global_process_group_list or []) if group is not None]
    dist.barrier()  # no rank may still be waiting for data that another one has sent
    while groups:
        dist.destroy_process_group(groups.pop())
    parallel_state.destroy_model_parallel()
    gc.collect()  # wrapped models are reference cycles


def destroy_distributed() -> None:
    """Destroy all process groups, so that a normal end is not reported as an abort."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_reporting_rank(groups: ProcessGroupCollection) -> bool:
    """Whether this rank logs the losses: it is on the last pipeline stage and the first of its other groups."""
    last_stage = groups.pp.rank() == groups.pp.size() - 1
    return last_stage and groups.tp.rank() == 0 and groups.dp_cp.rank() == 0

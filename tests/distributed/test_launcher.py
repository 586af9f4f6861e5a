"""A command that a scheduler has started several times without torchrun is refused; one per node is not."""

import pytest

from megatron_llave.distributed.launcher import require_one_run
from megatron_llave.errors import ConfigError

BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
RANK = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "source"),
    [
        (STEP, "SLURM_STEP_NUM_TASKS=4"),
        ({**STEP, "SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS=4"),
        ({**BATCH, "SLURM_PROCID": "1"}, "SLURM_NTASKS=4"),
        ({**STEP, **RANK, "WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS=4"),  # torchrun of one process in each task
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, "PMI_SIZE=8"),
        ({"MV2_COMM_WORLD_SIZE": "3"}, "MV2_COMM_WORLD_SIZE=3"),
        ({"JSM_NAMESPACE_SIZE": "4"}, "JSM_NAMESPACE_SIZE=4"),
        ({"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "1"}, "FLUX_JOB_SIZE=4"),
    ],
)
def test_lone_process_of_several_tasks_is_refused(env: dict[str, str], source: str) -> None:
    with pytest.raises(ConfigError, match=f"{source}: the scheduler has started this command .* torchrun"):
        require_one_run(env)


@pytest.mark.parametrize(
    "env",
    [
        {},
        BATCH,  # the script of sbatch -n 4, and the shell of salloc -n 4, here with the variables of a batch script
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"},  # salloc on a login node
        {**BATCH, **RANK, "WORLD_SIZE": "8"},  # torchrun in the script of sbatch -n 4
        {**STEP, **RANK, "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"},  # one per node
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun -n 1
        {**STEP, **RANK, "RANK": "3", "WORLD_SIZE": "4"},  # the rendezvous variables are set by hand
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"JOB_COMPLETION_INDEX": "3"},
        {"SLURM_STEP_NUM_TASKS": "(null)"},
    ],
)
def test_others_may_start(env: dict[str, str]) -> None:
    require_one_run(env)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_rendezvous_is_refused(missing: str) -> None:
    env = {**RANK, "WORLD_SIZE": "2"}
    with pytest.raises(ConfigError, match=f": {missing} must be given too"):
        require_one_run({name: value for name, value in env.items() if name != missing})
    if missing != "MASTER_ADDR":
        with pytest.raises(ConfigError, match=f"{missing}=x.*: {missing} must be given too, with a number"):
            require_one_run(env | {missing: "x"})

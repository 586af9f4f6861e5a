"""Refuses to start alone where a scheduler has started the same command several times, as `srun` without torchrun does.

Each of those processes would be a run of its own, on a part of the GPUs and with the negatives of a part of the batch.
"""

from collections.abc import Mapping

from megatron_llave.errors import ConfigError, require

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE")
"""Variables with the number of processes that mpirun, mpiexec, jsrun or flux has started."""
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets together."""
STARTED = {"NNODES", "NODE_RANK", "PROCS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NPROCS"}
"""Variables that say how many processes are started where, beside those that torchrun sets for its ranks."""
OF_RANKS = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PET_")
"""How the names of torchrun's other variables begin."""


def require_one_run(env: Mapping[str, str]) -> None:
    """Refuse to be one of several processes that do not know each other.

    Raises:
        ConfigError: the scheduler has started several tasks, but the environment names one process; the message has the
            right command. Or the environment names several, but not where they meet.
    """
    given = {name: env.get(name, "") for name in RENDEZVOUS}
    if given["RANK"] or given["WORLD_SIZE"] not in ("", "1"):
        wrong = [name for name, value in given.items() if not value or name != "MASTER_ADDR" and not value.isdecimal()]
        shown = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        require(
            not wrong, f"{shown}: {' and '.join(wrong)} must be given too, with a number; torchrun sets all of them"
        )
    source, tasks = num_tasks(env)
    if int(env.get("WORLD_SIZE", 1)) > 1 or tasks == 1:
        return
    if source in MPI_SIZES:
        right = "mpirun with one process per node that starts torchrun --nnodes N --nproc-per-node GPUS"
    else:
        right = "srun --ntasks-per-node=1 torchrun --nnodes N --nproc-per-node GPUS ... (examples/slurm/train.sbatch)"
    raise ConfigError(
        f"{source}={tasks}: the scheduler has started this command {tasks} times, but each process would run alone, "
        f"because torchrun has not joined them; use {right}, or start one task for a run of one process (srun -n 1)"
    )


def num_tasks(env: Mapping[str, str]) -> tuple[str, int]:
    """The number of times that a scheduler has started the command of this process, and the variable that says so.

    SLURM sets SLURM_STEP_NUM_TASKS for the processes of `srun` alone. SLURM_NTASKS is also there in the script of
    `sbatch` and in the shell of `salloc`, which are one process each and have no SLURM_PROCID but 0. Kubernetes does
    not tell a pod how many there are (JOB_COMPLETION_INDEX is the number of this one): there the lock of the output
    directory has to do.
    """
    names = [*MPI_SIZES, "SLURM_STEP_NUM_TASKS"]
    if _number(env, "SLURM_PROCID", 0) > 0:
        names += ["SLURM_NTASKS", "SLURM_NPROCS"]
    sizes = [(name, _number(env, name, 1)) for name in names if name in env]
    return max(sizes, key=lambda size: size[1], default=("", 1))


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "")
    return int(value) if value.isdecimal() else default


def of_no_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank without what makes it one, for a command of its own that the rank starts."""
    own = {*RENDEZVOUS, *MPI_SIZES, *STARTED}
    return {name: value for name, value in env.items() if name not in own and not name.startswith(OF_RANKS)}

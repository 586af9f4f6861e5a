"""Compute the weighted mean of the weights of several checkpoints of one model, and write it as a checkpoint.

`llave merge --help` explains the command; megatron_llave/options/merge.py has its options.
"""

from megatron_llave.checkpoint.merge import merge
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import ConfigError, exit_with_one_line
from megatron_llave.options import merge as options
from megatron_llave.training.logger import quiet_dependencies

TIMEOUT_SECONDS = 600


def main(argv: list[str] | None = None) -> None:
    """Merge in this process alone."""
    args = options.parse(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        parts = list(map(parse_part, args.parts))
        if process_groups.initialize_distributed(TIMEOUT_SECONDS) > 1:
            raise ConfigError("`llave merge` runs in one process; do not start it with torchrun")
        print(f"checkpoint: {merge(parts, args.out, process_groups.initialize_model_parallel(ParallelConfig()))}")
        process_groups.destroy_distributed()


def parse_part(text: str) -> tuple[str, float]:
    """Split `runs/a=0.5` into the folder and its weight in the mean.

    Raises:
        ConfigError: the weight is missing or is not a number.
    """
    folder, equals, share = text.rpartition("=")
    try:
        return folder, float(share) if equals and folder else float("")
    except ValueError:
        raise ConfigError(f"{text!r} must be a checkpoint with its share of the mean, such as runs/a=0.5") from None

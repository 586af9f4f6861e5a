"""Compute the weighted mean of the weights of several checkpoints of one model, and write it as a checkpoint.

python tools/merge.py runs/frozen=0.5 runs/trained=0.5 --to runs/merged

The result can be evaluated, exported (tools/convert_hf.py) or trained further (checkpoint.init) like any checkpoint. A
Hugging Face folder has to be imported before it can be merged. Checkpoints of LoRA adapters alone, for one base, become
one of adapters that change the base by the mean of what they change (docs/lora.md).
"""

import argparse

from megatron_llave.checkpoint.merge import merge
from megatron_llave.config.schema import ParallelConfig
from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import ConfigError, OneLineParser, exit_with_one_line
from megatron_llave.training.logger import quiet_dependencies

TIMEOUT_SECONDS = 600


def main(argv: list[str] | None = None) -> None:
    """Merge in this process alone."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", metavar="CKPT=SHARE", help="checkpoint or output directory, and its weight")
    parser.add_argument("--to", required=True, dest="out", help="checkpoint folder to write")
    args = parser.parse_args(argv)
    with exit_with_one_line():
        quiet_dependencies()
        cpu_emulation.enable()
        parts = list(map(parse_part, args.parts))
        if process_groups.initialize_distributed(TIMEOUT_SECONDS) > 1:
            raise ConfigError("tools/merge.py runs in one process; start it with python, not torchrun")
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

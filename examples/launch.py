"""What the launch files share: `launch.py pretrain_NAME.sh [argument ...]` trains as NAME.yaml says.

A launch file is bash and Python at once. Started with bash, it runs this program, which starts torchrun with the
launch file; megatron_llave/launch/start.py says how. Every rank that torchrun starts runs the launch file with Python,
which calls `train`; with torchrun --no-python bash runs it again, and this program then trains.
"""

import importlib
import os
import sys
from pathlib import Path


def main() -> int:
    """Start torchrun, or train where torchrun has started this process; returns the exit status."""
    file, arguments = sys.argv[1], sys.argv[2:]
    if "LOCAL_RANK" in os.environ:
        return train(file, arguments)
    start = import_of_this_clone("megatron_llave.launch.start")
    return start.start_training([file, *arguments], config_file(file), arguments)


def config_file(file: str) -> Path:
    """The YAML file beside a launch file: 7b.yaml of pretrain_llave_7b.sh, NAME.yaml of pretrain_NAME.sh."""
    path = Path(file).resolve()
    return path.with_name(path.stem.removeprefix("pretrain_").removeprefix("llave_") + ".yaml")


def train(file: str, arguments: list[str] | None = None) -> int:
    """Train in this process, which is one rank.

    Args:
        file: the launch file.
        arguments: overrides of its configuration; None: those of the command line.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    training = import_of_this_clone("megatron_llave.train")
    training.main(["--config", str(config_file(file)), *(sys.argv[1:] if arguments is None else arguments)])
    return 0


def import_of_this_clone(name: str) -> object:
    """Import a module of the package beside this folder, whether or not the package is installed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    return importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())

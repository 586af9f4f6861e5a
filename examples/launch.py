"""Starts torchrun for a launch file that was started with bash: `launch.py pretrain_llave_NAME.sh [argument ...]`.

The number of processes is that of the GPUs, or two without a GPU, or PROCS. On several nodes run the launch file on
each one with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, as a scheduler does. Other options of torchrun are
taken from its own variables: PET_MAX_RESTARTS=3 is --max-restarts 3.

SIGTERM and SIGUSR1 ask the run to save and stop, through the file `stop` in its folder, so that a save may take longer
than torchrun waits for processes that it has passed a signal on to. The exit status is then 75; of a finished run it
is 0, else torchrun's.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf

EXIT_STOPPED = 75
DEFAULT_OUTPUT = "runs/default"
"""train.output where neither file nor command line has one."""
ASK_AGAIN = 2
"""Seconds; a run that is only starting forgets what an earlier one was asked for."""
SECONDS_TO_MEET = 600
"""Nodes that start late (an image to pull, a name that is not known yet) are waited for."""


def main() -> int:
    """Run until torchrun ends; returns the exit status."""
    file, arguments = sys.argv[1], sys.argv[2:]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Else restarted nodes are told the addresses of the processes before them (pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", num_processes(), *nodes()]

    def ask(number: int, frame: object) -> None:
        with suppress(OSError):  # the run has not made its folder yet
            (run_folder(file, arguments) / "stop").touch()
        signal.alarm(ASK_AGAIN)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
        signal.signal(number, ask)
    # In a session of its own: a signal to the whole group of processes is to reach torchrun through this one alone.
    torchrun = subprocess.Popen([*launcher, file, *arguments], start_new_session=True)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: torchrun.send_signal(number))
    status = torchrun.wait()
    if status == 0 and is_stopped(run_folder(file, arguments)):
        return EXIT_STOPPED
    return status if status >= 0 else 128 - status


def num_processes() -> str:
    """Of this node."""
    if "PROCS" in os.environ:
        return os.environ["PROCS"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:  # no such program
        listed = ""
    return str(sum(line.startswith("GPU ") for line in listed.splitlines()) or 2)


def nodes() -> list[str]:
    """Options of torchrun that say how the nodes meet."""
    if int(os.environ.get("NNODES", 1)) == 1:
        return ["--standalone"]
    for name in ("NODE_RANK", "MASTER_ADDR"):
        if name not in os.environ:
            sys.exit(f"error: {name} must be set when NNODES is")
    endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', 29500)}"
    is_host = int(os.environ["NODE_RANK"] == "0")
    meeting = f"is_host={is_host},read_timeout={SECONDS_TO_MEET}"
    # c10d, not the default: after a failure its nodes find each other again (--max-restarts).
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", meeting]
    return ["--nnodes", os.environ["NNODES"], *rendezvous]


def run_folder(file: str, arguments: list[str]) -> Path:
    """train.output of the run, read as lightly as can be."""
    own = Path(file).resolve()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", default=own.with_name(own.stem.removeprefix("pretrain_llave_") + ".yaml"))
    given, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if word.startswith("train.output=")]
    cfg = OmegaConf.merge(OmegaConf.load(given.config), OmegaConf.from_dotlist(overrides))
    return Path(OmegaConf.select(cfg, "train.output") or DEFAULT_OUTPUT)


def is_stopped(output: Path) -> bool:
    """Whether the run has been stopped and saved before its end."""
    try:
        state = json.loads((output / "state.json").read_text())
    except FileNotFoundError:  # it was only asked for --help
        return False
    return state["state"] == "stopped"


if __name__ == "__main__":
    sys.exit(main())

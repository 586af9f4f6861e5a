"""Starts torchrun with a command, and passes signals on: `start_training` for a run, `start_ranks` for other commands.

The number of processes is PROCS, or else the number of GPUs, or two without a GPU. On several nodes start the command
on each one with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, as a scheduler does. Other options of torchrun
are taken from its own variables: PET_MAX_RESTARTS=3 is --max-restarts 3, and with PET_LOG_DIR=DIR the output of each
rank also goes to files of its own (quiet_torchrun.py).

SIGTERM, SIGUSR1 and Ctrl-C ask a run to save and stop, through the file `stop` in its output directory. So a save may
take longer than torchrun waits for processes that it has passed a signal on to. The exit status is then 75. The ranks
of any other command end. A second Ctrl-C ends everything at once. A finished command has the status 0, any other one
that of the rank that failed (quiet_torchrun.py), whose line or traceback comes last.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

EXIT_STOPPED = 75
DEFAULT_OUTPUT = "runs/default"
"""train.output where neither the file nor the command line gives one."""
ASK_AGAIN = 2
"""Seconds between requests: a run deletes the stop file when it starts, since it may be that of an earlier run."""
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
"""Signals at which a run is asked to save and stop; SIGALRM asks again."""
SECONDS_TO_MEET = 600
"""How long to wait for nodes that start late (an image to pull, a host name that does not resolve yet)."""
TORCHRUN, RANK = (Path(__file__).with_name(name) for name in ("quiet_torchrun.py", "rank.py"))
"""Files that torchrun and a rank of a command are started with."""


def start_training(command: list[str], config: Path, arguments: list[str], number: int | None = None) -> int:
    """Start the ranks of a run and wait for their end.

    Args:
        command: what every rank runs: a file of Python with its arguments.
        config: the configuration where the arguments name none.
        arguments: `--config FILE`, `--resume auto` and overrides, as the ranks get them.
        number: number of ranks of this node; None: `num_processes()`.

    Returns:
        The exit status.
    """

    def ask() -> None:
        with suppress(OSError):  # the run has not made its directory yet
            (run_folder(config, arguments) / "stop").touch()
        signal.alarm(ASK_AGAIN)

    status = start_ranks(command, number, ask, ending="the run saves and stops")
    if status == 0 and is_stopped(run_folder(config, arguments)):
        return EXIT_STOPPED
    return status


def start_ranks(
    command: list[str],
    number: int | None = None,
    ask: Callable[[], None] | None = None,
    ending: str = "the command ends",
) -> int:
    """Start the ranks of a command and wait for their end.

    Args:
        command: what every rank runs: a file of Python with its arguments.
        number: number of ranks of this node; None: `num_processes()`.
        ask: asks the ranks to end at one of the signals of ASKING; None: they are ended by a signal.
        ending: what follows the first Ctrl-C, for its message.

    Returns:
        The exit status.
    """
    tasks = whole_number("SLURM_STEP_NUM_TASKS", 1)
    if tasks > num_nodes():
        hint = "use srun --ntasks-per-node=1 with NNODES, NODE_RANK and MASTER_ADDR set, or examples/slurm/train.sbatch"
        sys.exit(f"error: srun has started this command {tasks} times, but NNODES is {num_nodes()}; {hint}")
    # Otherwise restarted nodes are told the addresses of the processes before them (pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # A rank that ends while it talks to another one would print a warning with a stack of twenty lines after our one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launcher = [sys.executable, str(TORCHRUN), "--nproc-per-node", str(number or num_processes()), *nodes()]
    asked: set[int] = set()

    def pass_on(number: int, frame: object) -> None:
        process.send_signal(number)

    def handle(number: int, frame: object) -> None:
        is_again = number in asked
        asked.add(number)  # first of all, since the same signal may interrupt what follows
        if number == signal.SIGINT:
            if is_again:
                end_at_once(process.pid, 128 + number)
            print(f"Ctrl-C: {ending}; a second Ctrl-C ends it at once", file=sys.stderr, flush=True)
        if ask is not None:
            ask()
        else:
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    for number in ASKING:
        signal.signal(number, handle)
    # In a session of its own: a signal to the whole process group must reach torchrun through this process alone.
    options = {"start_new_session": True, "preexec_fn": end_with_parent}
    process = subprocess.Popen([*launcher, *command], **options)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, pass_on)
    status = process.wait()
    for number in (*ASKING, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # Python takes its handlers away before it ends; SIGALRM may still come
    return status if status >= 0 else 128 - status


def end_at_once(launcher: int, status: int) -> None:
    """Kill torchrun and its ranks, and end this process."""
    process = psutil.Process(launcher)
    for rank in process.children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            rank.kill()  # torchrun has put each into a session of its own
    process.kill()
    os._exit(status)


def end_with_parent() -> None:
    """Let the kernel send this process a SIGTERM when its parent ends, however it ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def whole_number(name: str, default: int) -> int:
    """Value of an environment variable; ends the program with one line unless it is a whole number."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        sys.exit(f"error: {name}={value} must be a whole number")
    return int(value)


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "LOCAL_RANK" in os.environ


def num_nodes() -> int:
    """Number of nodes on which the command is started."""
    return whole_number("NNODES", 1)


def num_processes(without_gpu: int = 2) -> int:
    """Number of processes of this node: PROCS, or the number of GPUs, or `without_gpu`."""
    if "PROCS" in os.environ:
        return whole_number("PROCS", without_gpu)
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:  # no such program
        listed = ""
    return sum(line.startswith("GPU ") for line in listed.splitlines()) or without_gpu


def nodes() -> list[str]:
    """Options of torchrun for the rendezvous of the nodes."""
    if num_nodes() == 1:
        return ["--standalone"]
    for name in ("NODE_RANK", "MASTER_ADDR"):
        if name not in os.environ:
            sys.exit(f"error: {name} must be set when NNODES is")
    endpoint = f"{os.environ['MASTER_ADDR']}:{whole_number('MASTER_PORT', 29500)}"
    is_host = int(whole_number("NODE_RANK", 0) == 0)
    meeting = f"is_host={is_host},read_timeout={SECONDS_TO_MEET}"
    # With c10d, unlike the default, the nodes find each other again after a failure (--max-restarts).
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", meeting]
    return ["--nnodes", os.environ["NNODES"], *rendezvous]


def run_folder(config: Path, arguments: list[str]) -> Path:
    """train.output of the run, read without the configuration's own reader, whose import takes a second."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", default=config)
    known, rest = parser.parse_known_args(arguments)
    given = [word.removeprefix("train.output=").strip() for word in rest if word.startswith("train.output=")]
    if given:  # a text arrives as it stands, unless it is in quotes
        return Path(yaml.safe_load(given[-1]) if given[-1][:1] in ("'", '"') else given[-1])
    written = yaml.load(Path(known.config).read_text(), yaml.BaseLoader)
    return Path((written.get("train") or {}).get("output") or DEFAULT_OUTPUT)


def is_stopped(output: Path) -> bool:
    """Whether the run was stopped and saved before its last step."""
    try:
        state = json.loads((output / "state.json").read_text())
    except FileNotFoundError:  # the command was --help
        return False
    return state["state"] == "stopped"

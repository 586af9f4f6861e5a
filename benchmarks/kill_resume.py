"""Kill a tiny run at random moments, resume it, and compare its end bit for bit with that of an uninterrupted run.

python -m benchmarks.kill_resume --data DIR --out DIR [--preset tiny] [--kills 200] [--seed 0]

DIR of --data holds shards and a tokenizer (make demo makes one). The model has fewer and narrower layers than the
preset. Each run has STEPS steps on two ranks, and saves after every other step. It is killed again and again, in one of
the ways of `WAYS`, until it comes to its end; then every loss and every byte of its last checkpoint must be those of
the run that nobody disturbed, and no process may be left one minute after a kill. Its processes are forks of one that
has loaded the package, and a small launcher stands in for torchrun, so that a start takes a second. The last line
counts the kills, and the exit status is 0 if all is right.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from forking import end, fork  # noqa: E402

from megatron_llave.train import main as train  # noqa: E402

STEPS, WORLD = 10, 2
SECONDS_TO_BE_GONE = 60
SETTINGS = [
    *("model.vision.hidden_size=32", "model.vision.num_layers=1", "model.vision.num_heads=4"),
    *("model.vision.ffn_hidden_size=64", "model.language.hidden_size=64", "model.language.num_layers=1"),
    *("model.language.num_heads=2", "model.language.num_kv_heads=2", "model.language.ffn_hidden_size=128"),
    *(f"train.steps={STEPS}", "train.global_batch_size=8"),
    *("optimizer.warmup_steps=2", "checkpoint.interval=2", "data.workers=1", "log.interval=0"),
    *("parallel.timeout_seconds=120",),
]
PRESETS = {
    "tiny": ["model.vision.image_size=28"],
    "tiny_qwen2vl": [],
    "tiny_qwen2_5vl": ["model.vision.full_attention_layers=[0]"],
    "tiny_qwen3vl": [],
}
"""Values of --preset, and further settings that make the model smaller."""


def launch(command: list[str]) -> int:
    """Do what torchrun does: start the ranks of `command`, pass SIGTERM on, and end all when one fails."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks: dict[int, int] = {}
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
            os.environ.update(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
            os.environ.update(TORCHELASTIC_RUN_ID="kill", LOCAL_WORLD_SIZE=str(WORLD))
            train(command)
            os._exit(0)
        ranks[pid] = rank
    signal.signal(signal.SIGTERM, lambda number, frame: [os.kill(pid, number) for pid in ranks])
    status = 0
    while ranks:
        pid, code = os.wait()
        if ranks.pop(pid, None) is not None and code and not status:
            status = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return status


def of(launcher: BaseProcess) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The ranks of a launcher, and the processes that the ranks have made to read data and to save."""
    with suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(launcher.pid).children()
        return ranks, [child for rank in ranks for child in _children(rank)]
    return [], []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process], number: int = signal.SIGKILL) -> bool:
    """Send a signal to processes; returns whether there was one."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return bool(processes)


WAYS: dict[str, Callable[[BaseProcess, random.Random], bool]] = {
    "a rank": lambda launcher, dice: kill(dice.sample(of(launcher)[0], min(1, len(of(launcher)[0])))),
    "the launcher": lambda launcher, dice: kill([psutil.Process(launcher.pid)]),
    "everything": lambda launcher, dice: kill([psutil.Process(launcher.pid), *sum(of(launcher), [])]),
    "SIGTERM": lambda launcher, dice: kill([psutil.Process(launcher.pid)], signal.SIGTERM),
    "Ctrl-C": lambda launcher, dice: kill(of(launcher)[0], signal.SIGINT),
    "a child of a rank": lambda launcher, dice: kill(dice.sample(of(launcher)[1], min(1, len(of(launcher)[1])))),
}


def start(run: Path, data: Path, *overrides: str, preset: str = "tiny") -> BaseProcess:
    """Start or resume the run in `run`; its output goes to a file beside it."""
    output = run.with_suffix(".log")
    output.touch()
    config = str(ROOT / "examples" / "tiny.yaml")
    given = [f"model.preset={preset}", *SETTINGS, *PRESETS[preset], f"data.path={data}", f"train.output={run}"]
    given += overrides
    command = [__file__, "--config", config, *given, "--resume", "auto"]
    return fork(command, (str(output), str(output)), {"KILL_RESUME_LAUNCHES": "1"})


def ending(run: Path) -> dict[str, object]:
    """The losses of a finished run, and a hash of each file of its last checkpoint that holds state."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    folder = run / "checkpoints" / f"step-{STEPS:07d}"
    files = [*sorted(folder.glob("*.distcp")), folder / "data.json"]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"losses": {record["step"]: record["loss"] for record in lines}, **hashes}


def is_finished(run: Path) -> bool:
    """Whether the run has come to its last step."""
    with suppress(OSError):
        return json.loads((run / "state.json").read_text())["state"] == "finished"
    return False


def disturb(run: Path, data: Path, preset: str, seconds: float, dice: random.Random) -> tuple[str, list[str]]:
    """Start the run and disturb it within `seconds`; returns how, or "" if it was over before, and what is left."""
    launcher, way = start(run, data, preset=preset), dice.choice(list(WAYS))
    launcher.join(dice.uniform(0, seconds))
    everything: list[psutil.Process] = []
    if launcher.is_alive():
        with suppress(psutil.NoSuchProcess):
            everything = [psutil.Process(launcher.pid), *sum(of(launcher), [])]
            if not WAYS[way](launcher, dice):
                way = ""
    else:
        way = ""
    launcher.join(SECONDS_TO_BE_GONE * 2)
    gone, alive = psutil.wait_procs(everything, SECONDS_TO_BE_GONE)
    left = [f"{process.pid} {process.status()}" for process in alive if process.is_running()]
    end([launcher])
    kill(alive)
    return way, left


def kill_and_compare(data: Path, out: Path, preset: str, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """Kill runs `kills` times in all; returns the number of kills of each way, and what was wrong."""
    dice, counts, faults = random.Random(seed), Counter(), []
    start(out / "whole", data, preset=preset).join()
    started, number = time.monotonic(), 0
    start(out / "again", data, preset=preset).join()
    seconds, expected = time.monotonic() - started, ending(out / "whole")  # the first start has loaded the package
    if ending(out / "again") != expected:
        faults.append("two uninterrupted runs differ")
    while counts.total() < kills:
        run = out / f"run{number:04d}"
        while not is_finished(run) and len(faults) < 10:
            way, left = disturb(run, data, preset, seconds, dice)
            counts[way] += bool(way)
            faults += [f"{run.name}: {way} left {process}" for process in left]
        if ending(run) != expected:
            faults.append(f"{run.name}: its end differs from that of the uninterrupted run")
        number += 1
        print(f"{run.name}: {counts.total()} kills, {len(faults)} faults", flush=True)
    return counts, faults


def main() -> int:
    """Parse the arguments, kill, and print the counts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        counts, faults = kill_and_compare(args.data.absolute(), out.absolute(), args.preset, args.kills, args.seed)
    print(*faults, sep="\n")
    print(f"{counts.total()} kills ({dict(counts)}), {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]) if "KILL_RESUME_LAUNCHES" in os.environ else main())

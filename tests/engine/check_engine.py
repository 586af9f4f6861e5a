"""Transformer Engine against local kernels, on a CPU: gradients, layouts, checkpoints. Started by test_engine.py.

python tests/engine/check_engine.py FOLDER         the cases of the tests; their figures go into FOLDER/*.json
python tests/engine/check_engine.py FOLDER all     every precision at every layout, with every recomputation

FOLDER has what a process without Transformer Engine wrote (test_engine.py), and gets what it reads afterwards.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]

from engine import double  # noqa: E402

if __name__ == "__main__":
    double.enable()

import torch  # noqa: E402
from engine import checkpoints, gradients, logical, optimizers  # noqa: E402

from megatron_llave.distributed import cpu_emulation, process_groups  # noqa: E402

Figures = dict[str, object]
PORT_DIGITS = 5


def run_rank(world: int, rank: int, port: int, folder: Path, cases: dict[str, Callable[[], Figures]]) -> None:
    """Run cases on this rank; a case that fails has its traceback as its figures."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
    process_groups.initialize_distributed(100)
    figures: Figures = {}
    for name, case in cases.items():
        start = time.process_time()
        try:
            figures[name] = case() | {"seconds": round(time.process_time() - start, 2)}
        except Exception:
            figures[name] = {"error": traceback.format_exc()[-3000:]}
            print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if world > 1:
                break  # the other ranks wait for this one in vain
        process_groups.destroy_model_parallel()
        figures[name]["threads"] = len(os.listdir("/proc/self/task"))
        print(f"rank {rank} of {world}, {name}: {figures[name]}", flush=True)
    (folder / f"world{world}_rank{rank}.json").write_text(json.dumps(figures))


def run_world(world: int, folder: Path, cases: dict[str, Callable[[], Figures]]) -> None:
    """Run cases on `world` forks of this process."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    reader, writer = os.pipe()
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            status = 1
            try:
                run_rank(world, rank, int(os.read(reader, PORT_DIGITS)), folder, cases)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
    # After the last fork: a fork that happens while the store's thread answers another rank may wait for ever for a
    # lock which that thread held.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(writer, f"{store.port:{PORT_DIGITS}}".encode() * world)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    assert not any(statuses), f"the {world} ranks ended with {statuses}"


def main() -> None:
    """Run all cases."""
    folder, is_all = Path(sys.argv[1]), sys.argv[2:] == ["all"]
    cpu_emulation.enable()
    gc.freeze()  # what is loaded by now stays: the collection after each case, on each rank, need not go through it
    for world in (1, 2, 4):
        cases = gradients.cases(world, folder, is_all)
        if not is_all and world < 4:
            # Those on the logical GPU first, while nothing of the host is in a cache of Transformer Engine.
            cases = logical.cases(world, folder) | optimizers.cases(world, folder) | cases
            cases |= checkpoints.cases(world, folder)
        run_world(world, folder, cases)


if __name__ == "__main__":
    main()

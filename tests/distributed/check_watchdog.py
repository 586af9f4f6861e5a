"""Under torchrun with 2 ranks: rank 1 is stopped, falls asleep or is killed in the middle of step 5."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megatron_llave.distributed import cpu_emulation, process_groups
from megatron_llave.errors import exit_with_one_line
from megatron_llave.training.fault_tolerance import Watchdog


def fall_asleep() -> None:
    time.sleep(1000)


FAULTS = {
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": fall_asleep,
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
}

if __name__ == "__main__":
    cpu_emulation.enable()
    process_groups.initialize_distributed(300)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # as StopRequests has it: torchrun sends one
    watchdog = Watchdog(6)  # longer than a step takes on a busy machine
    with exit_with_one_line():
        for step in range(1, 10):
            watchdog.progress(f"in step {step}")
            if step == 5 and dist.get_rank() == 1:
                time.sleep(2)  # so that its heartbeat has said which step it is in
                FAULTS[sys.argv[1]]()
            time.sleep(0.2)
            dist.all_reduce(torch.ones(1))
    raise SystemExit("nothing has happened")
